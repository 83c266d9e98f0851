"""Orbax checkpoints of a run: parameters, optimizer, data position, config.

A workdir holds `config.json` (the Config) and `checkpoints/STEP/` with three
items: `params`, `optimizer` (optimizer state and step counters) and `host`
(a JSON dict: data iterator state, byte counts, splitting-rule hash). A
checkpoint becomes visible only when Orbax has committed all of it, with the
manifest that tells later whether its files are still as they were written: by
renaming its folder, in a bucket by a last object (`buckets.COMMITTED`).
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from aunet_jax.config import CheckpointConfig
from aunet_jax.workdir import buckets, manifest, together
from aunet_jax.workdir.buckets import BucketPath
from aunet_jax.workdir.layout import (
  CHECKPOINTS,
  CheckpointError,
  SaveError,
  steps,
  unreadable,
)

# ----- which checkpoints are undamaged --------------------------------------


def newest_undamaged(
  workdir: Path | BucketPath,
  last: int | None = None,
  items: Collection[str] | None = None,
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
  workdir: str | Path | BucketPath,
  say: Callable[[str], None],
  last: int | None = None,
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
  workdir, step = buckets.path(workdir), None
  with together.all_or_none():
    if jax.process_index() == 0:
      step, damaged = newest_undamaged(workdir, last)
      _set_aside(workdir / CHECKPOINTS, damaged, say)
  code = together.broadcast(-1 if step is None else step)
  step = code if code >= 0 else None
  if step is not None and jax.process_index() == 0:
    folder = workdir / CHECKPOINTS / str(step)
    if not (folder / manifest.FILE).exists():
      say(
        f"checkpoint {step} has no {manifest.FILE} (an older version wrote "
        f"it): its files are taken unchecked"
      )
  return step


def _set_aside(
  directory: Path | BucketPath,
  damaged: dict[int, str],
  say: Callable[[str], None],
) -> None:
  for step, reason in damaged.items():
    aside = directory / f"damaged-{step}"
    if isinstance(aside, BucketPath):
      aside.rmtree()
    elif aside.is_dir() and not aside.is_symlink():
      shutil.rmtree(aside)  # the same step, damaged before
    else:
      aside.unlink(missing_ok=True)
    (directory / str(step)).rename(aside)
    say(f"checkpoint {step} skipped: {reason}; it is now {aside}")


# ----- saving and restoring -------------------------------------------------

SETTLE_SECONDS = 5  # for a save to end, where the run has failed


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return (lines or [type(error).__name__])[0].rstrip(".")


def _num_bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept(steps: Collection[int], config: CheckpointConfig) -> set[int]:
  """Those of the steps that stay: the newest ones, and milestones."""
  milestone = config.milestone_steps
  return set(sorted(steps)[-config.keep :]) | {
    step for step in steps if milestone is not None and step % milestone == 0
  }


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
    for path, leaf in leaves
    if getattr(leaf, "shape", None) is not None
  }


def _check_shapes(folder: Path | BucketPath, target) -> None:
  """Compares what is wanted with what lies there, before memory is taken.

  Where one array of a restore fails, Orbax prints pages about the others.

  Raises: ValueError.
  """
  with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
    stored = _shapes(reader.metadata(epath.Path(folder)).tree)
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
  folder = buckets.path(str(manager.directory)) / str(step)
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


class _Listener(logging.Handler):
  """Hears at once of a save in a folder that failed in this process.

  Orbax logs it, and raises it only when all processes have met, which they do
  not for the ten minutes until it gives up.
  """

  THREAD = "async_save"  # Orbax's name of the one that writes

  def __init__(self, folder: str, hear: Callable[[BaseException], None]):
    super().__init__(logging.ERROR)
    self._folder, self._hear = f"{folder}/", hear

  def emit(self, record: logging.LogRecord) -> None:
    if record.threadName == self.THREAD and record.exc_info:
      if self._folder in record.getMessage():
        self._hear(record.exc_info[1])


class Checkpointer:
  """Says when to save, saves in the background, and restores.

  A save of several processes is done when all have written their part, and the
  one that failed would be waited for in vain; so each watches its own part,
  and all hear of it (`wait`, `failed`).
  """

  def __init__(
    self,
    workdir: str | Path | BucketPath,
    config: CheckpointConfig,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._clock, self._saved_at = clock, clock()
    self.directory = buckets.path(workdir).absolute() / CHECKPOINTS
    self._in_bucket = isinstance(self.directory, BucketPath)
    self._config = config
    self._saving = None  # the step being saved; one at a time
    self._watch, self._failure = None, None  # of that save
    self._deleted, self._complaints = set(), []
    try:
      self._manager = ocp.CheckpointManager(
        str(self.directory),
        options=ocp.CheckpointManagerOptions(
          cleanup_tmp_directories=True,
          async_options=ocp.options.AsyncOptions(
            post_finalization_callback=self._write_manifest
          ),
        ),
      )
    except Exception as error:
      if not self._in_bucket:
        raise
      raise CheckpointError(
        f"{self.directory} cannot be opened: {_first_line(error)}"
      ) from error
    self._listener = _Listener(str(self._manager.directory), self._fail)

  def _write_manifest(self) -> None:
    """Runs in the background, when all of a step is written but not seen."""
    if jax.process_index() == 0:
      suffix = "" if self._in_bucket else ocp.path.atomicity.TMP_DIR_SUFFIX
      manifest.write(self.directory / f"{self._saving}{suffix}")

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
    """The newest checkpoint that is all written."""
    steps = set(self._manager.all_steps())
    alive = self._watch is None or self._watch.is_alive()
    if alive or self._failure is not None:
      steps.discard(self._saving)
    return max(steps, default=None)

  def newest_before(self, step: int) -> int | None:
    """The newest checkpoint of an earlier step, once saves have ended."""
    self.wait()
    there = kept(self._manager.all_steps(), self._config)
    return max((s for s in there if s < step), default=None)

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
    self.wait()  # errors of the save before this one are its own
    with together.all_or_none():
      self._check_room(step, _num_bytes(items))
    self._saving, self._saved_at = step, self._clock()
    self._deleted.discard(step)  # before a roll-back
    args = {k: ocp.args.StandardSave(tree) for k, tree in items.items()}
    logging.getLogger("absl").addHandler(self._listener)
    try:
      saved = self._manager.save(
        step, args=ocp.args.Composite(**args, host=ocp.args.JsonSave(host))
      )
    except Exception as error:
      self._deafen()
      raise self._write_error(step, error) from error
    self._watch_save()
    if not saved and step not in self._manager.all_steps():
      raise SaveError(
        f"checkpoint {step} was not written: {self.directory} holds "
        f"{sorted(self._manager.all_steps())} already, and steps must grow. "
        f"Use another workdir."
      )

  def _check_room(self, step: int, num_bytes: int) -> None:
    """Whether there is room, or the bucket lets this process write.

    Here all processes hear of it; inside Orbax the others would wait.
    """
    if self._in_bucket:
      probe = self.directory.parent / f".writing-{jax.process_index()}"
      try:
        probe.write_bytes(str(step).encode())
        probe.unlink(missing_ok=True)
      except buckets.BucketError as error:
        raise self._write_error(step, error) from error
      return
    free = shutil.disk_usage(self.directory).free
    if free < num_bytes:
      raise SaveError(
        f"checkpoint {step} needs {num_bytes / 1e6:.1f} MB but "
        f"{self.directory} has {free / 1e6:.1f} MB free; free some space and "
        f"run the same command again to continue from checkpoint "
        f"{self.latest_step()}."
      )

  def _watch_save(self) -> None:
    """Waits for this process's part of the save, beside the training."""

    def watch():
      try:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._delete_old()
      except Exception as error:
        self._fail(error)
      self._deafen()

    self._watch = threading.Thread(target=watch, daemon=True)
    self._watch.start()

  def _delete_old(self) -> None:
    """Deletes what is not kept; what cannot go is tried after the next save.

    Orbax would end the run where it cannot.
    """
    if jax.process_index() != 0:
      return
    there, stuck = set(self._manager.all_steps()) - self._deleted, []
    for step in sorted(there - kept(there, self._config)):
      folder = self.directory / str(step)
      try:
        if self._in_bucket:
          folder.rmtree()
        elif folder.exists():
          shutil.rmtree(folder)
        self._deleted.add(step)
      except OSError as error:
        stuck.append(f"{step} ({_first_line(error)})")
    if stuck:
      self._complaints.append(
        f"{len(stuck)} old checkpoint{'s' * (len(stuck) > 1)} could not be "
        f"deleted: {', '.join(stuck)}; tried again after the next save"
      )

  def complaints(self) -> list[str]:
    """What went wrong since the last call, and ends no run."""
    taken, self._complaints = self._complaints, []
    return taken

  def _deafen(self) -> None:
    logging.getLogger("absl").removeHandler(self._listener)

  def _fail(self, error: BaseException) -> None:
    if self._failure is None:
      self._failure = self._write_error(self._saving, error)

  def failed(self) -> bool:
    """Whether this process could not write its part of the newest save."""
    return self._failure is not None

  def settle(self) -> None:
    """Gives a save that has begun the time to end, with or without success."""
    if self._watch is not None:
      alone = jax.process_count() == 1
      self._watch.join(None if alone else SETTLE_SECONDS)

  def wait(self) -> None:
    """Returns when every started save is on disk. All processes must call it.

    Raises: SaveError as `save`.
    """
    if self._watch is None:
      return
    if jax.process_count() == 1:
      self._watch.join()
    pause = 0.01
    while jax.process_count() > 1:
      states = together.gather(2 * self.failed() + (not self._watch.is_alive()))
      if max(states) > 1 or min(states) == 1:
        break
      time.sleep(pause)
      pause = min(2 * pause, 1.0)
    self.raise_failure()
    self._watch = self._saving = None

  def raise_failure(self) -> None:
    """Raises: what failed here or in another process, if anything did."""
    with together.all_or_none():
      if self._failure is not None:
        raise self._failure

  def _write_error(self, step, error) -> SaveError:
    saved = sorted(s for s in self._manager.all_steps() if s != step)
    newest = (
      f"The newest checkpoint is {saved[-1]}"
      if saved
      else "There is no checkpoint yet"
    )
    return SaveError(
      f"checkpoint {step} could not be written under {self.directory}: "
      f"{_first_line(error)}. {newest}; when that is repaired, run the same "
      f"command again to continue."
    )

  def restore(self, step: int, targets: dict[str, object]) -> dict[str, object]:
    """Arrays of checkpoint `step`; arguments and errors as `read_items`."""
    return read_items(self._manager, step, targets)

  def close(self) -> None:
    self._manager.close()
