"""Orbax checkpoints of a run: parameters, optimizer, data position, config.

A workdir holds `config.json` (the Config) and `checkpoints/STEP/` with three
items: `params`, `optimizer` (optimizer state and step counters) and `host`
(a JSON dict: data iterator state, byte counts, splitting-rule hash). A
checkpoint becomes visible only when Orbax has committed all of it, with the
manifest that tells later whether its files are still as they were written.
"""

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from aunet_jax import config as config_lib
from aunet_jax import manifest, sharding
from aunet_jax.aunet import AUNet
from aunet_jax.config import Config
from aunet_jax.splitting import Splitter
from aunet_jax.state import TrainState, init_params
from aunet_jax.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"  # a copy; only where the model reads tokens
CHECKPOINTS = "checkpoints"

# Settings that do not change what is learned from which bytes. Everything
# else must equal the workdir's own config when a run continues.
FREE_FIELDS = (
  "mesh.",
  "checkpoint.",
  "data.cache_dir",
  "data.num_workers",
  "data.tokenizer",  # its content is compared, wherever the file is
  "data.max_skip_fraction",
  "train.log_every_steps",
  "train.eval_every_steps",
  "train.eval_bytes",
  "train.sample_",
  "train.tensorboard",
  "train.grad_accumulation",
  "train.max_nonfinite_steps",
  "train.max_roll_backs",
  "train.spike_sigmas",
  "model.unroll_layers",
)
FREE_STAGE_FIELDS = ("remat", "attention")


class CheckpointError(RuntimeError):
  """A checkpoint cannot be written or read; the message says what to do."""


# ----- config.json ----------------------------------------------------------


def _flatten(value, path="") -> dict[str, object]:
  if isinstance(value, dict):
    items = [(f"{path}.{key}" if path else key, v) for key, v in value.items()]
  elif isinstance(value, list | tuple) and "stages" in path:
    items = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
  else:
    return {path: list(value) if isinstance(value, tuple) else value}
  return {k: v for key, item in items for k, v in _flatten(item, key).items()}


def changed_fields(old: Config, new: Config) -> tuple[list[str], list[str]]:
  """Differences that forbid continuing a run, and those that are allowed.

  Returns: two lists of lines such as "seed: 0 -> 1".
  """
  before = _flatten(dataclasses.asdict(old))
  after = _flatten(dataclasses.asdict(new))
  forbidden, allowed = [], []
  for field in sorted(before.keys() | after.keys()):
    a, b = before.get(field), after.get(field)
    if a == b:
      continue
    line = f"{field}: {a!r} -> {b!r}"
    longer = field == "train.num_steps" and b > a
    free = field.startswith(FREE_FIELDS) or (
      field.startswith("model.stages[")
      and field.endswith(tuple(f".{name}" for name in FREE_STAGE_FIELDS))
    )
    (allowed if free or longer else forbidden).append(line)
  return forbidden, allowed


def steps(workdir: str | Path) -> list[int]:
  """Committed checkpoints of a workdir, ascending."""
  directory = Path(workdir) / CHECKPOINTS
  return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


def is_converted(workdir: str | Path, step: int) -> bool:
  """True where that checkpoint is a model without training state.

  Raises: CheckpointError where a part of a run's checkpoint is missing.
  """
  folder = Path(workdir) / CHECKPOINTS / str(step)
  try:
    host = json.loads((folder / "host" / "metadata").read_text())
  except (OSError, ValueError) as error:
    raise _unreadable(folder, error) from error
  if "loader" not in host:
    return True
  if not (folder / "optimizer").is_dir():
    raise _unreadable(folder, "its optimizer state is missing")
  return False


