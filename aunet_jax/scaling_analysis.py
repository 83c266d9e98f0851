"""What a table of runs says: every fit of every model, and what it cannot say.

The unit of every fit is a cell, a model at one budget and size: its seeds are
averaged first, so that three seeds do not pass for three budgets. The result
is plain JSON-able data, the same for the same table and options on any one
installation; `scaling_report.py` draws it and computes nothing.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from aunet_jax import scaling_fit as fit
from aunet_jax.scaling_collect import Table

FITS_FILE = "fits.json"
DIGITS = 5  # of every number written: more would differ between machines
CURVE_POINTS = 33
SIZES = ("flops_per_byte", "params")
MIN_SIZES = 3  # of a budget, for a parabola
# Spread of log data that size does not explain, for both to be told apart.
LEAST_SPREAD = 0.2
FEW_DEGREES = 3  # of freedom; below, intervals are mostly Student's t
MANY_BUDGETS = 20  # from which the tenth with most compute is held out
STANDS_OUT = 5.0  # median absolute deviations, as normal standard deviations


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


class Cell(NamedTuple):
  """One model at one budget and size."""

  name: str
  ids: list[str]
  budget: float
  size: float  # N
  data: float  # D
  compute: float  # useful FLOPs run; published points: their budget
  loss: float
  losses: list[float]


def analyse(table: Table, options: Options) -> dict:
  """Every fit. Raises: ValueError where no run can be used, or drops name none.

  The result's keys: options, units, excluded, dropped, models, comparison.
  """
  good = [row for row in table.rows if row["excluded"] is None]
  if not good:
    reasons = "; ".join(
      f"{row['id']} {row['excluded']}" for row in table.rows[:3]
    )
    raise ValueError(
      f"no run of the table can be used: {reasons or 'no rows'}."
    )
  size = options.size or (
    "flops_per_byte" if "flops_per_byte" in good[0] else "params"
  )
  if any(row.get(size) is None for row in good):
    raise ValueError(
      f"--size={size}: the table does not have it; use "
      f"--size={SIZES[1 - SIZES.index(size)]}."
    )
  dropped = _dropped(good, options)
  rows = [row for row in good if row["id"] not in dropped]
  models = {}
  for row in rows:
    models.setdefault(row["model"], []).append(row)
  cells = {name: _cells(some, size) for name, some in models.items()}
  result = {
    "options": dataclasses.asdict(options) | {"size": size},
    "units": {
      "loss": table.about["loss_unit"],
      "data": table.about["data_unit"],
      "size": size,
      "compute": "useful FLOPs run" if "useful_flops" in good[0] else "FLOPs",
    },
    "excluded": [
      {"id": row["id"], "reason": row["excluded"]}
      for row in table.rows
      if row["excluded"] is not None
    ],
    "dropped": [{"id": k, "reason": v} for k, v in dropped.items()],
    "models": {name: _model(some, options) for name, some in cells.items()},
    "comparison": _comparison(cells),
  }
  return _rounded(result)


def _dropped(rows: Sequence[dict], options: Options) -> dict[str, str]:
  """id -> why the user's options leave it out of the fits."""
  unknown = set(options.drop) - {row["id"] for row in rows}
  if unknown:
    raise ValueError(f"--drop: no usable run is called {sorted(unknown)[0]!r}.")
  dropped = {name: "--drop" for name in options.drop}
  if options.drop_flagged:
    for row in rows:
      if row.get("flagged"):
        reason = row.get("flag_reason") or "outlier"
        dropped.setdefault(row["id"], f"--drop_flagged: {reason}")
  for model in dict.fromkeys(row["model"] for row in rows):
    some = [r for r in rows if r["model"] == model and r["id"] not in dropped]
    some.sort(key=lambda row: -row["loss"])
    for row in some[: options.drop_highest]:
      dropped[row["id"]] = "--drop_highest: among the highest losses"
  return dropped


def _cells(rows: Sequence[dict], size: str) -> list[Cell]:
  """Runs that differ in their seed alone, together; smallest budget first."""
  groups = {}
  for row in rows:
    known = (row["budget_flops"], row[size], row.get("params"))
    groups.setdefault(known if "seed" in row else row["id"], []).append(row)
  cells = []
  for some in groups.values():
    losses = [row["loss"] for row in some]
    cells.append(
      Cell(
        some[0]["id"]
        if len(some) == 1
        else f"{some[0]['id']} (+{len(some) - 1})",
        [row["id"] for row in some],
        some[0]["budget_flops"],
        some[0][size],
        statistics.mean(row["bytes"] for row in some),
        statistics.mean(
          row.get("useful_flops", row["budget_flops"]) for row in some
        ),
        statistics.mean(losses),
        losses,
      )
    )
  return sorted(cells, key=lambda c: (c.budget, c.size, c.name))


