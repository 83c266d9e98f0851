"""What a study reached, as one table: from its directory, or read again.

A table is a list of flat rows, one a run, and a description. `numbers.jsonl`
holds it, description first; fits, figures and report are made from that file
alone. A run that cannot be compared stays in the table with the reason in
`excluded`, and is never averaged in. It is excluded when it

  has not finished      no state.json, failed, or no held-out figure at the end
  ran something else    its config is not its plan; other data than the study's
  diverged              see `_divergence` and `PEER_FACTOR`
  is not like others    other data, held-out text, splitting or tokenizer than
                        most runs (`judge`)
"""

import collections
import csv
import dataclasses
import itertools
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from aunet_jax import config as config_lib
from aunet_jax.aunet import counts
from aunet_jax.config import ModelConfig
from aunet_jax.scaling import study
from aunet_jax.scaling.study import (
  NUMBERS_FILE,
  PLANNED,
  About,
  Description,
  Logged,
  Run,
  Table,
)
from aunet_jax.train.changes import changed_fields
from aunet_jax.workdir import layout

# Bits per byte over the lowest the run logged, at its end; and over the median
# of the other seeds of its cell.
DIVERGED_FACTOR, PEER_FACTOR = 1.2, 1.2

# Columns of published tables: what we call it -> what it is called elsewhere.
COLUMNS = {
  "loss": ("loss", "bits_per_byte"),
  "params": ("params", "Model Size"),
  "flops_per_byte": ("flops_per_byte",),
  "bytes": ("bytes", "tokens", "Training Tokens"),
  "budget_flops": ("budget", "budget_flops", "compute", "Training FLOP"),
  "model": ("experiment", "model"),
  "id": ("id",),
  "flagged": ("outlier",),
  "flag_reason": ("reason",),
}


def load(path: Path) -> Table:
  """A study directory, a numbers file or a CSV of published points.

  Raises: ValueError for what is none of them.
  """
  if path.is_dir():
    return collect(path)
  if not path.exists():
    raise ValueError(
      f"{path} does not exist; give a study directory, a {NUMBERS_FILE} or a "
      f".csv of points."
    )
  if path.suffix == ".csv":
    return read_points(path)
  table = study.read_table(path)
  return table._replace(rows=judge(table.rows))


# ----- a study directory ----------------------------------------------------


def collect(directory: Path) -> Table:
  """Every run of a study, judged.

  Raises: ValueError where the directory is no study.
  """
  about = study.read_about(directory)
  runs = [_collected(directory, name, about) for name in about.cells]
  # Directories of this machine tell a reader of the table nothing.
  command = re.sub(r"(?<![\w.])/[^\s,]*/(?=[^\s,/]+)", "…/", about.command)
  description = Description(
    loss_unit="bits per byte",
    data_unit="bytes",
    command=command,
    data_fingerprint=about.data_fingerprint,
    ratio=about.ratio,
    versions=about.versions,
  )
  return Table(description, judge(runs))


def _collected(directory: Path, name: str, about: About) -> Run:
  """What one run reached, or why that cannot be said."""
  try:
    planned = study.read_run(directory, name)
  except ValueError as error:
    reason = f"its cell.json or plan.json is missing or damaged: {error}"
    reason = reason.replace(f"{directory}/", "")
    return Run(
      id=name, model="unknown", budget_flops=None, loss=None, bytes=None,
      run=f"cells/{name}", excluded=reason,
    )  # fmt: skip
  workdir = directory / planned.run
  run = dataclasses.replace(
    planned, bytes=None, useful_flops=None, padded_flops=None, fill=None,
    steps=0,
  )  # fmt: skip

  def out(reason):
    if reason is not None:
      reason = reason.replace(f"{directory}/", "")
    return dataclasses.replace(run, excluded=reason)

  try:
    plan, ran = (
      config_lib.from_json(study.read_text(workdir / file))
      for file in (study.PLAN_FILE, layout.CONFIG_FILE)
    )
  except ValueError as error:
    if (workdir / layout.CONFIG_FILE).exists():
      return out(f"its config.json is damaged: {error}")
    return out(_unfinished(planned, run, workdir) or "it has no config.json")
  run = dataclasses.replace(
    run, rules=ran.model.rules, capacities=ran.model.capacities
  )
  try:
    log = study.read_log(workdir)
    run = dataclasses.replace(
      run, **_measured(log, ran.model, ran.train.batch_size)
    )
  except ValueError as error:
    return out(f"its metrics.jsonl is of another run: {error}")
  run = dataclasses.replace(run, **_identity(workdir))
  return out(
    _unfinished(planned, run, workdir)
    or _changed(plan, ran)
    or _foreign(run.planned_data, about.data_fingerprint)
    or _divergence(log)
    or (None if run.loss is not None else "has no held-out figure at its end")
  )


