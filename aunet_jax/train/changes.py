"""What may differ between a run and what goes on from it."""

from pathlib import Path

from aunet_jax.config import Config
from aunet_jax.train import optimizer
from aunet_jax.workdir import layout, tables
from aunet_jax.workdir.buckets import BucketPath

# Settings that do not change what is learned from which bytes. Everything
# else must equal the workdir's own config when a run continues.
FREE_FIELDS = (
  "mesh.",
  "checkpoint.",
  "data.cache_dir",
  "data.build_index",
  "data.num_workers",
  "data.tokenizer",  # its content is compared, wherever the file is
  "data.max_skip_fraction",
  "train.log_every_steps",
  "train.eval_every_steps",
  "train.eval_bytes",
  "train.sample_",
  "train.tensorboard",
  "train.wandb",
  "train.grad_accumulation",
  "train.max_nonfinite_steps",
  "train.max_roll_backs",
  "train.spike_sigmas",
  "train.hang_",
  "model.unroll_layers",
)
FREE_STAGE_FIELDS = ("remat", "attention")


def changed_fields(old: Config, new: Config) -> tuple[list[str], list[str]]:
  """Differences that forbid continuing a run, and those that are allowed.

  Returns: two lists of lines such as "seed: 0 -> 1".
  """
  before, after = map(layout.flat_fields, (old, new))
  forbidden, allowed = [], []
  for field in sorted(before.keys() | after.keys()):
    a, b = before.get(field), after.get(field)
    if a == b:
      continue
    line = f"{field}: {a!r} -> {b!r}"
    # The content of a rule's table is compared, wherever the file is.
    moved = field.endswith(".rule") and tables.same_kind(a, b)
    longer = field == "train.num_steps" and b > a
    free = field.startswith(FREE_FIELDS) or (
      field.startswith("model.stages[")
      and field.endswith(tuple(f".{name}" for name in FREE_STAGE_FIELDS))
    )
    (allowed if free or longer or moved else forbidden).append(line)
  return forbidden, allowed


def check_workdir(
  workdir: Path | BucketPath, config: Config, host: dict | None, say
) -> None:
  """Refuses a workdir that another config made, once it has a checkpoint.

  A converted model has no training to continue: there only `model` must agree.

  Args: host: of the checkpoint to go on from; None where there is none.
  Raises: ValueError naming every field that differs.
  """
  if not (workdir / layout.CONFIG_FILE).exists():
    return
  old = layout.read_config(workdir)
  forbidden, allowed = changed_fields(old, config)
  if host is None:
    allowed, forbidden = forbidden + allowed, []
  elif layout.is_converted(host):
    allowed += [line for line in forbidden if not line.startswith("model.")]
    forbidden = [line for line in forbidden if line.startswith("model.")]
  if forbidden:
    raise ValueError(
      f"{workdir} holds a run with another config; use another --workdir, or "
      "undo these changes:\n  " + "\n  ".join(forbidden)
    )
  for line in allowed:
    say(f"changed since the last start: {line}")


JUMP = 1.5  # of the learning rate, that a resume must be told to accept


def check_rate(
  old: Config, config: Config, count: int, accepted: bool, say
) -> None:
  """Compares the learning rates that a run and its continuation give a step.

  A schedule that ends with the run is another one for more steps.

  Args: count: updates made so far. accepted: whether a jump is wanted.
  Raises: ValueError where it jumps and that was not accepted.
  """
  before, after = (
    float(
      optimizer.learning_rate_schedule(c.optimizer, c.train.num_steps)(count)
    )
    for c in (old, config)
  )
  if before == after:
    return
  steps = f"train.num_steps {old.train.num_steps} -> {config.train.num_steps}"
  rates = f"{before:.3g} -> {after:.3g}"
  if max(before, after) <= JUMP * min(before, after) or accepted:
    say(f"learning rate of the next step, with {steps}: {rates}")
    return
  raise ValueError(
    f"{steps} makes the learning rate of the next step jump, {rates} "
    f"({after / before if before else float('inf'):.1f} times), since "
    f"optimizer.schedule={config.optimizer.schedule!r} ends with the run. Add "
    f"--accept_learning_rate to go on like that, branch off an earlier "
    f"checkpoint (train.branch_from), or train in a new workdir with "
    f"schedule='wsd' or 'constant', which can be continued."
  )