def _model(cells: Sequence[Cell], options: Options) -> dict:
  budgets = sorted({cell.budget for cell in cells})
  return {
    "runs": sum(len(cell.ids) for cell in cells),
    "cells": [
      cell._asdict() | {"spread": _spread(cell.losses)} for cell in cells
    ],
    "budgets": budgets,
    "power_law": _power_law(cells, budgets, options),
    "isoflop": _isoflop(cells, budgets, options),
    "vpnls": _parametric(cells, fit.least_squares, options),
    "huber": _parametric(cells, fit.huber, options),
  }


def _spread(losses: Sequence[float]) -> float | None:
  return statistics.stdev(losses) if len(losses) > 1 else None


def _not_fitted(reason: str) -> dict:
  return {"not_fitted": reason}


# ----- a law and its checks -------------------------------------------------


def _columns(cells: Sequence[Cell], *names: str) -> np.ndarray:
  return np.array([[getattr(c, name) for c in cells] for name in names])


def _law(
  function: Callable[..., fit.Law],
  cells: Sequence[Cell],
  names: tuple[str, ...],
  options: Options,
) -> tuple[fit.Law, fit.Replicates | None, dict]:
  """Fits a law to cells, with intervals, residuals and the held-out budget."""
  x_KN, loss_N = _columns(cells, *names), np.array([c.loss for c in cells])
  law = function(x_KN, loss_N)
  replicates = fit.bootstrap(
    function, law, x_KN, loss_N, number=options.bootstrap, seed=options.seed
  )
  predicted_N = fit.predict(law, x_KN)
  rest_N = loss_N / predicted_N - 1
  spans = fit.parameter_intervals(law, replicates) if replicates else {}
  entry = {
    "parameters": {
      name: _with_interval(value, spans.get(name))
      for name, value in fit.parameters(law).items()
    },
    "degrees_of_freedom": loss_N.size - law.num_parameters,
    "resampled": replicates.resampled if replicates else None,
    "rms_relative_residual": float(np.sqrt(np.mean(rest_N**2))),
    "residuals": [
      {"cell": c.name, "loss": c.loss, "predicted": p, "relative": r}
      for c, p, r in zip(cells, predicted_N, rest_N, strict=True)
    ],
    "heldout": _heldout(function, cells, names, options),
    "stand_out": _stand_out(cells, rest_N),
    "warnings": [],
  }
  warn = entry["warnings"].append
  if replicates is None:
    warn("as many parameters as points: no intervals, and no way to be wrong.")
  elif replicates.degrees < FEW_DEGREES:
    warn(
      f"{replicates.degrees} degrees of freedom: intervals rest on almost "
      f"nothing and are wide."
    )
  _warn_of_parameters(law, spans, warn)
  heldout = entry["heldout"]
  if heldout and heldout["inside"] is False:
    warn(
      "held-out runs of the largest budget lie outside their predicted "
      "intervals: do not extrapolate with this fit."
    )
  if entry["stand_out"]:
    warn(
      f"stand out from the fit: {', '.join(entry['stand_out'])}; --drop leaves "
      f"cells out, and says so."
    )
  return law, replicates, entry


def _with_interval(value: float, span) -> dict:
  low, high = (None, None) if span is None else span
  return {"value": value, "low": low, "high": high}


def _warn_of_parameters(law: fit.Law, spans: dict, warn) -> None:
  least, most = fit.EXPONENTS
  for name, value in fit.parameters(law).items():
    low, high = spans.get(name, (None, None))
    if name in ("alpha", "beta"):
      if not 1.01 * least < value < 0.99 * most:
        warn(f"{name} stopped at its bound {value:.3g}: there is no power law.")
      elif low is not None and low <= 0:
        warn(f"the interval of {name} spans 0: no trend is shown.")
      elif low is not None and high - low > value:
        warn(f"the interval of {name} is wider than {name} itself.")
    elif value <= 0 or (name != "E" and value < 1e-200):
      warn(f"{name} is 0: the data do not show that term.")
    elif name == "E" and low is not None and low <= 0:
      warn("the interval of E reaches 0: an offset is not shown.")


