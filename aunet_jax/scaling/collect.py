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
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aunet_jax import config as config_lib
from aunet_jax.aunet import counts
from aunet_jax.scaling import run
from aunet_jax.workdir import layout

NUMBERS_FILE = "numbers.jsonl"


# Bits per byte over the lowest the run logged, at its end; and over the median
# of the other seeds of its cell.
DIVERGED_FACTOR, PEER_FACTOR = 1.2, 1.2


# Settings a run may have otherwise than its plan without being another run.
FREE_SETTINGS = ("mesh", "checkpoint", "data.cache_dir", "data.num_workers")


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


class Table(NamedTuple):
  """Rows and what they are: keys loss_unit, data_unit, source and others."""

  about: dict
  rows: list[dict]


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
  return read(path)


# ----- a study directory ----------------------------------------------------


def collect(study: Path) -> Table:
  """Every cell of a study, judged.

  Raises: ValueError where the directory is no study.
  """
  about = run.read_about(study)
  rows = []
  for name in about["cells"]:
    try:
      rows.append(_row(run.read_cell(study, name), about))
    except ValueError:
      rows.append(_lost(name))
  # Directories of this machine tell a reader of the table nothing.
  command = re.sub(r"(?<![\w.])/[^\s,]*/(?=[^\s,/]+)", "…/", about["command"])
  description = {
    "loss_unit": "bits per byte",
    "data_unit": "bytes",
    "command": command,
    "data_fingerprint": about["data_fingerprint"],
    "ratio": about["ratio"],
    "versions": about["versions"],
  }
  return Table(description, judge(rows))


# Of cell.json: what tells cells of a model apart, whatever their seeds.
_PLANNED = (
  "budget_flops",
  "params",
  "flops_per_byte",
  "learning_rate",
  "batch_bytes",
)


def _lost(name: str) -> dict:
  """A cell whose plan is gone: not even its model is known."""
  reason = "its cell.json or plan.json is missing or damaged"
  values = dict.fromkeys(("seed", *_PLANNED))
  return _empty(name, "unknown", values) | {"excluded": reason}


def _empty(name: str, model: str, values: dict) -> dict:
  """A row without anything measured."""
  return {
    "id": name,
    "model": model,
    "seed": values["seed"],
    **{key: values[key] for key in _PLANNED},
    "loss": None,
    "heldout_bytes": None,
    "bytes": None,
    "useful_flops": None,
    "padded_flops": None,
    "fill": None,
    "steps": 0,
    "nonfinite_steps": None,
    "planned_data": values.get("data_fingerprint"),
    "packed_data": None,
    "rules": None,
    "capacities": None,
    "splitter": None,
    "tokenizer": values.get("tokenizer"),
    "run": f"cells/{name}",
    "excluded": None,
  }


def _row(cell: run.Cell, about: dict) -> dict:
  values, workdir = cell.values, cell.workdir
  row = _empty(cell.id, values["model"], values)
  try:
    plan = json.loads((workdir / run.PLAN_FILE).read_text())
    ran = json.loads((workdir / "config.json").read_text())
    model = config_lib.from_json(json.dumps(ran)).model
  except FileNotFoundError:
    return row | {"excluded": _unfinished(cell, 0) or "it has no config.json"}
  except ValueError as error:
    return row | {"excluded": f"its config.json is damaged: {error}"}
  logged = layout.read_rows(workdir / layout.METRICS_FILE)
  row |= {"rules": list(model.rules), "capacities": list(model.capacities)}
  try:
    row |= _measured(logged, model, ran["train"]["batch_size"])
    diverged = _divergence(logged)
  except (KeyError, TypeError, ValueError) as error:
    reason = f"its metrics.jsonl is of another run: {error!r}"
    return row | {"excluded": reason}
  row |= _identity(workdir)
  different = _differences(plan, ran)
  other = f"ran another config than planned: {', '.join(different[:3])}"
  row["excluded"] = (
    _unfinished(cell, row["steps"])
    or (other if different else None)
    or _foreign(values["data_fingerprint"], about["data_fingerprint"])
    or diverged
    or (
      None if row["loss"] is not None else "has no held-out figure at its end"
    )
  )
  return row


def _unfinished(cell: run.Cell, steps: int) -> str | None:
  state = run.read_state(cell)
  if state["state"] == "failed":
    return f"failed: {state.get('reason', 'no reason was kept')}"
  if state["state"] != "done" or steps < cell.num_steps:
    return f"has not finished: step {steps} of {cell.num_steps}"
  return None


def _foreign(planned: str | None, study: str | None) -> str | None:
  if planned == study:
    return None
  return f"is of other data: fingerprint {planned}, the study's is {study}"


