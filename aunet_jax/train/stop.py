"""Signals that stop a run, and stopping all its processes at the same step."""

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aunet_jax.aunet import sharding
from aunet_jax.terminal import EXIT_INTERRUPTED, EXIT_STOPPED, Failure
from aunet_jax.workdir import layout
from aunet_jax.workdir.buckets import BucketPath

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StoppedEarly(Failure):
  """A signal before the first step: there is nothing to save."""

  status = EXIT_STOPPED


class Stop:
  """Turns SIGTERM, SIGHUP and Ctrl-C into a clean stop.

  The first of a kind asks: `requested` is its name. A second of that kind ends
  the process at once. Before `begin`, a process without others raises
  StoppedEarly at the first.

  A handler in Python runs between two steps of the interpreter, which a process
  that waits for others does not reach; so a thread counts the signals.
  """

  def __init__(self, workdir: str | Path | BucketPath, alone: bool = True):
    """Args: alone: whether the run is this process alone."""
    self.requested: str | None = None
    self._workdir, self._alone = workdir, alone
    self._began, self._seen = False, set()

  def __enter__(self) -> "Stop":
    reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._old_fd = signal.set_wakeup_fd(
      self._writer.fileno(), warn_on_full_buffer=False
    )
    self._old = {
      number: signal.signal(number, self._ask)
      for number in SIGNALS
      # nohup has it ignored, and means it.
      if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)
    }
    threading.Thread(target=self._count, args=(reader,), daemon=True).start()
    # `__main__` has kept them back since the process began.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return self

  def __exit__(self, *exception) -> None:
    signal.set_wakeup_fd(self._old_fd)
    for number, handler in self._old.items():
      if handler is not None:  # None: not Python's own, and not to be set
        signal.signal(number, handler)
    self._writer.close()  # ends the thread

  def begin(self) -> None:
    """From here on a signal lets the current step end."""
    self._began = True

  def _ask(self, number: int, frame) -> None:
    self.requested = signal.Signals(number).name
    if not self._began and self._alone:
      self.leave_if_asked()

  def leave_if_asked(self) -> None:
    """Raises: StoppedEarly."""
    if self.requested:
      raise StoppedEarly(
        f"stopped by {self.requested} before the first step; run the same "
        f"command again."
      )

  def _count(self, reader: socket.socket) -> None:
    with reader:
      while data := reader.recv(1):
        number = data[0]
        if number not in self._old:
          continue
        if number in self._seen:
          said = "stopped"
          if not isinstance(self._workdir, BucketPath):  # it may not answer
            newest = (layout.steps(self._workdir) or [None])[-1]
            said += f"; the newest checkpoint is {newest}"
          print(
            f"\n{said}.",
            file=sys.stderr,
            flush=True,
          )
          os._exit(EXIT_INTERRUPTED)
        self._seen.add(number)
        self.requested = signal.Signals(number).name


class Votes:
  """Makes what any process asks for the decision of all, at the same step.

  What a process knows alone (a signal, the time) must not decide alone: it
  would wait in the barrier of a save while the others wait for its next step.
  The numbers asked for are combined on the devices, as their maximum, and read
  one turn later, so that nothing waits for them.
  """

  def __init__(self, mesh: Mesh, size: int):
    self._size, self._pending, self._combine = size, None, None
    if jax.process_count() == 1:
      return
    self._where = NamedSharding(mesh, PartitionSpec(sharding.AXES))
    self._shape = (mesh.size, size)
    self._combine = (
      jax.jit(lambda x: x.max(0), out_shardings=sharding.replicated(mesh))
      .lower(self._place((0,) * size))
      .compile()
    )

  def _place(self, asked: tuple[int, ...]) -> jax.Array:
    row = np.asarray(asked, np.int32)

    def rows(index):
      return np.broadcast_to(row, (self._shape[0], self._size))[index]

    return jax.make_array_from_callback(self._shape, self._where, rows)

  def turn(self, *asked: int) -> tuple[int, ...]:
    """Asks, and returns what is agreed on: of several processes what they asked
    a turn ago. Every process must take the same turns.
    """
    if self._combine is None:
      return asked
    before, self._pending = self._pending, self._combine(self._place(asked))
    if before is None:
      return (0,) * self._size
    return tuple(int(number) for number in np.asarray(before))
