"""What a table of runs says: every fit of every model, and what it cannot say.

The unit of every fit is a `Point`, a model at one budget and size: its seeds
are averaged first, so that three seeds do not pass for three budgets. The
result is what `fits.json` holds, the same for the same table and options on any
one installation; there a point is called a cell. `report.py` draws it and
computes nothing.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
import threadpoolctl
from scipy import stats

from aunet_jax.scaling import fit
from aunet_jax.scaling import law_entry as entries
from aunet_jax.scaling import valleys as parabolas
from aunet_jax.scaling.law_entry import Point
from aunet_jax.scaling.study import Run, Table

FITS_FILE = "fits.json"
DIGITS = 5  # of every number written: more would differ between machines
SIZES = ("flops_per_byte", "params")
MIN_SIZES = 3  # of a budget, for a parabola


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user may choose about fits."""

  size: str | None = None  # N: flops_per_byte or params; None = what is known
  bootstrap: int = 400
  seed: int = 0
  drop: tuple[str, ...] = ()  # ids to leave out
  drop_highest: int = 0  # of every model: the highest losses
  drop_flagged: bool = False  # points that a published table calls outliers

  def __post_init__(self):
    if self.size is not None and self.size not in SIZES:
      raise ValueError(f"--size={self.size}: use {' or '.join(SIZES)}.")
    if self.bootstrap < 50:
      raise ValueError(
        f"--bootstrap={self.bootstrap} is too few for intervals; use 50 or "
        f"more."
      )
    if self.seed < 0 or self.drop_highest < 0:
      raise ValueError("--seed and --drop_highest must be at least 0.")


def analyse(table: Table, options: Options) -> dict:
  """Every fit. Raises: ValueError where no run can be used, or drops name none.

  The result's keys: options, units, excluded, dropped, models, comparison.
  """
  good = [run for run in table.rows if run.excluded is None]
  if not good:
    reasons = "; ".join(f"{run.id} {run.excluded}" for run in table.rows[:3])
    raise ValueError(
      f"no run of the table can be used: {reasons or 'no rows'}."
    )
  size = options.size or (
    "params" if good[0].flops_per_byte is None else "flops_per_byte"
  )
  if any(getattr(run, size) is None for run in good):
    raise ValueError(
      f"--size={size}: the table does not have it; use "
      f"--size={SIZES[1 - SIZES.index(size)]}."
    )
  dropped = _dropped(good, options)
  models: dict[str, list[Run]] = {}
  for run in good:
    if run.id not in dropped:
      models.setdefault(run.model, []).append(run)
  points = {name: _points(runs, size) for name, runs in models.items()}
  # L-BFGS solves systems of a few rows. With several threads most of the time
  # goes into waking them: a minute for what takes three seconds on one.
  with threadpoolctl.threadpool_limits(1, "blas"):
    fits = {name: _model(some, options) for name, some in points.items()}
  measured = all(run.heldout_bytes is not None for run in good)
  result = {
    "options": dataclasses.asdict(options) | {"size": size},
    "units": {
      "loss": table.about.loss_unit,
      "data": table.about.data_unit,
      "size": size,
      "compute": "FLOPs"
      if good[0].useful_flops is None
      else "useful FLOPs run",
    },
    "excluded": [
      {"id": run.id, "reason": run.excluded}
      for run in table.rows
      if run.excluded is not None
    ],
    "dropped": [{"id": k, "reason": v} for k, v in dropped.items()],
    "models": fits,
    # Losses of other data or units cannot be set side by side.
    "comparison": _comparison(points) if measured else [],
  }
  return _rounded(result)


def _dropped(runs: Sequence[Run], options: Options) -> dict[str, str]:
  """id -> why the user's options leave it out of the fits."""
  unknown = set(options.drop) - {run.id for run in runs}
  if unknown:
    raise ValueError(f"--drop: no usable run is called {sorted(unknown)[0]!r}.")
  dropped = {name: "--drop" for name in options.drop}
  if options.drop_flagged:
    for run in runs:
      if run.flagged:
        reason = run.flag_reason or "outlier"
        dropped.setdefault(run.id, f"--drop_flagged: {reason}")
  for model in dict.fromkeys(run.model for run in runs):
    some = [r for r in runs if r.model == model and r.id not in dropped]
    some.sort(key=lambda run: -run.loss)
    for run in some[: options.drop_highest]:
      dropped[run.id] = "--drop_highest: among the highest losses"
  return dropped


