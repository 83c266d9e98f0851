"""Ends a process that no longer gets on, so that a launcher starts it again."""

import collections
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

from aunet_jax.terminal import EXIT_FAILED


class Watchdog:
  """Ends the process where nothing happens for too long.

  A run of several processes that waits for a lost message looks like training:
  every process is alive. Too long is `factor` times the median of the last
  steps, and at least `floor_seconds`. The stacks of all threads say where it
  hung.
  """

  def __init__(
    self,
    floor_seconds: float | None,
    factor: float,
    end: Callable[[int], None] = os._exit,
  ):
    """Args: floor_seconds: None = never. end: called with the exit status."""
    self._floor, self._factor, self._end = floor_seconds, factor, end
    self._steps: collections.deque[float] = collections.deque(maxlen=100)
    self._last, self._doing, self._step_began = time.monotonic(), "start", None
    self._closed = threading.Event()

  def __enter__(self) -> "Watchdog":
    self._last = time.monotonic()
    if self._floor is not None:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *exception) -> None:
    self._closed.set()

  def step(self, step: int) -> None:
    """A step has come to its end."""
    now = time.monotonic()
    if self._step_began is not None:
      self._steps.append(now - self._step_began)
    self._step_began = self._last = now
    self._doing = f"step {step + 1}"

  def alive(self, doing: str) -> None:
    """Something else begins or gets on."""
    self._last, self._doing, self._step_began = time.monotonic(), doing, None

  def limit(self) -> float:
    """Seconds without a sign of life that are too long."""
    steps = list(self._steps)
    usual = statistics.median(steps) if steps else 0.0
    return max(self._floor, self._factor * usual)

  def _watch(self) -> None:
    pause = self._floor / 10
    before = time.monotonic()
    while not self._closed.wait(pause):
      now = time.monotonic()
      if now - before > 3 * pause:  # the whole process was suspended
        self._last = now
      before = now
      silent = now - self._last
      if silent > self.limit():
        usual = statistics.median(self._steps) if self._steps else None
        print(
          f"\nerror: nothing happened for {silent:.0f} s in {self._doing}"
          + (f"; a step takes {usual:.1f} s" if usual is not None else "")
          + ". All threads of this process, which ends now:",
          file=sys.stderr,
          flush=True,
        )
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        self._end(EXIT_FAILED)
        return
