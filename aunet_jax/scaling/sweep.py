"""Sweeps settings of one config: a study with a cell for every combination.

What differs between the cells is all that they have of their own: `plan` makes
studies of models at equal compute, and `run` and `collect` do not know which of
the two they have. A sweep can be given more values and seeds later; what is
done stays.
"""

import collections
import dataclasses
import itertools
import json
import math
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from aunet_jax import config as config_lib
from aunet_jax.config import Config
from aunet_jax.data import sources
from aunet_jax.files import write_whole
from aunet_jax.scaling import collect, draw, plan, study
from aunet_jax.scaling.plan import Planned
from aunet_jax.scaling.sample import fingerprint
from aunet_jax.scaling.study import Run

CHART_FILE = "sweep.svg"
CASE = "case"  # what --case varies is called


class Axis(NamedTuple):
  """What is varied: a value's name, and the settings that it stands for."""

  name: str
  points: dict[str, tuple[str, ...]]


# ----- what is swept --------------------------------------------------------


def parse_axes(sets: Sequence[str], cases: Sequence[str]) -> list[Axis]:
  """Axes as the command line has them, in its order, cases last.

  Args: sets: "A.B=1,2", or "A.B=0,1;1,1" where values have commas. cases:
    "A.B=1 C.D=2", settings that go together, a point each of one axis.
  Raises: ValueError naming what is none, or is given twice.
  """
  axes = []
  for text in sets:
    name, equals, values = text.partition("=")
    found = values.split(";" if ";" in values else ",")
    found = [value.strip() for value in found if value.strip()]
    if not equals or not name or not found:
      raise ValueError(
        f"--set={text}: write a setting and its values, such as "
        f"--set=optimizer.learning_rate=1e-3,2e-3."
      )
    if len(set(found)) < len(found):
      raise ValueError(f"--set={text} has a value twice; leave one out.")
    axes.append(Axis(name, {v: (f"{name}={v}",) for v in found}))
  points = {}
  for text in cases:
    name, colon, rest = text.partition(":")
    if not colon or "=" in name:
      name, rest = "", text
    settings = shlex.split(rest)
    name = name.strip() or " ".join(map(_short, settings))
    if not settings or not all("=" in setting for setting in settings):
      raise ValueError(
        f"--case={text!r}: write settings that go together, such as "
        f"--case='wide: model.stages[0].dim=64 model.stages[1].dim=128'."
      )
    points[name] = tuple(settings)
  if len(points) < len(cases):
    raise ValueError("two --case have one name; leave one out.")
  if points:
    axes.append(Axis(CASE, points))
  names = [axis.name for axis in axes]
  twice = [name for name in names if names.count(name) > 1]
  if twice:
    raise ValueError(
      f"{twice[0]} is swept by two --set; join the values of both in one."
    )
  if not axes:
    raise ValueError(
      "nothing is swept: give --set=optimizer.learning_rate=1e-3,2e-3, or "
      "settings that go together as --case='… …'."
    )
  return axes


def _short(setting: str) -> str:
  """A setting without the group it is in, but for a stage's number."""
  name, _, value = setting.partition("=")
  *group, last = name.split(".")
  stage = f"{group[-1]}." if group and group[-1].startswith("stages[") else ""
  return f"{stage}{last}={value}"


def _slug(text: str) -> str:
  """Of letters that every file system and shell takes."""
  kept = "".join(c if c.isalnum() or c in "._" else "-" for c in text)
  return re.sub("-+", "-", kept).strip("-")


class Cells(NamedTuple):
  """Planned runs, and what each has of its own: axis -> value, by id."""

  planned: list[Planned]
  swept: dict[str, dict[str, str]]