def _points(runs: Sequence[Run], size: str) -> list[Point]:
  """Runs that differ in their seed alone, together; smallest budget first."""
  groups: dict = {}
  for run in runs:
    same = (run.budget_flops, getattr(run, size), run.params)
    same += (run.learning_rate, run.batch_bytes)
    groups.setdefault(run.id if run.seed is None else same, []).append(run)
  points = []
  for some in groups.values():
    first, others = some[0], len(some) - 1
    losses = [run.loss for run in some]
    points.append(
      Point(
        name=f"{first.id} (+{others})" if others else first.id,
        ids=[run.id for run in some],
        budget=first.budget_flops,
        size=getattr(first, size),
        data=statistics.mean(run.bytes for run in some),
        compute=statistics.mean(
          run.useful_flops or run.budget_flops for run in some
        ),
        loss=statistics.mean(losses),
        losses=losses,
        swept=first.learning_rate is not None,
      )
    )
  return sorted(points, key=lambda p: (p.budget, p.size, p.name))


def _best_settings(
  points: Sequence[Point],
) -> tuple[list[Point], list[Point]]:
  """(the best point of every budget, size and data; the others of a sweep).

  Points of one budget and size differ in learning rate or batch. Published
  points have neither: all of them are kept.
  """
  best = {}
  for point in points:
    key = (point.budget, point.size) if point.swept else point.name
    if key not in best or point.loss < best[key].loss:
      best[key] = point
  kept = {point.name for point in best.values()}
  return list(best.values()), [p for p in points if p.name not in kept]


def _model(points: Sequence[Point], options: Options) -> dict:
  points, others = _best_settings(points)
  budgets = sorted({point.budget for point in points})
  bootstrap = entries.Bootstrap(options.bootstrap, options.seed)
  return {
    "runs": sum(len(point.ids) for point in points),
    "cells": [_shown(point) for point in points],
    "other_settings": [_shown(point) for point in others],
    "budgets": budgets,
    "power_law": _power_law(points, budgets, fit.least_squares, bootstrap),
    "no_offset": _power_law(points, budgets, fit.no_offset, bootstrap),
    "isoflop": _isoflop(points, budgets, bootstrap),
    "vpnls": _parametric(points, fit.least_squares, bootstrap),
    "huber": _parametric(points, fit.huber, bootstrap),
  }


def _shown(point: Point) -> dict:
  spread = statistics.stdev(point.losses) if len(point.losses) > 1 else None
  return point._asdict() | {"spread": spread}


# ----- the methods ----------------------------------------------------------


def _power_law(points, budgets, function, bootstrap) -> dict:
  if len(points) > len(budgets):
    return entries.not_fitted(
      "budgets have several sizes: see the law through the IsoFLOP valleys."
    )
  needed = 2 if function is fit.no_offset else 3
  if len(points) < needed:
    return entries.not_fitted(
      f"{len(points)} budgets; {needed} parameters need {needed}."
    )
  if len(points) > entries.MANY_BUDGETS and not entries.together(
    points, ("size", "data")
  ):
    return entries.not_fitted(
      "size varies at any compute: these runs are no ladder."
    )
  law, replicates, entry = entries.fit_law(
    function, points, ("compute",), bootstrap
  )
  compute = np.array([point.compute for point in points])
  x = entries.grid(compute, 3.0)
  entry["curve"] = entries.curve(x, law, replicates, x[None])
  if compute.max() < 10 * compute.min():
    entry["warnings"].append(
      f"compute spans a factor of {compute.max() / compute.min():.3g} only; an "
      f"exponent from less than ten does not extrapolate."
    )
  return entry


def _parametric(points, function, bootstrap) -> dict:
  names = ("size", "data")
  if len(points) < 5:
    return entries.not_fitted(
      f"{len(points)} cells; five parameters need five."
    )
  if entries.together(points, names):
    return entries.not_fitted(
      "size and data rise together in these runs, so their shares of the loss "
      "cannot be told apart; plan an IsoFLOP grid (--sizes)."
    )
  law, replicates, entry = entries.fit_law(function, points, names, bootstrap)
  constant = float(
    np.median([point.budget / (point.size * point.data) for point in points])
  )
  entry["compute_per_size_and_data"] = constant
  entry["allocation"] = _allocation(law, replicates, constant)
  if min(law.coefficients) > 0:
    compute = entries.grid(np.array([point.budget for point in points]), 3.0)
    best = fit.allocation(law, constant)
    size = np.exp(best.size_log_factor) * compute**best.size_exponent
    data = compute / (constant * size)
    entry["frontier"] = {"compute": compute, "size": size, "data": data}
    x_KN = np.array([size, data])
    entry["curve"] = entries.curve(compute, law, replicates, x_KN)
  return entry


