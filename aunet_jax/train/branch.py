"""A run that branches off another one, with another end of its schedule.

`train.branch_from` names the workdir of a run. Parameters, optimizer, step,
position in the data and log go on from one of its checkpoints. Up to there the
two learning rates are the same, which is checked, so the branch is the run that
its own config gives from step 0: to the bit with the schedule of its source, to
float rounding with another, which is another compiled program. One run at a
constant rate so gives a ladder of finished ones (warmup-stable-decay, arXiv
2404.06395 and 2405.18392).
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from aunet_jax.config import Config
from aunet_jax.train import changes, optimizer
from aunet_jax.workdir import buckets, checkpoints, layout, origin, together
from aunet_jax.workdir.buckets import BucketPath

# What a branch may have otherwise: how it ends and how the source began.
_MAY_DIFFER = (
  "optimizer.schedule",
  "optimizer.decay_steps",
  "optimizer.final_ratio",
  "train.num_steps",
  "train.init_from",
  "train.branch_from",
  "train.branch_step",
)


class Branch(NamedTuple):
  """A checkpoint to go on from in another workdir."""

  workdir: Path | BucketPath
  step: int
  host: dict  # JSON values of the checkpoint

  @property
  def origin(self) -> origin.Origin:
    return origin.Origin(self.workdir, self.step, self.host["splitter_hash"])


def find(workdir: Path | BucketPath, config: Config, say) -> Branch:
  """The checkpoint of `train.branch_from` that the run goes on from.

  The newest undamaged one up to which both have the same learning rates, or
  that of `train.branch_step`. Every process must call this.

  Raises: ValueError naming every setting that differs in one line, or the step
    at which the rates part; CheckpointError where there is no such checkpoint.
  """
  source = buckets.path(config.train.branch_from, "train.branch_from")
  with together.all_or_none():
    if source.resolve() == buckets.path(workdir).resolve():
      raise ValueError(
        f"train.branch_from={str(source)!r} is the --workdir itself, which "
        f"goes on from its own checkpoints; name another --workdir."
      )
    there = layout.read_config(source)
    forbidden, _ = changes.changed_fields(there, config)
    found = [f for f in forbidden if f.partition(": ")[0] not in _MAY_DIFFER]
    if found:
      raise ValueError(
        f"train.branch_from={str(source)!r} is another run than this: "
        f"{'; '.join(found)}."
      )
    step = -1
    if jax.process_index() == 0:  # the source may be running, and saving
      step = _choose(source, there, config, say)
  step = together.broadcast(step)
  with together.all_or_none():
    host = layout.read_host(source, step)
    if layout.is_converted(host):
      raise layout.CheckpointError(
        f"train.branch_from={str(source)!r} holds a model without training; "
        f"begin with it by train.init_from."
      )
  return Branch(source, step, host)


def _choose(
  source: Path | BucketPath, there: Config, config: Config, say
) -> int:
  """The step of the checkpoint."""
  named, wanted = f"train.branch_from={str(source)!r}", config.train.branch_step
  steps = layout.steps(source)
  if not steps:
    raise layout.CheckpointError(
      f"{named} has no checkpoint yet; train it first."
    )
  listed = f"its checkpoints are {', '.join(map(str, steps))}"
  if wanted is not None and wanted not in steps:
    raise layout.CheckpointError(
      f"{named} has no checkpoint {wanted}, as train.branch_step asks for; "
      f"{listed}."
    )
  last = steps[-1] if wanted is None else wanted
  shared = shared_steps(there, config, last)
  limit = min(shared, config.train.num_steps - 1)
  if limit < (steps[0] if wanted is None else wanted):
    if shared > limit:
      raise ValueError(
        f"train.num_steps={config.train.num_steps} leaves no step after a "
        f"checkpoint of {named}; {listed}."
      )
    rates = [f"{_rates(c, np.array([shared]))[0]:.3g}" for c in (there, config)]
    raise ValueError(
      f"{named}: the learning rate of step {shared + 1} is {rates[0]} there, "
      f"{rates[1]} here, and a branch needs a checkpoint from before; {listed}."
    )
  step, damaged = checkpoints.newest_undamaged(source, min(last, limit))
  for number, reason in damaged.items():
    if number == wanted:
      raise layout.CheckpointError(
        f"checkpoint {number} of {named} is damaged: {reason}."
      )
    say(f"checkpoint {number} of {source} skipped: {reason}")
  return step


def _rates(config: Config, counts: np.ndarray) -> np.ndarray:
  """Learning rates of these updates."""
  schedule = optimizer.learning_rate_schedule(
    config.optimizer, config.train.num_steps
  )
  return np.broadcast_to(np.asarray(schedule(counts)), counts.shape)


def shared_steps(there: Config, here: Config, last: int) -> int:
  """Steps, at most `last`, that have the same learning rates in both."""
  counts = np.arange(last)
  parted = np.flatnonzero(_rates(there, counts) != _rates(here, counts))
  return int(parted[0]) if parted.size else last


def keep(workdir: Path | BucketPath, branch: Branch, params_hash: str) -> None:
  """Writes WORKDIR/branch_from.json, and the source's log up to there."""
  rows = branch.workdir / layout.METRICS_FILE
  if rows.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    buckets.write_whole(workdir / layout.METRICS_FILE, rows.read_bytes())
    layout.drop_rows_after(workdir / layout.METRICS_FILE, branch.step)
  origin.keep(workdir, branch.origin, params_hash, origin.BRANCH_FILE)