def _unreadable(folder: Path, reason) -> CheckpointError:
  """For a checkpoint without manifest, or one its manifest calls whole."""
  first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
  older = [step for step in steps(folder.parents[1]) if step < int(folder.name)]
  remedy = f"continue from checkpoint {older[-1]}" if older else "start anew"
  return CheckpointError(
    f"checkpoint {folder} cannot be read ({first}); delete that folder to "
    f"{remedy}."
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


def write_config(workdir: str | Path, config: Config) -> None:
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  partial = workdir / (CONFIG_FILE + ".partial")
  partial.write_text(config.to_json() + "\n")
  partial.rename(workdir / CONFIG_FILE)  # whole or not at all


def read_config(workdir: str | Path) -> Config:
  """Raises: CheckpointError where the workdir is missing or not ours."""
  path = Path(workdir) / CONFIG_FILE
  if not Path(workdir).is_dir():
    raise CheckpointError(f"no such workdir: {workdir}")
  if not path.is_file():
    raise CheckpointError(
      f"{workdir} is not a workdir: it has no {CONFIG_FILE}."
    )
  try:
    return config_lib.from_json(path.read_text())
  except ValueError as error:
    raise CheckpointError(f"{path} cannot be read: {error}") from error


# ----- saving and restoring -------------------------------------------------


def _num_bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def say_failed_saves_once() -> None:
  """Keeps the writes that a failed save leaves under way from reporting it.

  Orbax closes its event loop at the first failure, which `save` and `wait`
  raise; every other write then prints that the loop is closed.
  """
  others = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      others(unraisable)

  sys.unraisablehook = hook


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
      raise _unreadable(self.directory / str(step), error) from error
    if converted:
      return abstract.replace(params=restored["params"], opt_state=None), (
        restored["host"]
      )
    state = TrainState(params=restored["params"], **restored["optimizer"])
    return state, restored["host"]

  def close(self) -> None:
    self._manager.close()


def save_params(workdir: str | Path, config: Config, params: dict) -> None:
  """Writes a workdir that holds a model and no training state.

  `generate`, `evaluate` and `train` accept it; training starts at step 0.
  """
  write_config(workdir, config)
  directory = Path(workdir).absolute() / CHECKPOINTS
  with ocp.CheckpointManager(directory) as manager:
    manager.save(
      0,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        host=ocp.args.JsonSave(
          {"splitter_hash": Splitter(config.model.rules).hash}
        ),
      ),
    )
    manager.wait_until_finished()
  manifest.write(directory / "0")


# ----- loading a model ------------------------------------------------------


class Loaded(NamedTuple):
  """A model out of a workdir, ready to apply."""

  model: AUNet
  params: dict
  splitter: Splitter
  config: Config
  step: int
  tokenizer: Tokenizer | None = None  # None: the model reads bytes


def load(workdir: str | Path, mesh: jax.sharding.Mesh | None = None) -> Loaded:
  """Reads the model of the newest whole checkpoint.

  A newer one whose model is damaged is named on stderr, and left as it is.

  Args: mesh: where to put the parameters; None = the first device.
  Raises: CheckpointError where there is no whole checkpoint, or the splitting
    rule of this version of the package, or the workdir's tokenizer.json, is
    not the one the model was trained with.
  """
  config = read_config(workdir)
  directory = Path(workdir).absolute() / CHECKPOINTS
  step, damaged = _newest_whole(Path(workdir), None, ("params", "host"))
  for number, reason in damaged.items():
    print(f"checkpoint {number} skipped: {reason}", file=sys.stderr)
  if step is None:
    raise CheckpointError(
      f"{workdir} has no checkpoint yet; train first, or wait for the first "
      f"save (every {config.checkpoint.every_steps} steps)."
    )
  boxed = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
  if mesh is None:
    mesh = jax.sharding.Mesh(
      np.asarray(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES
    )
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    sharding.unbox(boxed),
    sharding.tree_shardings(boxed, mesh),
  )
  with ocp.CheckpointManager(directory) as manager:
    try:
      restored = manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(target), host=ocp.args.JsonRestore()
        ),
      )
    except Exception as error:
      raise _unreadable(directory / str(step), error) from error
  splitter = Splitter(config.model.rules)
  check_splitter(restored["host"], splitter)
  # The kernels it was trained with may not run on the devices here.
  config = dataclasses.replace(
    config, model=config_lib.with_attention(config.model, "auto")
  )
  tokenizer = None
  if config.data.tokenizer is not None:
    try:
      tokenizer = Tokenizer(Path(workdir) / TOKENIZER_FILE)
    except ValueError as error:
      raise CheckpointError(f"the workdir's tokenizer: {error}") from None
  check_tokenizer(restored["host"], tokenizer)
  return Loaded(
    AUNet(config.model), restored["params"], splitter, config, step, tokenizer
  )


def check_tokenizer(host: dict, tokenizer: Tokenizer | None) -> None:
  """Raises: CheckpointError where it is not the one of the training run."""
  trained = host.get("tokenizer_hash")
  given = None if tokenizer is None else tokenizer.hash
  if trained != given:
    name = "bytes" if tokenizer is None else f"{tokenizer.path} (hash {given})"
    raise CheckpointError(
      f"the checkpoint was trained on "
      f"{'bytes' if trained is None else f'tokens of tokenizer {trained}'}, "
      f"but is now given {name}; restore the tokenizer.json it was trained "
      f"with, or use another workdir."
    )


def check_splitter(host: dict, splitter: Splitter) -> None:
  """Raises: CheckpointError where the rules' tables have changed."""
  if host["splitter_hash"] != splitter.hash:
    raise CheckpointError(
      f"the checkpoint was trained with splitting tables "
      f"{host['splitter_hash']}, this version makes {splitter.hash} for the "
      f"same rules: it would split text differently. Use the package version "
      f"that wrote the checkpoint."
    )
