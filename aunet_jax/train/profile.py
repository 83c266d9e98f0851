"""Recording some steps for TensorBoard and xprof."""

import gzip
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from aunet_jax.workdir import buckets
from aunet_jax.workdir.buckets import BucketPath

PROGRAM_FILE = "step.hlo.gz"  # beside the recordings: the text of the program
REQUEST_FILE = "profile_now"  # in the workdir; whoever wants a profile makes it
REQUESTED_STEPS = 5
LOOK_SECONDS = 5  # between two looks for it


class Recorder:
  """Records steps first to last, those that a request asks for, or none.

  In a bucket, which answers slowly, no request is looked for.
  """

  def __init__(self, steps: tuple[int, int] | None, workdir: Path | BucketPath):
    self._steps, self._folder = steps, workdir / "profile"
    self._mirror = buckets.Mirror(self._folder)
    self._request, self._looked = workdir / REQUEST_FILE, 0.0
    self._listens = not isinstance(workdir, BucketPath)
    self._running = False

  def wanted(self) -> bool:
    """Whether process 0 sees a request; the processes agree on when."""
    if self._running or jax.process_index() != 0 or not self._listens:
      return False
    now = time.monotonic()
    if now - self._looked < LOOK_SECONDS:
      return False
    self._looked = now
    try:
      return self._request.exists()
    except OSError:  # a file system that does not answer; the run needs none
      return False

  def record_next(self, step: int) -> None:
    """Records the steps after `step`, instead of any that are still to come."""
    if not self._running:
      self._steps = (step + 1, step + REQUESTED_STEPS)
      if jax.process_index() == 0:
        try:
          self._request.unlink(missing_ok=True)
        except OSError as error:
          self._listens = False
          _say_none(error)

  def before(self, step: int, program: Callable[[], str]) -> None:
    """Args: program: gives the text of what the step runs."""
    if self._steps is not None and not self._running:
      if self._steps[0] <= step <= self._steps[1]:
        self._keep(program)
        try:
          jax.profiler.start_trace(str(self._mirror.here))
          self._running = True
        except RuntimeError as error:
          self._steps = None
          _say_none(error)

  def _keep(self, program: Callable[[], str]) -> None:
    """Where in the model an instruction comes from, only its program says."""
    if jax.process_index() != 0:
      return
    try:
      self._mirror.here.mkdir(parents=True, exist_ok=True)
      text = gzip.compress(program().encode(), compresslevel=1)
      (self._mirror.here / PROGRAM_FILE).write_bytes(text)
    except (RuntimeError, OSError) as error:
      print(f"no program with the profile: {error}", file=sys.stderr)

  def after(self, step: int, device_metrics: dict, say: Callable) -> None:
    if self._running and step >= self._steps[1]:
      jax.block_until_ready(device_metrics)
      if self.close():
        say(f"profile of steps up to {step}: {self._folder}")

  def close(self) -> bool:
    """Ends a recording; whether there is one, and it is written."""
    if not self._running:
      return False
    self._running, self._steps = False, None
    try:
      jax.profiler.stop_trace()
      self._mirror.put()
    except (RuntimeError, OSError) as error:
      _say_none(error)
      return False
    return True


def _say_none(error: Exception) -> None:
  """The run goes on: it needs no profile."""
  print(f"no profile: {error}", file=sys.stderr, flush=True)


def parse_steps(text: str | None) -> tuple[int, int] | None:
  """ "20:25" as (20, 25).

  Raises: ValueError where it is nothing like that.
  """
  if text is None:
    return None
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
    raise ValueError(
      f"--profile={text} must be FIRST:LAST, two steps, for example 20:25."
    )
  return int(first), int(last)