def make_cells(config: Config, axes: Sequence[Axis], seeds: int) -> Cells:
  """A cell for every combination of values and every seed.

  Args: config: what all have in common; its seed is the first.
  Raises: ValueError naming the cell whose settings do not fit together.
  """
  made, swept = [], {}
  for names in itertools.product(*(axis.points for axis in axes)):
    values = dict(zip([axis.name for axis in axes], names, strict=True))
    own = [s for axis in axes for s in axis.points[values[axis.name]]]
    label = "-".join(
      _slug(value if name == CASE else _short(f"{name}={value}"))
      for name, value in values.items()
    )
    for seed in range(config.seed, config.seed + seeds):
      run_id = f"{label}-s{seed}"
      try:
        one = config_lib.override(config, [*own, f"seed={seed}"])
      except ValueError as error:
        raise ValueError(f"{run_id}: {error}") from None
      paths = (_absolute(p) for p in (one.data.train, one.data.heldout))
      # A row of the log is the mean of several steps: whether a run diverged
      # is judged by it.
      often = f"train.log_every_steps={max(1, one.train.num_steps // 20)}"
      one = plan.Settings(*paths, [often]).apply(one, run_id)
      made.append((run_id, label, one))
      swept[run_id] = values
  counts = collections.Counter(run_id for run_id, _, _ in made)
  twice = [name for name, number in counts.items() if number > 1]
  if twice:
    raise ValueError(
      f"two cells would be called {twice[0]}: their values are alike. Leave "
      f"one out."
    )
  (train, *others) = {json.dumps(one.data.train) for _, _, one in made}
  known = None
  if not others and isinstance(config.data.train, str):
    known = fingerprint(json.loads(train))
  return Cells([_planned(*one, known) for one in made], swept)


def _absolute(paths) -> str | None:
  """None for weighted lists, which stay as they are."""
  return sources.absolute(paths) if isinstance(paths, str) else None


def _planned(
  run_id: str, label: str, config: Config, known: str | None
) -> Planned:
  """Args: label: the id without seed. known: fingerprint of the text."""
  ones = (1.0,) * config.model.num_stages
  columns = plan.expected(config, ones, 1.0)
  run = Run(
    id=run_id,
    run=f"cells/{run_id}",
    model=label,
    budget_flops=columns["flops_per_byte"] * columns["bytes"],
    size=1.0,
    seed=config.seed,
    loss=None,
    excluded=None,
    planned_data=known,
    **columns,
  )
  return Planned(run, config)


# ----- on disk --------------------------------------------------------------


def write(directory: Path, cells: Cells, about: study.About) -> None:
  """Writes a sweep, or adds cells to the one that is there.

  Args: about: without what the cells say of themselves.
  Raises: ValueError where the directory holds another study.
  """
  if (directory / study.STUDY_FILE).exists():
    there = study.read_about(directory)
    plans = {run.id: config for run, config in cells.planned}
    lost = [name for name in there.cells if name not in plans]
    if there.swept is None or lost:
      what = "another study" if there.swept is None else f"the cell {lost[0]}"
      raise ValueError(
        f"{directory} holds {what}, which is not of this sweep. Add values to "
        f"the command that made it ({there.command}), or use another --study."
      )
    for name in there.cells:
      path = directory / "cells" / name / study.PLAN_FILE
      before = config_lib.from_json(study.read_text(path))
      if before != plans[name]:
        raise ValueError(
          f"{directory}: {name} was planned with other settings; use another "
          f"--study, or the command that made it: {there.command}"
        )
  first, config = cells.planned[0]
  about = dataclasses.replace(
    about,
    cells=tuple(cells.swept),
    swept=cells.swept,
    data=config.data.train if first.planned_data else None,
    data_fingerprint=first.planned_data,
  )
  plan.write_cells(directory, cells.planned, about)


# ----- what came of it ------------------------------------------------------


class Point(NamedTuple):
  """The seeds of one combination of values."""

  values: dict[str, str]
  losses: list[float]
  reasons: list[str]  # of runs that cannot be compared

  @property
  def mean(self) -> float | None:
    return statistics.fmean(self.losses) if self.losses else None

  @property
  def half_width(self) -> float | None:
    """Of the 95% interval of the mean, by Student's t; None: one seed."""
    n = len(self.losses)
    if n < 2:
      return None
    error = statistics.stdev(self.losses) / math.sqrt(n)
    return float(stats.t.ppf(0.975, n - 1)) * error


