"""Orbax checkpoints of a run: parameters, optimizer, data position, config.

A workdir holds `config.json` (the Config) and `checkpoints/STEP/` with three
items: `params`, `optimizer` (optimizer state and step counters) and `host`
(a JSON dict: data iterator state, byte counts, splitting-rule hash). A
checkpoint becomes visible only when Orbax has committed all of it, with the
manifest that tells later whether its files are still as they were written.
"""

import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from aunet_jax.train.state import TrainState
from aunet_jax.workdir import manifest
from aunet_jax.workdir.layout import (
  CHECKPOINTS,
  CheckpointError,
  is_converted,
  steps,
  unreadable,
)

# ----- which checkpoints are whole ------------------------------------------


def _newest_whole(
  workdir: Path, last: int | None, items: Collection[str] | None
) -> tuple[int | None, dict[int, str]]:
  """The newest whole checkpoint, and what is wrong with the newer ones.

  Raises: CheckpointError where there are checkpoints but no whole one.
  """
  directory, damaged = workdir / CHECKPOINTS, {}
  for step in reversed(steps(workdir)):
    if last is not None and step > last:
      continue
    reason = manifest.damage(directory / str(step), items)
    if reason is None:
      return step, damaged
    damaged[step] = reason
  if damaged:
    listed = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
    raise CheckpointError(
      f"no checkpoint in {directory} is whole ({listed}). Put a copy of one "
      f"there, or delete that folder to start anew from step 0."
    )
  return None, damaged


def choose(
  workdir: str | Path, say: Callable[[str], None], last: int | None = None
) -> int | None:
  """The newest whole checkpoint, for a run that will go on from it.

  Damaged ones that are newer are renamed to `checkpoints/damaged-STEP`, so
  that their steps can be saved again, and said. With several processes the
  first one looks, and all get its answer: every process must call this.

  Args: last: look at steps up to this one; None = all.
  Returns: the step; None where there is no checkpoint.
  Raises: CheckpointError where there are checkpoints but no whole one; then
    none is renamed.
  """
  workdir, step, failure = Path(workdir), None, None
  if jax.process_index() == 0:
    try:
      step, damaged = _newest_whole(workdir, last, None)
      _set_aside(workdir / CHECKPOINTS, damaged, say)
    except (CheckpointError, OSError) as error:
      failure = error
  if jax.process_count() > 1:
    code = -2 if failure else -1 if step is None else step
    code = int(multihost_utils.broadcast_one_to_all(np.int32(code)))
    if code == -2 and failure is None:
      failure = CheckpointError("process 0 found no whole checkpoint.")
    step = code if code >= 0 else None
  if failure is not None:
    raise failure
  if step is not None:
    folder = workdir / CHECKPOINTS / str(step)
    if not (folder / manifest.FILE).exists():
      say(
        f"checkpoint {step} has no {manifest.FILE} (an older version wrote "
        f"it): its files are taken unchecked"
      )
  return step


def _set_aside(
  directory: Path, damaged: dict[int, str], say: Callable[[str], None]
) -> None:
  for step, reason in damaged.items():
    aside = directory / f"damaged-{step}"
    if aside.exists():  # the same step, damaged before
      shutil.rmtree(aside)
    (directory / str(step)).rename(aside)
    say(f"checkpoint {step} skipped: {reason}; it is now {aside}")


# ----- saving and restoring -------------------------------------------------


