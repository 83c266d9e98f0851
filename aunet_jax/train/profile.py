"""Recording some steps for TensorBoard and xprof."""

from collections.abc import Callable
from pathlib import Path

import jax


class Recorder:
  """Records steps first to last, and nothing without any."""

  def __init__(self, steps: tuple[int, int] | None, workdir: Path):
    self._steps, self._folder = steps, workdir / "profile"
    self._running = False

  def before(self, step: int) -> None:
    if self._steps is not None and not self._running:
      if self._steps[0] <= step <= self._steps[1]:
        jax.profiler.start_trace(str(self._folder))
        self._running = True

  def after(self, step: int, device_metrics: dict, say: Callable) -> None:
    if self._running and step >= self._steps[1]:
      jax.block_until_ready(device_metrics)
      self.close()
      say(f"profile of steps up to {step}: {self._folder}")

  def close(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running, self._steps = False, None


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
