"""One law fitted to the points of a model, and what speaks against it.

Every entry of `fits.json` has parameters with intervals, the residual of every
point, the largest budget predicted from the others, and warnings in plain
words.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from aunet_jax.scaling import fit

CURVE_POINTS = 33

# Where log size explains log data but for less than this standard deviation,
# their effects on the loss cannot be told apart.
LEAST_SPREAD = 0.2
FEW_DEGREES = 3  # of freedom; below, intervals are mostly Student's t
MANY_BUDGETS = 20  # above it, the tenth of them with most compute is held out
STANDS_OUT = 5.0  # standard deviations, estimated by the median deviation


@dataclasses.dataclass(frozen=True)
class Bootstrap:
  """Refits behind an interval, and the seed of their resampling."""

  number: int
  seed: int


class Point(NamedTuple):
  """One model at one budget and size: the average over its seeds.

  `fits.json` and the report call it a cell.
  """

  name: str
  ids: list[str]
  budget: float
  size: float  # N
  data: float  # D
  compute: float  # useful FLOPs run; published points: their budget
  loss: float
  losses: list[float]
  swept: bool = False  # may differ from others in learning rate or batch alone


def not_fitted(reason: str) -> dict:
  return {"not_fitted": reason}


def columns(points: Sequence[Point], *names: str) -> np.ndarray:
  return np.array([[getattr(c, name) for c in points] for name in names])


def fit_law(
  function: Callable[..., fit.Law],
  points: Sequence[Point],
  names: tuple[str, ...],
  bootstrap: Bootstrap,
) -> tuple[fit.Law, fit.Replicates | None, dict]:
  """Fits a law to points, with intervals, residuals and the held-out budget."""
  x_KN, loss_N = columns(points, *names), np.array([c.loss for c in points])
  law = function(x_KN, loss_N)
  replicates = fit.bootstrap(
    function, law, x_KN, loss_N, number=bootstrap.number, seed=bootstrap.seed
  )
  predicted_N = fit.predict(law, x_KN)
  rest_N = loss_N / predicted_N - 1
  spans = fit.parameter_intervals(law, replicates) if replicates else {}
  entry = {
    "parameters": {
      name: with_interval(value, spans.get(name))
      for name, value in fit.parameters(law).items()
    },
    "degrees_of_freedom": loss_N.size - law.num_parameters,
    "resampled": replicates.resampled if replicates else None,
    "rms_relative_residual": float(np.sqrt(np.mean(rest_N**2))),
    "residuals": [
      {"cell": c.name, "loss": c.loss, "predicted": p, "relative": r}
      for c, p, r in zip(points, predicted_N, rest_N, strict=True)
    ],
    "heldout": _heldout(function, points, names, bootstrap),
    "stand_out": _stand_out(points, rest_N),
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


def with_interval(value: float, span) -> dict:
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


def _stand_out(points: Sequence[Point], rest_N: np.ndarray) -> list[str]:
  if rest_N.size < 8:
    return []
  scale = 1.4826 * float(np.median(np.abs(rest_N - np.median(rest_N))))
  far = np.abs(rest_N - np.median(rest_N)) > STANDS_OUT * max(scale, 1e-12)
  return [point.name for point, out in zip(points, far, strict=True) if out]


def _held_out(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
  """(others, those of the largest budget, or the tenth with most compute)."""
  budgets = sorted({point.budget for point in points})
  count = len(budgets) // 10 if len(budgets) > MANY_BUDGETS else 1
  edge = budgets[-count]
  return (
    [point for point in points if point.budget < edge],
    [point for point in points if point.budget >= edge],
  )


def _heldout(function, points, names, bootstrap) -> dict | None:
  """The law without the largest budget, and what it says of that budget."""
  others, last = _held_out(points)
  needed = 2 * len(names) + (function is not fit.no_offset)
  if len(others) < needed or together(others, names):
    return None
  x_KN, loss_N = columns(others, *names), np.array([c.loss for c in others])
  law = function(x_KN, loss_N)
  replicates = fit.bootstrap(
    function, law, x_KN, loss_N, number=bootstrap.number, seed=bootstrap.seed
  )
  new_KN = columns(last, *names)
  predicted_N = fit.predict(law, new_KN)
  spans = [None] * len(last)
  if replicates:
    spans = fit.band(law, replicates, new_KN, new_point=True).T.tolist()
  predictions = []
  for point, value, span in zip(last, predicted_N, spans, strict=True):
    predictions.append(
      {"cell": point.name, "loss": point.loss}
      | {"predicted": with_interval(value, span)}
      | {"relative_error": value / point.loss - 1}
    )
  inside = [
    span[0] <= point.loss <= span[1]
    for point, span in zip(last, spans, strict=True)
    if span
  ]
  return {
    "budget": last[0].budget,
    "points": predictions,
    "mean_absolute_relative_error": statistics.mean(
      abs(p["relative_error"]) for p in predictions
    ),
    # One in twenty may be outside, where many points are held out.
    "inside": sum(inside) >= 0.9 * len(inside) if inside else None,
  }


def grid(values: np.ndarray, beyond: float = 1.0) -> np.ndarray:
  return np.geomspace(values.min(), values.max() * beyond, CURVE_POINTS)


def curve(x: np.ndarray, law, replicates, x_KN) -> dict:
  low, high = (None, None)
  if replicates:
    low, high = fit.band(law, replicates, x_KN)
  return {"x": x, "value": fit.predict(law, x_KN), "low": low, "high": high}


def together(points: Sequence[Point], names: Sequence[str]) -> bool:
  """Whether size and data are one and the same variable in these points."""
  if len(names) < 2:
    return False
  size, data = np.log(columns(points, "size", "data"))
  for one, other in ((size, data), (data, size)):
    if np.ptp(one) < LEAST_SPREAD:
      return True
    rest = other - np.polyval(np.polyfit(one, other, 1), one)
    if np.std(rest) < LEAST_SPREAD:
      return True
  return False