def _num_bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Checkpointer:
  """Saves in the background and restores the newest whole checkpoint."""

  def __init__(self, workdir: str | Path, keep: int = 1):
    # Orbax logs a failed background save with tracebacks of its threads;
    # `save` and `wait` raise the same failure.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    self.directory = Path(workdir).absolute() / CHECKPOINTS
    self._saving = None  # the step being saved; one at a time
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        async_options=ocp.options.AsyncOptions(
          post_finalization_callback=self._write_manifest
        ),
      ),
    )

  def _write_manifest(self) -> None:
    """Runs in the background, when all of a step is written but not seen."""
    if jax.process_index() == 0:
      name = f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}"
      manifest.write(self.directory / name)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def newest_before(self, step: int) -> int | None:
    """The newest checkpoint of an earlier step, once saves have ended."""
    self.wait()
    return max((s for s in self._manager.all_steps() if s < step), default=None)

  def drop_after(self, step: int) -> None:
    """Deletes the checkpoints of later steps, which will be run again."""
    for newer in self._manager.all_steps():
      if newer > step:
        self._manager.delete(newer)

  def reached_preemption(self, step: int) -> bool:
    """True on every process once any was told to stop (multi-host only)."""
    return self._manager.reached_preemption(step)

  def save(self, step: int, state: TrainState, host: dict) -> None:
    """Starts saving `state` as checkpoint `step`; `host` is JSON-able.

    Raises: CheckpointError where this save, or the one before it that ran in
      the background, could not be written. Older checkpoints stay whole.
    """
    counters = dict(
      opt_state=state.opt_state,
      step=state.step,
      nonfinite_in_row=state.nonfinite_in_row,
      nonfinite_total=state.nonfinite_total,
    )
    self.wait()  # errors of the save before this one are its own
    needed = _num_bytes(state)
    free = shutil.disk_usage(self.directory).free
    if free < needed:
      raise CheckpointError(
        f"checkpoint {step} needs {needed / 1e6:.1f} MB but {self.directory} "
        f"has {free / 1e6:.1f} MB free; free some space and run the same "
        f"command again to continue from checkpoint {self.latest_step()}."
      )
    self._saving = step
    try:
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params),
          optimizer=ocp.args.StandardSave(counters),
          host=ocp.args.JsonSave(host),
        ),
      )
    except Exception as error:
      raise self._write_error(step, error) from error
    if not saved and step not in self._manager.all_steps():
      raise CheckpointError(
        f"checkpoint {step} was not written: {self.directory} holds "
        f"{sorted(self._manager.all_steps())} already, and steps must grow. "
        f"Use another workdir."
      )

  def wait(self) -> None:
    """Returns when every started save is on disk.

    Raises: CheckpointError as `save`.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._write_error(None, error) from error

  def _write_error(self, step, error) -> CheckpointError:
    name = "a checkpoint" if step is None else f"checkpoint {step}"
    reason = str(error).strip().splitlines()
    whole = sorted(self._manager.all_steps())
    newest = f"Checkpoint {whole[-1]} is whole" if whole else "None is whole"
    return CheckpointError(
      f"{name} could not be written under {self.directory}: "
      f"{reason[0] if reason else type(error).__name__}. {newest}; when that "
      f"is mended, run the same command again to continue."
    )

  def restore(
    self, step: int, abstract: TrainState, shardings: TrainState
  ) -> tuple[TrainState, dict]:
    """Checkpoint `step` as (state, host).

    A converted model gives its params and a None optimizer state.

    Raises: CheckpointError where it cannot be read.
    """

    def target(shape, where):
      return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shape,
        where,
      )

    whole = target(abstract, shardings)
    counters = dict(
      opt_state=whole.opt_state,
      step=whole.step,
      nonfinite_in_row=whole.nonfinite_in_row,
      nonfinite_total=whole.nonfinite_total,
    )
    items = dict(
      params=ocp.args.StandardRestore(whole.params), host=ocp.args.JsonRestore()
    )
    converted = is_converted(self.directory.parent, step)
    if not converted:
      items["optimizer"] = ocp.args.StandardRestore(counters)
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:
      raise unreadable(self.directory / str(step), error) from error
    if converted:
      return abstract.replace(params=restored["params"], opt_state=None), (
        restored["host"]
      )
    state = TrainState(params=restored["params"], **restored["optimizer"])
    return state, restored["host"]

  def close(self) -> None:
    self._manager.close()