def _allocation(law, replicates, constant) -> dict:
  """Exponents of the best size and data, with intervals."""
  if min(law.coefficients) <= 0:
    return {}
  best = fit.allocation(law, constant)
  entry = {}
  for name in ("size_exponent", "data_exponent"):
    span = None
    if replicates:
      values = [
        getattr(fit.allocation(one, constant), name) for one in replicates.laws
      ]
      span = fit.interval(
        getattr(best, name), np.array(values), replicates.degrees
      )
    entry[name] = entries.with_interval(getattr(best, name), span)
  return entry


def _isoflop(points, budgets, bootstrap) -> dict:
  warnings, valleys, shown = [], [], []
  for budget in budgets:
    some = [point for point in points if point.budget == budget]
    size, data, loss = entries.columns(some, "size", "data", "loss")
    if len(set(size.tolist())) < MIN_SIZES:
      continue
    one = parabolas.valley(budget, size, data, loss)
    x = entries.grid(size)
    shown.append(
      {
        "budget": budget,
        "sizes": len(set(size.tolist())),
        "best_size": one.best_size if one.problem is None else None,
        "best_data": one.best_data if one.problem is None else None,
        "best_loss": one.best_loss if one.problem is None else None,
        "problem": one.problem,
        "curve": {"x": x, "value": one.loss_at(x)},
        "residuals": [
          {"cell": c.name, "relative": r}
          for c, r in zip(some, loss / one.loss_at(size) - 1, strict=True)
        ],
      }
    )
    if one.problem:
      warnings.append(
        f"the parabola at {budget:.3g} FLOPs {one.problem}; it is left out. "
        f"Add sizes on that side."
      )
    else:
      valleys.append(one)
      if loss.argmin() in (size.argmin(), size.argmax()):
        warnings.append(
          f"at {budget:.3g} FLOPs the lowest loss is at the edge of the sizes."
        )
  if not shown:
    return entries.not_fitted(
      f"no budget has {MIN_SIZES} sizes; plan an IsoFLOP grid (--sizes)."
    )
  if len(shown) < len(budgets):
    warnings.append(
      f"{len(budgets) - len(shown)} budgets have fewer than {MIN_SIZES} sizes."
    )
  entry = {"valleys": shown, "warnings": warnings}
  if len(valleys) < 2:
    warnings.append("fewer than two valleys: no law of allocation.")
    return entry
  return entry | _valley_laws(valleys, bootstrap, warnings)


def _valley_laws(valleys, bootstrap, warnings) -> dict:
  """Power laws of the best size, data and loss through the valleys."""
  compute = np.array([one.compute for one in valleys])
  size = np.array([one.best_size for one in valleys])
  data = np.array([one.best_data for one in valleys])
  loss = np.array([one.best_loss for one in valleys])
  line = parabolas.valley_line(
    valleys, number=bootstrap.number, seed=bootstrap.seed
  )
  factor, exponent, span = line.log_factor, line.exponent, line.interval
  data_factor, data_exponent = parabolas.power_line(compute, data)
  data_span, entry = None, {}
  if not line.degrees:
    warnings.append("no budget has more than three sizes: no intervals.")
  if line.without_valley > 0.1:
    warnings.append(
      f"{line.without_valley:.0%} of the redrawn parabolas have no lowest "
      f"point: the valleys are too shallow for their noise."
    )
  if line.scatter > 1:
    warnings.append(
      f"the valleys scatter {line.scatter:.2g} times as much about a power law "
      f"as their noise explains; intervals are widened by that."
    )
  if span is not None:
    # Data is compute over size: what one exponent gains the other loses.
    data_span = (
      data_exponent - (span[1] - exponent),
      data_exponent + (exponent - span[0]),
    )
    entry = {
      "resampled": "residuals",
      "degrees_of_freedom": line.degrees,
      "valley_intervals": [
        {"budget": one.compute, "low": low, "high": high}
        for one, (low, high) in zip(valleys, line.valley_intervals, strict=True)
      ],
    }
    if span[0] <= 0 <= span[1]:
      warnings.append("the interval of the size exponent spans 0.")
  if len(valleys) == 2:
    warnings.append("two valleys fix the allocation exactly: no check of it.")
  x = entries.grid(compute, 3.0)
  best = np.exp(factor) * x**exponent
  return entry | {
    "allocation": {
      "size_exponent": entries.with_interval(exponent, span),
      "data_exponent": entries.with_interval(data_exponent, data_span),
    },
    "frontier": {
      "compute": x,
      "size": best,
      "data": np.exp(data_factor) * x**data_exponent,
    },
    "loss_law": _loss_law(compute, loss, bootstrap),
    "heldout": _heldout_valley(compute, size, loss),
  }


