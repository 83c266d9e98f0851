"""Work that several processes of one machine share, and how far it is."""

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from aunet_jax.terminal import Failure

_TICK_SECONDS = 0.5  # between looks at how far the work is


@functools.cache  # one watcher a process
def end_with_parent() -> None:
  """In a worker: ends it when its parent is gone, however that died.

  Grain, and Python's own pools, tell their workers to stop only in an orderly
  exit; after a `kill -9` they would wait for ever.
  """
  parent = multiprocessing.parent_process()

  def watch():
    parent.join()
    os._exit(1)

  if parent is not None:
    threading.Thread(target=watch, daemon=True).start()


class _Stopped(Exception):
  """Another part of the work has failed."""


_report: Callable[[int, int], None] | None = None  # of a task that runs


def _count(counters, num_bytes: int, num_documents: int) -> None:
  with counters.get_lock():
    counters[0] += num_bytes
    counters[1] += num_documents
    stop = counters[2]
  if stop:
    raise _Stopped


def _begin(counters) -> None:
  global _report
  _report = functools.partial(_count, counters)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
  end_with_parent()


def advance(num_bytes: int, num_documents: int) -> None:
  """In a task: says that so much more is done.

  Raises: an exception where another task has failed.
  """
  if _report is not None:
    _report(num_bytes, num_documents)


class Pool:
  """Runs tasks in processes of their own, or in this one where one is asked.

  Used as a context. Tasks, arguments and results must be picklable. Processes
  start at once, so that they are ready when the first task comes.
  """

  def __init__(self, num_workers: int):
    # Called every half second, at least between two tasks, with the bytes and
    # documents that tasks have done so far.
    self.on_tick: Callable[[int, int], None] = lambda *done: None
    self._last = time.monotonic()
    context = multiprocessing.get_context("spawn")  # JAX has threads
    self._counters = context.Array("q", 3)
    self._executor = None
    if num_workers > 1:
      self._executor = concurrent.futures.ProcessPoolExecutor(
        num_workers, context, _begin, (self._counters,)
      )
      for _ in range(num_workers):
        self._executor.submit(_import)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._executor is not None:
      self._counters[2] = exception[0] is not None
      self._executor.shutdown(cancel_futures=True)

  def _tick(self) -> None:
    now = time.monotonic()
    if now - self._last >= _TICK_SECONDS:
      self._last = now
      self.on_tick(self._counters[0], self._counters[1])

  def run(self, function: Callable, tasks: Iterable) -> Iterator[Any]:
    """The results of function(task), as they come.

    Raises: what a task raises; Failure where a process was killed.
    """
    if self._executor is None:
      yield from self._run_here(function, tasks)
      return
    try:
      waiting = {self._executor.submit(function, task) for task in tasks}
      while waiting:
        done, waiting = concurrent.futures.wait(
          waiting,
          timeout=_TICK_SECONDS,
          return_when=concurrent.futures.FIRST_COMPLETED,
        )
        self._tick()
        for future in done:
          yield future.result()
    except concurrent.futures.BrokenExecutor:
      raise Failure(
        "a worker process was killed, by the system where memory ran out; the "
        "same command goes on with what is finished, with fewer --workers in "
        "less memory."
      ) from None

  def _run_here(self, function: Callable, tasks: Iterable) -> Iterator[Any]:
    global _report

    def report(num_bytes, num_documents):
      _count(self._counters, num_bytes, num_documents)
      self._tick()

    for task in tasks:
      _report = report
      try:
        result = function(task)
      finally:
        _report = None
      self._tick()
      yield result

  def map(self, function: Callable, tasks: Iterable) -> Iterator[Any]:
    """As the built-in `map`, in order."""
    numbered = functools.partial(_numbered, function)
    kept: dict[int, Any] = {}
    for number, result in self.run(numbered, list(enumerate(tasks))):
      kept[number] = result
    yield from (kept[number] for number in range(len(kept)))


def _import() -> None:
  """Imports what tasks need."""
  importlib.import_module("aunet_jax.data.parts")


def _numbered(function: Callable, task: tuple[int, Any]) -> tuple[int, Any]:
  return task[0], function(task[1])
