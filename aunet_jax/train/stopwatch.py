"""Where the wall time of a run goes."""

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple


class Lap(NamedTuple):
  """What happened since the lap before."""

  seconds: dict[str, float]  # by what they went into
  steps: int
  num_bytes: int


class Stopwatch:
  """Wall time by what it goes into, one thing at a time.

  Time inside `within("data")` that is itself inside `within("step")` is of
  "data" alone, so that the seconds of all things add up to the time that
  passed.
  """

  def __init__(
    self, kind: str = "start", clock: Callable[[], float] = time.perf_counter
  ):
    self._clock, self._since, self._kind = clock, clock(), kind
    self.seconds: dict[str, float] = {}  # since the start
    self._before = self._steps = self._bytes = None
    self.lap()

  @contextlib.contextmanager
  def within(self, kind: str):
    outer = self._kind
    self._switch(kind)
    try:
      yield
    finally:
      self._switch(outer)

  def _switch(self, kind: str) -> None:
    now = self._clock()
    passed = now - self._since
    self.seconds[self._kind] = self.seconds.get(self._kind, 0.0) + passed
    self._since, self._kind = now, kind

  def step(self, num_bytes: int) -> None:
    """Counts a step, of so many bytes of text."""
    self._steps += 1
    self._bytes += num_bytes

  def lap(self) -> Lap:
    """What happened since the last call."""
    self._switch(self._kind)
    before = self._before or {}
    lap = Lap(
      {k: v - before.get(k, 0.0) for k, v in self.seconds.items()},
      self._steps,
      self._bytes,
    )
    self._before, self._steps, self._bytes = dict(self.seconds), 0, 0
    return lap
