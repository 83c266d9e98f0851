"""A study on disk and as a table: one frozen row a run, checked as it is read.

  study.json            the command, versions, data and its fingerprint
  cells/ID/cell.json    a row: what one run is for, what it is expected to cost
  cells/ID/plan.json    its config, complete; cells/ID is also its workdir
  cells/ID/state.json   what became of it, once it is done or has failed

The same row holds what a run reached once `collect.py` has read its log;
`numbers.jsonl` is a description and such rows. Whatever is read here is checked
against the fields below, and what does not fit is named with file and field.
"""

import dataclasses
import json
import math
import types
import typing
from pathlib import Path

from aunet_jax import files
from aunet_jax.files import write_whole
from aunet_jax.workdir import layout

STUDY_FILE, CELL_FILE, PLAN_FILE = "study.json", "cell.json", "plan.json"
STATE_FILE, NUMBERS_FILE = "state.json", "numbers.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One run of a study, or one published point.

  Fields that say what was read, run and reached are expectations in a plan and
  measured in a table. None = not known. Fields are the columns of a table, in
  its order.
  """

  id: str
  model: str
  seed: int | None = None  # None: a published point, which has no others
  budget_flops: float | None  # without the output head
  params: float | None = None  # without embedding and output head
  flops_per_byte: float | None = None  # without the output head
  learning_rate: float | None = None
  batch_bytes: float | None = None
  loss: float | None  # held-out bits per byte; points: as published
  heldout_bytes: int | None = None
  bytes: float | None  # trained on; points: tokens where they say so
  useful_flops: float | None = None
  padded_flops: float | None = None
  fill: tuple[float, ...] | None = None  # share of each stage's slots
  steps: int | None = None
  nonfinite_steps: int | None = None
  planned_data: str | None = None  # `plan.fingerprint` of the files
  packed_data: str | None = None  # hash of the text that was packed
  rules: tuple[str | None, ...] | None = None
  capacities: tuple[int, ...] | None = None
  splitter: str | None = None  # hash
  tokenizer: str | None = None  # hash; None = the model reads bytes
  run: str  # its directory below the study's; points: the line
  excluded: str | None  # why it cannot be compared
  flagged: bool | None = None  # called an outlier by a published table
  flag_reason: str | None = None
  # Of a plan alone.
  size: float | None = None  # FLOPs per byte over what the ratio asks for
  flops_per_byte_with_head: float | None = None
  ratio: float | None = None  # data to model
  bytes_per_token: float | None = None

  def __post_init__(self):
    for name in _POSITIVE:
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ValueError(f"{name}={value} must be above 0.")


_POSITIVE = (
  "budget_flops", "params", "flops_per_byte", "learning_rate", "batch_bytes",
  "loss", "bytes", "useful_flops", "padded_flops",
)  # fmt: skip

# What every plan has: what tells points of a model apart, whatever their seeds.
PLANNED = (
  "budget_flops", "params", "flops_per_byte", "learning_rate", "batch_bytes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
  """study.json."""

  cells: tuple[str, ...]  # ids
  command: str = ""
  data: str | None = None
  data_fingerprint: str | None = None
  tokenizer: str | None = None
  ratio: float | None = None
  flops_per_second: float | None = None
  versions: dict | None = None
  swept: dict | None = None  # of a sweep: setting -> value, by id


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """state.json, and "waiting" where there is none."""

  state: str = "waiting"  # or "done", "failed"
  status: int | None = None
  reason: str = ""
  seconds_of_last_start: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logged:
  """What studies use of a row of metrics.jsonl; None = not in this row."""

  step: int
  bits_per_byte: float | None = None
  bytes_seen: int | None = None
  bytes_per_second: float | None = None
  nonfinite_total: int | None = None
  fill: tuple[float, ...] | None = None
  heldout_bits_per_byte: float | None = None  # None as well: not finite
  heldout_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
  """The first line of numbers.jsonl."""

  loss_unit: str
  data_unit: str
  command: str | None = None
  data_fingerprint: str | None = None
  ratio: float | None = None
  versions: dict | None = None
  source: str | None = None  # the file that published points are from


class Table(typing.NamedTuple):
  """Rows and what they are."""

  about: Description
  rows: list[Run]


# ----- checked reading ------------------------------------------------------


def read_text(path: Path) -> str:
  """Raises: ValueError naming a file that cannot be read or is no UTF-8."""
  try:
    return path.read_text("utf-8")
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from None


def parse_json(text: str, where: str):
  """Raises: ValueError naming where the text is that does not parse."""
  try:
    return files.parse_json(text)
  except ValueError as error:
    raise ValueError(f"{where} is damaged: {error}") from None


def parse(kind: type, values, where: str):
  """A record of a dataclass from parsed JSON; other keys are left out.

  Raises: ValueError naming the field that is missing, or of another type.
  """
  if not isinstance(values, dict):
    raise ValueError(f"{where} must be an object, not {_short(values)}.")
  found = {}
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    if field.name in values:
      value = values[field.name]
      if not _is(value, hints[field.name]):
        raise ValueError(
          f"{where}: {field.name}={_short(value)} must be "
          f"{_name(hints[field.name])}."
        )
      found[field.name] = tuple(value) if isinstance(value, list) else value
    elif field.default is dataclasses.MISSING:
      raise ValueError(f"{where}: {field.name} is missing.")
  try:
    return kind(**found)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None


def _is(value, kind) -> bool:
  if isinstance(kind, types.UnionType):
    return any(_is(value, one) for one in kind.__args__)
  if typing.get_origin(kind) is tuple:
    return isinstance(value, list) and all(
      _is(item, kind.__args__[0]) for item in value
    )
  if kind in (int, float):  # no NaN, nor what a float cannot hold
    numbers = (int,) if kind is int else (int, float)
    return type(value) in numbers and -1e300 < value < 1e300
  return type(value) is kind


def _name(kind) -> str:
  if isinstance(kind, types.UnionType):
    return " or ".join(_name(one) for one in kind.__args__)
  if typing.get_origin(kind) is tuple:
    return f"a list of {_name(kind.__args__[0])}"
  names = {str: "text", int: "a whole number", float: "a number"}
  names |= {bool: "true or false", dict: "an object", type(None): "null"}
  return names[kind]


def _short(value) -> str:
  text = json.dumps(value)
  return text if len(text) <= 40 else text[:40] + "…"


def read_record(kind: type, path: Path):
  """A file that holds one record. Raises: ValueError naming file and field."""
  return parse(kind, parse_json(read_text(path), str(path)), str(path))


# ----- a study directory ----------------------------------------------------


def read_about(study: Path) -> About:
  """Raises: ValueError where the directory holds no study."""
  if not (study / STUDY_FILE).exists():
    raise ValueError(
      f"{study} has no {STUDY_FILE}; make a study with "
      f"`python -m aunet_jax.scaling plan {study} …`."
    )
  return read_record(About, study / STUDY_FILE)


def read_run(study: Path, name: str) -> Run:
  """One planned run. Raises: ValueError where it is not as it was planned."""
  workdir = study / "cells" / name
  path = workdir / CELL_FILE
  try:
    values = parse_json(read_text(path), str(path))
    plan = parse_json(read_text(workdir / PLAN_FILE), str(workdir / PLAN_FILE))
    if isinstance(values, dict):
      values |= {"id": name, "run": f"cells/{name}"}
      values |= {"loss": None, "excluded": None}
      values["planned_data"] = values.pop("data_fingerprint", None)
      values["steps"] = _num_steps(plan, workdir / PLAN_FILE)
    run = parse(Run, values, str(path))
    for field in ("seed", "bytes", "padded_flops", *PLANNED):
      if getattr(run, field) is None:
        raise ValueError(f"{path}: {field} is missing.")
  except ValueError as error:
    raise ValueError(
      f"{workdir} is not as it was planned ({error}) Restore it, or plan the "
      f"study again in another directory."
    ) from None
  return run


def _num_steps(plan, path: Path) -> int:
  """Of a config, whatever else of it is damaged: training says that itself."""
  try:
    steps = plan["train"]["num_steps"]
  except (TypeError, KeyError):
    steps = None
  if type(steps) is not int or steps < 1:
    raise ValueError(f"{path}: train.num_steps={_short(steps)}.")
  return steps


def read_study(study: Path) -> tuple[About, list[Run]]:
  """The study's description and its runs, cheapest first.

  Raises: ValueError where the directory holds no complete study.
  """
  about = read_about(study)
  runs = [read_run(study, name) for name in about.cells]
  return about, sorted(runs, key=lambda run: (run.padded_flops, run.id))


def write_run(study: Path, run: Run, config_json: str) -> None:
  directory = study / run.run
  directory.mkdir(parents=True, exist_ok=True)
  values = dataclasses.asdict(run)
  for name in ("loss", "run", "excluded", "steps"):  # of no plan
    del values[name]
  values["data_fingerprint"] = values.pop("planned_data")
  known = {k: v for k, v in values.items() if v is not None}
  write_whole(directory / CELL_FILE, json.dumps(known, indent=1) + "\n")
  write_whole(directory / PLAN_FILE, config_json + "\n")


def read_state(workdir: Path) -> State:
  """A torn or damaged state is none: to run again is cheap where it is done."""
  try:
    state = read_record(State, workdir / STATE_FILE)
  except ValueError:
    return State()
  return state if state.state in ("done", "failed") else State()


def write_state(workdir: Path, state: State) -> None:
  text = json.dumps(dataclasses.asdict(state))
  write_whole(workdir / STATE_FILE, text + "\n")


def read_log(workdir: Path) -> list[Logged]:
  """The rows a run has logged.

  Raises: ValueError naming the field that is of another type.
  """
  path = workdir / layout.METRICS_FILE
  rows = []
  for row in layout.read_rows(path):
    finite = {
      key: None if type(v) is float and not math.isfinite(v) else v
      for key, v in row.items()
    }
    rows.append(parse(Logged, finite, f"{path}, step {row['step']}"))
  return rows


# ----- a table --------------------------------------------------------------


def write_table(table: Table, path: Path) -> None:
  """One JSON object a line: the description, then the rows.

  A column that no row knows is left out, but for those that every table has.
  """
  rows = [dataclasses.asdict(run) for run in table.rows]
  always = {
    field.name
    for field in dataclasses.fields(Run)
    if field.default is dataclasses.MISSING
  }
  names = [
    field.name
    for field in dataclasses.fields(Run)
    if field.name in always or any(row[field.name] is not None for row in rows)
  ]
  about = dataclasses.asdict(table.about)
  objects = [{key: v for key, v in about.items() if v is not None}]
  objects += [{name: row[name] for name in names} for row in rows]
  lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in objects]
  write_whole(path, "".join(lines))


def read_table(path: Path) -> Table:
  """Raises: ValueError naming line and field that `write_table` writes not."""
  items: list[tuple[str, object]] = []
  for number, line in enumerate(
    read_text(path).rstrip("\n").split("\n"), start=1
  ):
    where = f"{path}, line {number}"
    items.append((where, parse_json(line, where)))
  first = items[0][1] if items else None
  if not isinstance(first, dict) or "loss_unit" not in first:
    raise ValueError(
      f"{path} is no {NUMBERS_FILE}: its first line has no loss_unit. "
      f"`fit STUDY --out=DIR` writes one."
    )
  runs = []
  for where, item in items[1:]:
    runs.append(parse(Run, item, where))
    for name in ("budget_flops", "bytes"):
      if runs[-1].excluded is None and getattr(runs[-1], name) is None:
        raise ValueError(f"{where}: {name} is missing.")
  return Table(parse(Description, first, f"{path}, line 1"), runs)
