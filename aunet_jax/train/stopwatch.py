"""Where the wall time of a run goes, in one start and over all of them."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from aunet_jax import files
from aunet_jax.workdir import buckets
from aunet_jax.workdir.buckets import BucketPath

TIMES_FILE = "times.json"


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


class History:
  """Wall time of all starts of a run, in WORKDIR/times.json.

  Goodput is the share of wall time in steps that count: neither compiling,
  waiting for data, evaluating, saving and starting, nor the time between two
  starts, nor steps that were done a second time after a crash.
  """

  WRITE_SECONDS = 30  # at most as often

  def __init__(
    self,
    workdir: Path | BucketPath,
    step: int,
    active: bool,
    clock: Callable[[], float] = time.time,
  ):
    """Args: step: that this start goes on from. active: whether to write."""
    self._path, self._active, self._clock = workdir / TIMES_FILE, active, clock
    self._written = 0.0
    self._starts = _read_starts(self._path) if active else []
    now = clock()
    self._this = {
      "began": now, "until": now, "first_step": step, "last_step": step,
      "seconds": {},
    }  # fmt: skip
    self._starts.append(self._this)

  def note(self, step: int | None, seconds: dict[str, float]) -> dict:
    """Brings this start up to date.

    Args: step: that has ended; None at the end of this start.
    Returns: goodput of this start, and of all together.
    """
    now = self._clock()
    self._this["until"], self._this["seconds"] = now, dict(seconds)
    if step is not None:
      self._this["last_step"] = step
    if self._active:
      if step is None or now - self._written >= self.WRITE_SECONDS:
        with contextlib.suppress(buckets.BucketError):  # nothing needs it
          text = json.dumps({"starts": self._starts})
          buckets.write_whole(self._path, text)
        self._written = now
    return {
      "goodput": goodput([self._this]), "goodput_all_starts": self.goodput()
    }  # fmt: skip

  def goodput(self) -> float:
    return goodput(self._starts)

  def summary(self) -> str:
    """Where the time of this start went, and the goodput of all starts."""
    seconds = self._this["seconds"]
    total = sum(seconds.values()) or 1.0
    shares = sorted(seconds.items(), key=lambda item: -item[1])
    line = "time: " + ", ".join(
      f"{k} {100 * v / total:.1f}%" for k, v in shares
    )
    if len(self._starts) > 1:
      line += (
        f"; over {len(self._starts)} starts {100 * self.goodput():.1f}% of the "
        f"time since the first went into steps that count"
      )
    return line


def goodput(starts: list[dict]) -> float:
  """Share of the wall time from the first start on in steps that count."""
  useful = 0.0
  for start, following in zip(starts, [*starts[1:], None], strict=True):
    done = start["last_step"] - start["first_step"]
    kept = done
    if following is not None:
      kept = min(done, max(0, following["first_step"] - start["first_step"]))
    if done > 0:
      useful += start["seconds"].get("step", 0.0) * kept / done
  passed = starts[-1]["until"] - starts[0]["began"]
  return useful / passed if passed > 0 else 0.0


def _read_starts(path: Path | BucketPath) -> list[dict]:
  """Those in the file; none where it is damaged: nothing else needs it."""
  try:
    starts = files.parse_json(path.read_bytes())["starts"]
    for start in starts:
      for name in ("began", "until", "first_step", "last_step"):
        start[name] + 0
      sum(start["seconds"].values())
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return []
  return starts
