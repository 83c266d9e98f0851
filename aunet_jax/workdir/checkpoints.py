"""Orbax checkpoints of a run: parameters, optimizer, data position, config.

A workdir holds `config.json` (the Config) and `checkpoints/STEP/` with three
items: `params`, `optimizer` (optimizer state and step counters) and `host`
(a JSON dict: data iterator state, byte counts, splitting-rule hash). A
checkpoint becomes visible only when Orbax has committed all of it, with the
manifest that tells later whether its files are still as they were written.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from aunet_jax.config import CheckpointConfig
from aunet_jax.workdir import manifest, together
from aunet_jax.workdir.layout import (
  CHECKPOINTS,
  CheckpointError,
  SaveError,
  steps,
  unreadable,
)

# ----- which checkpoints are undamaged --------------------------------------


def newest_undamaged(
  workdir: Path, last: int | None = None, items: Collection[str] | None = None
) -> tuple[int | None, dict[int, str]]:
  """The newest undamaged checkpoint, and what is wrong with the newer ones.

  Args:
    last: look at steps up to this one; None = all.
    items: parts to look at; None = all.
  Returns: (step, {newer step: damage}); the step is None without checkpoints.
  Raises: CheckpointError where there are checkpoints, all of them damaged.
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
      f"no checkpoint in {directory} is undamaged ({listed}). Put a copy of "
      f"one there, or delete that folder to start again from step 0."
    )
  return None, damaged


def choose(
  workdir: str | Path, say: Callable[[str], None], last: int | None = None
) -> int | None:
  """The newest undamaged checkpoint, for a run that will go on from it.

  Damaged ones that are newer are renamed to `checkpoints/damaged-STEP`, so
  that their steps can be saved again, and logged. With several processes the
  first one looks, and all get its answer: every process must call this.

  Args: last: look at steps up to this one; None = all.
  Returns: the step; None where there is no checkpoint.
  Raises: CheckpointError where there are checkpoints, all of them damaged;
    then none is renamed.
  """
  workdir, step = Path(workdir), None
  with together.all_or_none():
    if jax.process_index() == 0:
      step, damaged = newest_undamaged(workdir, last)
      _set_aside(workdir / CHECKPOINTS, damaged, say)
  code = together.broadcast(-1 if step is None else step)
  step = code if code >= 0 else None
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
    if aside.is_dir() and not aside.is_symlink():
      shutil.rmtree(aside)  # the same step, damaged before
    else:
      aside.unlink(missing_ok=True)
    (directory / str(step)).rename(aside)
    say(f"checkpoint {step} skipped: {reason}; it is now {aside}")


# ----- saving and restoring -------------------------------------------------


def _num_bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _kept(config: CheckpointConfig):
  """The newest ones, and milestones beside them."""
  policies = ocp.checkpoint_managers.preservation_policy
  kept = [policies.LatestN(config.keep)]
  if config.milestone_steps is not None:
    kept.append(policies.EveryNSteps(config.milestone_steps))
  return policies.AnyPreservationPolicy(kept)


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
    for path, leaf in leaves
    if getattr(leaf, "shape", None) is not None
  }


def _check_shapes(folder: Path, target) -> None:
  """Compares what is wanted with what lies there, before memory is taken.

  Where one array of a restore fails, Orbax prints pages about the others.

  Raises: ValueError.
  """
  with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
    stored = _shapes(reader.metadata(folder).tree)
  for name, shape in _shapes(target).items():
    if stored.get(name, shape) != shape:
      raise ValueError(
        f"{name} has shape {stored[name]}, where the config asks for {shape}: "
        f"config.json is not the one it was saved with"
      )


def read_items(
  manager: ocp.CheckpointManager, step: int, targets: dict[str, object]
) -> dict[str, object]:
  """Arrays of a checkpoint.

  Args: targets: name of an item -> tree of shapes with shardings.
  Returns: the same names and trees, of arrays.
  Raises: CheckpointError where it cannot be read.
  """
  folder = Path(manager.directory) / str(step)
  for name in targets:
    if not (folder / name).is_dir():
      raise unreadable(folder, f"its {name} state is missing")
  args = {k: ocp.args.StandardRestore(tree) for k, tree in targets.items()}
  try:
    for name, target in targets.items():
      _check_shapes(folder / name, target)
    restored = manager.restore(step, args=ocp.args.Composite(**args))
  except Exception as error:
    raise unreadable(folder, error) from error
  return {name: restored[name] for name in targets}


class Checkpointer:
  """Says when to save, saves in the background, and restores."""

  def __init__(
    self,
    workdir: str | Path,
    config: CheckpointConfig,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._clock, self._saved_at = clock, clock()
    self.directory = Path(workdir).absolute() / CHECKPOINTS
    self._config = config
    self._saving = None  # the step being saved; one at a time
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_kept(config),
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

  def due(self, step: int) -> bool:
    """Whether that step is saved whatever the time."""
    every = (self._config.every_steps, self._config.milestone_steps)
    return any(n is not None and step % n == 0 for n in every)

  def late(self) -> bool:
    """Whether the newest save is `every_minutes` old.

    The clock of one process: all must agree before they save.
    """
    minutes = self._config.every_minutes
    if minutes is None:
      return False
    return self._clock() - self._saved_at >= 60 * minutes

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

  def save(self, step: int, items: dict[str, object], host: dict) -> None:
    """Starts saving checkpoint `step`.

    Args:
      items: name -> tree of arrays.
      host: JSON values that `layout.read_host` returns.
    Raises: SaveError where this save, or the one before it that ran in the
      background, could not be written. Older checkpoints stay as they are.
    """
    with together.all_or_none():
      self.wait()  # errors of the save before this one are its own
      needed = _num_bytes(items)
      free = shutil.disk_usage(self.directory).free
      if free < needed:
        raise SaveError(
          f"checkpoint {step} needs {needed / 1e6:.1f} MB but {self.directory} "
          f"has {free / 1e6:.1f} MB free; free some space and run the same "
          f"command again to continue from checkpoint {self.latest_step()}."
        )
    self._saving, self._saved_at = step, self._clock()
    args = {k: ocp.args.StandardSave(tree) for k, tree in items.items()}
    try:
      saved = self._manager.save(
        step, args=ocp.args.Composite(**args, host=ocp.args.JsonSave(host))
      )
    except Exception as error:
      raise self._write_error(step, error) from error
    if not saved and step not in self._manager.all_steps():
      raise SaveError(
        f"checkpoint {step} was not written: {self.directory} holds "
        f"{sorted(self._manager.all_steps())} already, and steps must grow. "
        f"Use another workdir."
      )

  def wait(self) -> None:
    """Returns when every started save is on disk.

    Raises: SaveError as `save`.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._write_error(None, error) from error

  def _write_error(self, step, error) -> SaveError:
    name = "a checkpoint" if step is None else f"checkpoint {step}"
    reason = str(error).strip().splitlines()
    saved = sorted(self._manager.all_steps())
    newest = (
      f"The newest checkpoint is {saved[-1]}"
      if saved
      else "There is no checkpoint yet"
    )
    return SaveError(
      f"{name} could not be written under {self.directory}: "
      f"{reason[0] if reason else type(error).__name__}. {newest}; when that "
      f"is repaired, run the same command again to continue."
    )

  def restore(self, step: int, targets: dict[str, object]) -> dict[str, object]:
    """Arrays of checkpoint `step`; arguments and errors as `read_items`."""
    return read_items(self._manager, step, targets)

  def close(self) -> None:
    self._manager.close()