def points(about: study.About, runs: Sequence[Run]) -> list[Point]:
  """Every combination of a sweep, in its order."""
  found: dict[tuple, Point] = {}
  for run in runs:
    values = about.swept[run.id]
    point = found.setdefault(tuple(values.items()), Point(values, [], []))
    if run.excluded is None:
      point.losses.append(run.loss)
    else:
      point.reasons.append(f"seed {run.seed}: {run.excluded}")
  return list(found.values())


def _lines(points_of: Sequence[Point]) -> dict[str, list[Point]]:
  """Points that differ along the first axis alone, by what they share."""
  lines = {}
  for point in points_of:
    _, *others = point.values.items()
    label = ", ".join(v if k == CASE else _short(f"{k}={v}") for k, v in others)
    lines.setdefault(label, []).append(point)
  return lines


def show(points_of: Sequence[Point]) -> str:
  """A line for every combination, then the best value of each line."""
  axis = next(iter(points_of[0].values))
  out, best = [], []
  for label, line in _lines(points_of).items():
    out += [label] if label else []
    out.append(f"  {axis:28}  bits/byte  95% interval    seeds")
    for point in line:
      value = point.values[axis]
      if point.mean is None:
        out.append(f"  {value:28}  {'none':>9}  {point.reasons[0]}")
        continue
      half = point.half_width
      interval = ""
      if half is not None:
        interval = f"{point.mean - half:.3f} to {point.mean + half:.3f}"
      out.append(
        f"  {value:28}  {point.mean:9.3f}  {interval:14}  {len(point.losses):5}"
      )
      out += [f"    without {reason}" for reason in point.reasons]
    known = [point for point in line if point.mean is not None]
    if known and len(line) > 1:
      lowest = min(known, key=lambda point: point.mean)
      text = f"{axis}={lowest.values[axis]} ({lowest.mean:.3f})"
      if lowest in (line[0], line[-1]):
        text += ", at the edge of what was tried"
      best.append(f"best{f' of {label}' if label else ''}: {text}")
  return "\n".join([*out, *best])


def chart(points_of: Sequence[Point]) -> draw.Chart:
  """Bits per byte by the first axis, a line for each combination of others."""
  axis = next(iter(points_of[0].values))
  names = list(dict.fromkeys(point.values[axis] for point in points_of))
  series = []
  for style, (label, line) in enumerate(_lines(points_of).items()):
    known = [point for point in line if point.mean is not None]
    x = [names.index(point.values[axis]) for point in known]
    y = [point.mean for point in known]
    halves = [point.half_width or 0.0 for point in known]
    for kind in ("line", "points"):
      low = high = None
      if kind == "points" and any(halves):
        low = [m - h for m, h in zip(y, halves, strict=True)]
        high = [m + h for m, h in zip(y, halves, strict=True)]
      series.append(draw.Series(label or None, x, y, style, kind, low, high))
  return draw.Chart(
    name="sweep",
    title=f"Held-out bits per byte by {axis}",
    caption="",
    x_label=axis,
    y_label="held-out bits per byte",
    series=series,
    x_log=False,
    y_log=False,
    x_ticks=list(enumerate(names)),
  )


def report(directory: Path) -> str:
  """Writes table and picture; returns what to print.

  Raises: ValueError where the directory holds no sweep.
  """
  about = study.read_about(directory)
  if about.swept is None:
    raise ValueError(
      f"{directory} is no sweep; `scaling fit` reads studies that `plan` made."
    )
  table = collect.collect(directory)
  found = points(about, table.rows)
  study.write_table(table, directory / study.NUMBERS_FILE)
  written = [study.NUMBERS_FILE]
  if any(point.losses for point in found):
    write_whole(directory / CHART_FILE, draw.svg(chart(found)) + "\n")
    written.append(CHART_FILE)
  return f"{show(found)}\nwrote {', '.join(written)} to {directory}"