def _measured(logged: Sequence[dict], model, batch_size: int) -> dict:
  """What a run's log says it read and reached, and the FLOPs of that."""
  steps, rows_seen = 0, 0
  positions = [0.0] * model.num_stages
  values = {}
  for row in logged:
    if "fill" in row:
      rows = (row["step"] - steps) * batch_size
      steps, rows_seen = row["step"], rows_seen + rows
      for i, (fill, capacity) in enumerate(
        zip(row["fill"], model.capacities, strict=True)
      ):
        positions[i] += fill * capacity * rows
      values |= {
        "bytes": row["bytes_seen"],
        "nonfinite_steps": row["nonfinite_total"],
      }
  if not rows_seen:
    return {}
  last = logged[-1] if "heldout_bytes" in logged[-1] else {}
  if last.get("step") == steps:
    loss = last["heldout_bits_per_byte"]
    values["loss"] = loss if _finite(loss) else None
    values["heldout_bytes"] = last["heldout_bytes"]
  return values | {
    "steps": steps,
    "useful_flops": counts.useful_train_flops(model, positions),
    "padded_flops": rows_seen * counts.train_flops_per_row(model),
    "fill": [
      count / (rows_seen * capacity)
      for count, capacity in zip(positions, model.capacities, strict=True)
    ],
  }


def _identity(workdir: Path) -> dict:
  """Hashes of text and splitting in the newest checkpoint; {} without one."""
  numbers = [
    int(folder.name)
    for folder in (workdir / "checkpoints").glob("*")
    if folder.name.isdigit()
  ]
  if not numbers:
    return {}
  path = workdir / "checkpoints" / str(max(numbers)) / "host" / "metadata"
  try:
    host = json.loads(path.read_text())
  except (OSError, ValueError):  # damaged: training, not we, will say so
    return {}
  found = {
    "packed_data": host.get("data_fingerprint"),
    "splitter": host.get("splitter_hash"),
  }
  if host.get("tokenizer_hash") is not None:
    found["tokenizer"] = host["tokenizer_hash"]
  return found


def _differences(plan: dict, ran: dict, at: str = "") -> list[str]:
  """Settings that are not as planned, as `a.b planned -> ran`."""
  lines = []
  for key in sorted(plan.keys() | ran.keys()):
    name = f"{at}.{key}" if at else key
    one, other = plan.get(key), ran.get(key)
    if name in FREE_SETTINGS or one == other:
      continue
    if isinstance(one, dict) and isinstance(other, dict):
      lines += _differences(one, other, name)
    elif name == "model.stages" and len(one or []) == len(other or []):
      for i, pair in enumerate(zip(one, other, strict=True)):
        lines += _differences(*pair, f"{name}[{i}]")
    else:
      lines.append(f"{name} {one} -> {other}")
  return lines


def _divergence(logged: Sequence[dict]) -> str | None:
  """Whether the log ends without a finite loss, or far above its lowest."""
  bits = [row["bits_per_byte"] for row in logged if "fill" in row]
  ends = [row for row in logged if "heldout_bytes" in row][-1:]
  last = ends[0]["heldout_bits_per_byte"] if ends else None
  if (bits and bits[-1] is None) or (ends and not _finite(last)):
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


def _finite(value) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


# ----- what can be compared -------------------------------------------------


def judge(rows: Sequence[dict]) -> list[dict]:
  """Excludes rows that are not like most of the others that are left.

  Planned data and held-out bytes must be those of most runs; rules, splitter,
  tokenizer and packed text those of most runs of the model. The first planned
  run decides a tie. Last, a run whose loss is more than `PEER_FACTOR` times the
  median of the other seeds of its cell, where there are two or more.
  """
  rows = [dict(row) for row in rows]

  def groups_by(*keys):
    groups = {}
    for row in rows:
      groups.setdefault(tuple(str(row.get(k)) for k in keys), []).append(row)
    return list(groups.values())

  of_model = " than the other runs of its model"

  for row in rows:
    if row["excluded"] is None and not _finite(row["loss"]):
      row["excluded"] = "has no finite loss"
  for groups, key, what in (
    ([rows], "planned_data", "is of other data than the other runs"),
    ([rows], "heldout_bytes", "was judged on other held-out text"),
    (groups_by("model"), "rules", "has other splitting rules" + of_model),
    (groups_by("model"), "splitter", "has another splitter" + of_model),
    (groups_by("model"), "tokenizer", "has another tokenizer" + of_model),
    (
      groups_by("model", "capacities"),
      "packed_data",
      "was trained on other text" + of_model,
    ),
  ):
    for group in groups:
      _exclude_minority(group, key, what)
  for cell in groups_by("model", *_PLANNED):
    good = [row for row in cell if row["excluded"] is None]
    if len(good) < 3 or any("seed" not in row for row in good):
      continue
    losses = [row["loss"] for row in good]
    for i, row in enumerate(good):
      median = statistics.median(losses[:i] + losses[i + 1 :])
      if row["loss"] > PEER_FACTOR * median:
        row["excluded"] = (
          f"diverged: {row['loss']:.3f}, the other seeds of its cell "
          f"{median:.3f}"
        )
  return rows