def _unfinished(planned: Run, run: Run, workdir: Path) -> str | None:
  state = study.read_state(workdir)
  if state.state == "failed":
    return f"failed: {state.reason or 'no reason was kept'}"
  if state.state != "done" or run.steps < planned.steps:
    return f"has not finished: step {run.steps} of {planned.steps}"
  return None


def _changed(plan: config_lib.Config, ran: config_lib.Config) -> str | None:
  """What was trained otherwise than planned and makes it another run."""
  forbidden, allowed = changed_fields(plan, ran)
  # To continue a run for longer is allowed; it then spends another budget.
  forbidden += [line for line in allowed if line.startswith("train.num_steps")]
  if not forbidden:
    return None
  return f"ran another config than planned: {', '.join(forbidden[:3])}"


def _foreign(planned: str | None, study: str | None) -> str | None:
  if planned == study:
    return None
  return f"is of other data: fingerprint {planned}, the study's is {study}"


def _measured(log: Sequence[Logged], model: ModelConfig, batch_size: int):
  """Columns of what a run's log says it read and reached, and its FLOPs.

  Raises: ValueError where the log is of another model.
  """
  rows = [row for row in log if row.fill is not None]
  if not rows or rows[-1].step < 1:
    return {}
  last, positions = rows[-1], [0.0] * model.num_stages
  if last.bytes_seen is None:
    raise ValueError(f"step {last.step} has no bytes_seen")
  for before, row in itertools.pairwise([Logged(step=0), *rows]):
    for i, (fill, capacity) in enumerate(
      zip(row.fill, model.capacities, strict=True)
    ):
      positions[i] += fill * capacity * (row.step - before.step) * batch_size
  num_rows = last.step * batch_size
  end = log[-1]
  if end.step != last.step or end.heldout_bytes is None:
    end = Logged(step=last.step)
  return {
    "bytes": last.bytes_seen,
    "nonfinite_steps": last.nonfinite_total,
    "loss": end.heldout_bits_per_byte,
    "heldout_bytes": end.heldout_bytes,
    "steps": last.step,
    "useful_flops": counts.useful_train_flops(model, positions),
    "padded_flops": num_rows * counts.train_flops_per_row(model),
    "fill": tuple(
      count / (num_rows * capacity)
      for count, capacity in zip(positions, model.capacities, strict=True)
    ),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Host:
  """What a checkpoint says of the text and the splitting behind it."""

  data_fingerprint: str | None = None
  splitter_hash: str | None = None
  tokenizer_hash: str | None = None


def _identity(workdir: Path) -> dict:
  """Columns of the newest checkpoint's hashes; {} without one."""
  steps = layout.steps(workdir)
  if not steps:
    return {}
  folder = workdir / layout.CHECKPOINTS / str(steps[-1])
  try:
    host = study.read_record(_Host, folder / "host" / "metadata")
  except ValueError:  # damaged: training, not we, will say so
    return {}
  found = {"packed_data": host.data_fingerprint, "splitter": host.splitter_hash}
  if host.tokenizer_hash is not None:
    found["tokenizer"] = host.tokenizer_hash
  return found


def _divergence(log: Sequence[Logged]) -> str | None:
  """Whether the log ends without a finite loss, or far above its lowest."""
  bits = [row.bits_per_byte for row in log if row.fill is not None]
  ends = [row for row in log if row.heldout_bytes is not None][-1:]
  last = ends[0].heldout_bits_per_byte if ends else None
  if (bits and bits[-1] is None) or (ends and last is None):
    return "diverged: its last loss is not finite"
  lowest = min((b for b in bits if b is not None), default=math.inf)
  if last is not None and last > DIVERGED_FACTOR * lowest:
    # Held-out text may be harder than the training text all along.
    end = statistics.median([b for b in bits if b is not None][-3:])
    if end > DIVERGED_FACTOR * lowest:
      return (
        f"diverged: its training loss ended at {end:.3f} bits per byte and had "
        f"been {lowest:.3f}"
      )
  return None


# ----- what can be compared -------------------------------------------------


def judge(runs: Sequence[Run]) -> list[Run]:
  """Excludes runs that are not like most of the others that are left.

  Planned data and held-out bytes must be those of most runs; rules, splitter,
  tokenizer and packed text those of most runs of the model. The first planned
  run decides a tie. Last, a run whose loss is more than `PEER_FACTOR` times the
  median of the other seeds of its cell, where there are two or more.
  """
  runs = list(runs)

  def exclude(i, reason):
    runs[i] = dataclasses.replace(runs[i], excluded=reason)

  def groups_by(*names):
    """Numbers of the runs that are left, by what they have in common."""
    groups = {}
    for i, run in enumerate(runs):
      if run.excluded is None:
        key = tuple(getattr(run, name) for name in names)
        groups.setdefault(key, []).append(i)
    return groups.values()

  for i, run in enumerate(runs):
    if run.excluded is None and run.loss is None:
      exclude(i, "has no finite loss")
  of_model = " than the other runs of its model"
  for shared, column, what in (
    ((), "planned_data", "is of other data than the other runs"),
    ((), "heldout_bytes", "was judged on other held-out text"),
    (("model",), "rules", "has other splitting rules" + of_model),
    (("model",), "splitter", "has another splitter" + of_model),
    (("model",), "tokenizer", "has another tokenizer" + of_model),
    (
      ("model", "capacities"),
      "packed_data",
      "was trained on other text" + of_model,
    ),
  ):
    for group in groups_by(*shared):
      for i, reason in _minority(runs, group, column):
        exclude(i, f"{what}: {reason}")
  for group in groups_by("model", *PLANNED):
    if len(group) < 3 or any(runs[i].seed is None for i in group):
      continue
    for i in group:
      loss = runs[i].loss
      median = statistics.median(runs[k].loss for k in group if k != i)
      if loss > PEER_FACTOR * median:
        reason = f"{loss:.3f}, the other seeds of its cell {median:.3f}"
        exclude(i, f"diverged: {reason}")
  return runs


def _minority(
  runs: Sequence[Run], group: Sequence[int], column: str
) -> list[tuple[int, str]]:
  """(number, how it differs) of the runs that differ from most in a column.

  Runs in which it is not known are not compared; only `tokenizer` is known by
  its absence: None means that the model reads bytes.
  """
  values = {i: getattr(runs[i], column) for i in group}
  if column != "tokenizer":
    values = {i: value for i, value in values.items() if value is not None}
  if not values:
    return []
  usual = collections.Counter(values.values()).most_common(1)[0][0]
  return [
    (i, f"{json.dumps(value)}, the others {json.dumps(usual)}")
    for i, value in values.items()
    if value != usual
  ]


# ----- published points -----------------------------------------------------


def read_points(path: Path) -> Table:
  """Published points: loss and two of size, data and compute of each.

  C = 6 N D fills in the third, as the literature counts. `COLUMNS` has the
  names that are understood.

  Raises: ValueError naming a missing column, or a row that is no number.
  """
  try:
    lines = list(csv.DictReader(study.read_text(path).splitlines(True)))
  except csv.Error as error:
    raise ValueError(f"{path} cannot be read: {error}") from None
  if not lines:
    raise ValueError(f"{path} has no rows.")
  theirs = {
    ours: next((name for name in names if name in lines[0]), None)
    for ours, names in COLUMNS.items()
  }
  known = [n for n in ("params", "bytes", "budget_flops") if theirs[n]]
  if theirs["loss"] is None or len(known) < 2:
    raise ValueError(
      f"{path} has the columns {', '.join(map(str, lines[0]))}; needed are a "
      f"loss ({', '.join(COLUMNS['loss'])}) and two of params, tokens and "
      f"budget."
    )
  runs = [
    _point(line, theirs, known, path, number)
    for number, line in enumerate(lines, start=2)
  ]
  bits = theirs["loss"] == "bits_per_byte"
  about = Description(
    loss_unit="bits per byte" if bits else "loss, as published",
    data_unit="bytes" if theirs["bytes"] == "bytes" else "tokens",
    source=path.name,
  )
  return Table(about, runs)


def _point(
  line: dict, theirs: dict, known: Sequence[str], path: Path, number: int
) -> Run:
  """One row. Args: theirs: its columns by ours. known: of size, data, compute.

  Raises: ValueError for what is no number.
  """

  def words(name):
    return line[theirs[name]] if theirs[name] else None

  def value(name):
    try:
      return float(line[theirs[name]])
    except (TypeError, ValueError):
      text = line[theirs[name]]
      raise ValueError(
        f"{path}, line {number}: {theirs[name]}={text!r} is no number."
      ) from None

  excluded, values = None, {}
  for name in ("loss", *known):
    values[name] = value(name)
    if not 0 < values[name] < 1e300:
      excluded = f"{theirs[name]} is {values[name]}"
      values[name] = None
  size, data, compute = map(values.get, ("params", "bytes", "budget_flops"))
  if excluded is None:
    size = size or compute / (6 * data)
    data = data or compute / (6 * size)
    compute = compute or 6 * size * data
  flops = value("flops_per_byte") if theirs["flops_per_byte"] else None
  return Run(
    id=words("id") or f"line {number}",
    model=words("model") or "points",
    loss=values["loss"],
    params=size,
    flops_per_byte=flops,
    bytes=data,
    budget_flops=compute,
    run=f"{path.name}, line {number}",
    excluded=excluded,
    flagged=words("flagged") == "True",
    flag_reason=words("flag_reason"),
  )