def _loss_law(compute, loss, bootstrap) -> dict:
  """Loss at the bottoms of the valleys against compute."""
  if compute.size < 3:
    return entries.not_fitted(
      f"{compute.size} valleys; three parameters need three."
    )
  points = [
    Point(f"valley at {c:.3g} FLOPs", [], c, 1.0, 1.0, c, float(v), [float(v)])
    for c, v in zip(compute, loss, strict=True)
  ]
  law, replicates, entry = entries.fit_law(
    fit.least_squares, points, ("compute",), bootstrap
  )
  x = entries.grid(compute, 3.0)
  entry["curve"] = entries.curve(x, law, replicates, x[None])
  return entry


def _heldout_valley(compute, size, loss) -> dict | None:
  """The best size at the largest budget, from the lines of the others."""
  if compute.size < 3:
    return None
  factor, exponent = parabolas.power_line(compute[:-1], size[:-1])
  predicted = math.exp(factor) * compute[-1] ** exponent
  return {
    "budget": compute[-1],
    "best_size": size[-1],
    "predicted_size": predicted,
    "relative_error": predicted / size[-1] - 1,
  }


# ----- models side by side --------------------------------------------------


def _comparison(points: dict[str, list[Point]]) -> list[dict]:
  """The best point of every model at every budget that two or more share."""
  budgets = sorted({c.budget for some in points.values() for c in some})
  rows = []
  for budget in budgets:
    best = {}
    for name, some in points.items():
      here = [point for point in some if point.budget == budget]
      if here:
        best[name] = min(here, key=lambda point: point.loss)
    if len(best) < 2:
      continue
    reference = next(iter(best))
    row = {"budget": budget, "reference": reference, "models": {}}
    for name, point in best.items():
      row["models"][name] = {
        "cell": point.name,
        "loss": entries.with_interval(point.loss, _mean_interval(point.losses)),
        "difference": entries.with_interval(
          point.loss - best[reference].loss,
          _difference_interval(point.losses, best[reference].losses),
        )
        if name != reference
        else None,
      }
    rows.append(row)
  return rows


def _mean_interval(losses: Sequence[float]) -> tuple[float, float] | None:
  if len(losses) < 2:
    return None
  error = statistics.stdev(losses) / math.sqrt(len(losses))
  reach = stats.t.ppf((1 + fit.CONFIDENCE) / 2, len(losses) - 1) * error
  middle = statistics.mean(losses)
  return middle - reach, middle + reach


def _difference_interval(one, other) -> tuple[float, float] | None:
  """Welch's, of two means of seeds."""
  if len(one) < 2 or len(other) < 2:
    return None
  parts = [statistics.variance(v) / len(v) for v in (one, other)]
  if sum(parts) == 0:
    return None
  degrees = sum(parts) ** 2 / sum(
    part**2 / (len(v) - 1) for part, v in zip(parts, (one, other), strict=True)
  )
  reach = stats.t.ppf((1 + fit.CONFIDENCE) / 2, degrees) * math.sqrt(sum(parts))
  middle = statistics.mean(one) - statistics.mean(other)
  return middle - reach, middle + reach


# ----- numbers to write -----------------------------------------------------


def _rounded(value):
  """The same as plain JSON, floats to `DIGITS`; None for what is not finite."""
  if isinstance(value, dict):
    return {key: _rounded(item) for key, item in value.items()}
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, list | tuple):
    return [_rounded(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float):
    if not math.isfinite(value):
      return None
    return float(f"{value:.{DIGITS}g}")
  return value