def _stand_out(cells: Sequence[Cell], rest_N: np.ndarray) -> list[str]:
  if rest_N.size < 8:
    return []
  scale = 1.4826 * float(np.median(np.abs(rest_N - np.median(rest_N))))
  far = np.abs(rest_N - np.median(rest_N)) > STANDS_OUT * max(scale, 1e-12)
  return [cell.name for cell, out in zip(cells, far, strict=True) if out]


def _held_out(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
  """(others, those of the largest budget, or the tenth with most compute)."""
  budgets = sorted({cell.budget for cell in cells})
  count = len(budgets) // 10 if len(budgets) > MANY_BUDGETS else 1
  edge = budgets[-count]
  return (
    [cell for cell in cells if cell.budget < edge],
    [cell for cell in cells if cell.budget >= edge],
  )


def _heldout(function, cells, names, options) -> dict | None:
  """The law without the largest budget, and what it says of that budget."""
  others, last = _held_out(cells)
  if len(others) < 1 + 2 * len(names) or _together(others, names):
    return None
  x_KN, loss_N = _columns(others, *names), np.array([c.loss for c in others])
  law = function(x_KN, loss_N)
  replicates = fit.bootstrap(
    function, law, x_KN, loss_N, number=options.bootstrap, seed=options.seed
  )
  new_KN = _columns(last, *names)
  predicted_N = fit.predict(law, new_KN)
  spans = [None] * len(last)
  if replicates:
    spans = fit.band(law, replicates, new_KN, new_point=True).T.tolist()
  points = []
  for cell, value, span in zip(last, predicted_N, spans, strict=True):
    points.append(
      {"cell": cell.name, "loss": cell.loss}
      | {"predicted": _with_interval(value, span)}
      | {"relative_error": value / cell.loss - 1}
    )
  inside = [
    span[0] <= cell.loss <= span[1]
    for cell, span in zip(last, spans, strict=True)
    if span
  ]
  return {
    "budget": last[0].budget,
    "points": points,
    "mean_absolute_relative_error": statistics.mean(
      abs(p["relative_error"]) for p in points
    ),
    # One in twenty may be outside, where many points are held out.
    "inside": sum(inside) >= 0.9 * len(inside) if inside else None,
  }


def _grid(values: np.ndarray, beyond: float = 1.0) -> np.ndarray:
  return np.geomspace(values.min(), values.max() * beyond, CURVE_POINTS)


def _curve(x: np.ndarray, law, replicates, x_KN) -> dict:
  low, high = (None, None)
  if replicates:
    low, high = fit.band(law, replicates, x_KN)
  return {"x": x, "value": fit.predict(law, x_KN), "low": low, "high": high}


# ----- the methods ----------------------------------------------------------


def _power_law(cells, budgets, options) -> dict:
  if len(cells) > len(budgets):
    return _not_fitted(
      "budgets have several sizes: see the law through the IsoFLOP valleys."
    )
  if len(cells) < 3:
    return _not_fitted(f"{len(cells)} budgets; three parameters need three.")
  if len(cells) > MANY_BUDGETS and not _together(cells, ("size", "data")):
    return _not_fitted("size varies at any compute: these runs are no ladder.")
  law, replicates, entry = _law(fit.least_squares, cells, ("compute",), options)
  compute = np.array([cell.compute for cell in cells])
  x = _grid(compute, 3.0)
  entry["curve"] = _curve(x, law, replicates, x[None])
  if compute.max() < 10 * compute.min():
    entry["warnings"].append(
      f"compute spans a factor of {compute.max() / compute.min():.3g} only; an "
      f"exponent from less than ten does not extrapolate."
    )
  return entry


def _together(cells: Sequence[Cell], names: Sequence[str]) -> bool:
  """Whether size and data are one and the same variable in these cells."""
  if len(names) < 2:
    return False
  size, data = np.log(_columns(cells, "size", "data"))
  for one, other in ((size, data), (data, size)):
    if np.ptp(one) < LEAST_SPREAD:
      return True
    rest = other - np.polyval(np.polyfit(one, other, 1), one)
    if np.std(rest) < LEAST_SPREAD:
      return True
  return False


def _parametric(cells, function, options) -> dict:
  names = ("size", "data")
  if len(cells) < 5:
    return _not_fitted(f"{len(cells)} cells; five parameters need five.")
  if _together(cells, names):
    return _not_fitted(
      "size and data rise together in these runs, so their shares of the loss "
      "cannot be told apart; plan an IsoFLOP grid (--sizes)."
    )
  law, replicates, entry = _law(function, cells, names, options)
  constant = float(
    np.median([cell.budget / (cell.size * cell.data) for cell in cells])
  )
  entry["compute_per_size_and_data"] = constant
  entry["allocation"] = _allocation(law, replicates, constant)
  if min(law.coefficients) > 0:
    compute = _grid(np.array([cell.budget for cell in cells]), 3.0)
    best = fit.allocation(law, constant)
    size = np.exp(best.size_log_factor) * compute**best.size_exponent
    data = compute / (constant * size)
    entry["frontier"] = {"compute": compute, "size": size, "data": data}
    x_KN = np.array([size, data])
    entry["curve"] = _curve(compute, law, replicates, x_KN)
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
    entry[name] = _with_interval(getattr(best, name), span)
  return entry


def _isoflop(cells, budgets, options) -> dict:
  warnings, valleys, shown = [], [], []
  for budget in budgets:
    some = [cell for cell in cells if cell.budget == budget]
    size, data, loss = _columns(some, "size", "data", "loss")
    if len(set(size.tolist())) < MIN_SIZES:
      continue
    one = fit.valley(budget, size, data, loss)
    x = _grid(size)
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
    return _not_fitted(
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
  return entry | _valley_laws(valleys, options, warnings)


def _valley_laws(valleys, options, warnings) -> dict:
  """Power laws of the best size, data and loss through the valleys."""
  compute = np.array([one.compute for one in valleys])
  size = np.array([one.best_size for one in valleys])
  data = np.array([one.best_data for one in valleys])
  loss = np.array([one.best_loss for one in valleys])
  line = fit.valley_line(valleys, number=options.bootstrap, seed=options.seed)
  factor, exponent, span = line.log_factor, line.exponent, line.interval
  data_factor, data_exponent = fit.power_line(compute, data)
  data_span, entry = None, {}
  if not line.degrees:
    warnings.append("no budget has more than three sizes: no intervals.")
  if line.without_valley > 0.1:
    warnings.append(
      f"{line.without_valley:.0%} of the redrawn parabolas have no lowest "
      f"point: the valleys are too shallow for their noise."
    )
  if line.scatter > 2:
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
  x = _grid(compute, 3.0)
  best = np.exp(factor) * x**exponent
  return entry | {
    "allocation": {
      "size_exponent": _with_interval(exponent, span),
      "data_exponent": _with_interval(data_exponent, data_span),
    },
    "frontier": {
      "compute": x,
      "size": best,
      "data": np.exp(data_factor) * x**data_exponent,
    },
    "loss_law": _loss_law(compute, loss, options),
    "heldout": _heldout_valley(compute, size, loss),
  }


def _loss_law(compute, loss, options) -> dict:
  """Loss at the bottoms of the valleys against compute."""
  if compute.size < 3:
    return _not_fitted(f"{compute.size} valleys; three parameters need three.")
  cells = [
    Cell(f"valley at {c:.3g} FLOPs", [], c, 1.0, 1.0, c, float(v), [float(v)])
    for c, v in zip(compute, loss, strict=True)
  ]
  law, replicates, entry = _law(fit.least_squares, cells, ("compute",), options)
  x = _grid(compute, 3.0)
  entry["curve"] = _curve(x, law, replicates, x[None])
  return entry


def _heldout_valley(compute, size, loss) -> dict | None:
  """The best size at the largest budget, from the lines of the others."""
  if compute.size < 3:
    return None
  factor, exponent = fit.power_line(compute[:-1], size[:-1])
  predicted = math.exp(factor) * compute[-1] ** exponent
  return {
    "budget": compute[-1],
    "best_size": size[-1],
    "predicted_size": predicted,
    "relative_error": predicted / size[-1] - 1,
  }


# ----- models side by side --------------------------------------------------


def _comparison(cells: dict[str, list[Cell]]) -> list[dict]:
  """The best cell of every model at every budget that two or more share."""
  budgets = sorted({c.budget for some in cells.values() for c in some})
  rows = []
  for budget in budgets:
    best = {}
    for name, some in cells.items():
      here = [cell for cell in some if cell.budget == budget]
      if here:
        best[name] = min(here, key=lambda cell: cell.loss)
    if len(best) < 2:
      continue
    reference = next(iter(best))
    row = {"budget": budget, "reference": reference, "models": {}}
    for name, cell in best.items():
      row["models"][name] = {
        "cell": cell.name,
        "loss": _with_interval(cell.loss, _mean_interval(cell.losses)),
        "difference": _with_interval(
          cell.loss - best[reference].loss,
          _difference_interval(cell.losses, best[reference].losses),
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