def _exclude_minority(group: Sequence[dict], key: str, what: str) -> None:
  """Marks those of a group that differ from most in `key`.

  A run that does not know is not compared, but that one reads bytes and not
  tokens is known.
  """
  good = [row for row in group if row["excluded"] is None]
  good = [row for row in good if key == "tokenizer" or row.get(key) is not None]
  values = [json.dumps(row.get(key)) for row in good]
  if not values:
    return
  usual = collections.Counter(values).most_common(1)[0][0]
  for row, value in zip(good, values, strict=True):
    if value != usual:
      row["excluded"] = f"{what}: {value}, the others {usual}"


# ----- files ----------------------------------------------------------------


def write(table: Table, path: Path) -> None:
  """One JSON object a line: the description, then the rows."""
  lines = [
    json.dumps(item, ensure_ascii=False) + "\n"
    for item in (table.about, *table.rows)
  ]
  path.write_text("".join(lines), encoding="utf-8")


def read(path: Path) -> Table:
  """Raises: ValueError naming the line that is not what `write` writes."""
  items = []
  for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
    try:
      item = json.loads(line)
      if not isinstance(item, dict):
        raise ValueError("it is no object")
    except ValueError as error:
      raise ValueError(f"{path}, line {number}: {error}") from None
    items.append(item)
  if not items or "loss_unit" not in items[0]:
    raise ValueError(
      f"{path} is no {NUMBERS_FILE}: its first line has no loss_unit. "
      f"`fit STUDY --out=DIR` writes one."
    )
  needed = ("id", "model", "budget_flops", "bytes", "loss", "run", "excluded")
  for number, row in enumerate(items[1:], start=2):
    lacking = [key for key in needed if key not in row]
    if lacking:
      raise ValueError(f"{path}, line {number}: {lacking[0]} is missing.")
  return Table(items[0], judge(items[1:]))


def read_points(path: Path) -> Table:
  """Published points: loss and two of size, data and compute of each.

  C = 6 N D fills in the third, as the literature counts. `COLUMNS` has the
  names that are understood.

  Raises: ValueError naming a missing column, or a row that is no number.
  """
  with path.open(newline="") as file:
    lines = list(csv.DictReader(file))
  if not lines:
    raise ValueError(f"{path} has no rows.")
  names = {
    ours: next((name for name in theirs if name in lines[0]), None)
    for ours, theirs in COLUMNS.items()
  }
  known = [n for n in ("params", "bytes", "budget_flops") if names[n]]
  if names["loss"] is None or len(known) < 2:
    raise ValueError(
      f"{path} has the columns {', '.join(lines[0])}; needed are a loss "
      f"({', '.join(COLUMNS['loss'])}) and two of params, tokens and budget."
    )
  rows = []
  for number, line in enumerate(lines, start=2):
    row = {"id": f"line {number}", "model": "points", "excluded": None}
    for ours, theirs in names.items():
      if theirs is None:
        continue
      row[ours] = line[theirs]
    for key in ("loss", *known):
      try:
        row[key] = float(row[key])
      except ValueError:
        raise ValueError(
          f"{path}, line {number}: {names[key]}={row[key]!r} is no number."
        ) from None
      if not (math.isfinite(row[key]) and row[key] > 0):
        row["excluded"] = f"{names[key]} is {row[key]}"
    if row["excluded"] is None:
      row = {**row, **_third(row)}
    row["flagged"] = row.get("flagged") == "True"
    row["run"] = f"{path.name}, line {number}"
    rows.append(row)
  data = names["bytes"] if names["bytes"] == "bytes" else "tokens"
  about = {
    "loss_unit": "bits per byte"
    if names["loss"] == "bits_per_byte"
    else "loss, as published",
    "data_unit": data,
    "source": path.name,
  }
  return Table(about, rows)


def _third(row: dict) -> dict:
  size, data = row.get("params"), row.get("bytes")
  compute = row.get("budget_flops")
  if size is None:
    size = compute / (6 * data)
  if data is None:
    data = compute / (6 * size)
  if compute is None:
    compute = 6 * size * data
  return {"params": size, "bytes": data, "budget_flops": compute}
