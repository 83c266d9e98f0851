"""IsoFLOP parabolas: the best size of a budget, and its power law.

At every budget a parabola in log size is fitted to the losses; its lowest point
is the best size there, and a power law goes through those (Hoffmann et al.
2022, arXiv 2203.15556, Section 3.2). A parabola is exact only where size and
data matter alike and the sizes lie evenly about the best; how far off it is
elsewhere: Czech et al. 2026, arXiv 2603.22339, and docs/scaling.md. Letters: R
bootstrap replicates, B budgets.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from aunet_jax.scaling import fit


class Valley(NamedTuple):
  """Loss = c0 + c1 u + c2 u^2 in u = log size, less its mean, at a budget."""

  compute: float
  mean_log_size: float
  coefficients: np.ndarray  # (3,), constant first
  sizes: np.ndarray
  losses: np.ndarray
  compute_per_size_and_data: float  # C / (N D)

  def loss_at(self, size: np.ndarray) -> np.ndarray:
    u = np.log(size) - self.mean_log_size
    return np.polynomial.polynomial.polyval(u, self.coefficients)

  @property
  def problem(self) -> str | None:
    """Why it has no lowest point among its sizes; None where it has one."""
    if self.coefficients[2] <= 0:
      return "curves downwards"
    if not self.sizes.min() < self.best_size < self.sizes.max():
      return "is lowest beyond its sizes"
    return None

  @property
  def best_size(self) -> float:
    _, slope, curve = self.coefficients
    return math.exp(self.mean_log_size - slope / (2 * curve))

  @property
  def best_loss(self) -> float:
    constant, slope, curve = self.coefficients
    return float(constant - slope**2 / (4 * curve))

  @property
  def best_data(self) -> float:
    return self.compute / (self.compute_per_size_and_data * self.best_size)


def valley(
  compute: float, sizes: np.ndarray, data: np.ndarray, losses: np.ndarray
) -> Valley:
  """Fits one budget's parabola by least squares.

  Raises: ValueError for fewer than three different sizes.
  """
  if len(set(sizes.tolist())) < 3:
    raise ValueError(f"{len(set(sizes.tolist()))} sizes make no parabola.")
  logs = np.log(sizes)
  middle = float(logs.mean())
  coefficients = np.polynomial.polynomial.polyfit(logs - middle, losses, 2)
  constant = float(np.median(compute / (sizes * data)))
  return Valley(compute, middle, coefficients, sizes, losses, constant)


def power_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
  """(log of the factor, exponent) of y = factor * x^exponent, in logs."""
  exponent, factor = np.polyfit(np.log(x), np.log(y), 1)
  return float(factor), float(exponent)


def isoflop_replicates(
  valleys: Sequence[Valley], *, number: int, seed: int
) -> tuple[np.ndarray, int] | None:
  """Best log sizes of refitted parabolas (R, B), and degrees of freedom.

  Relative residuals of all budgets are drawn together, each enlarged for its
  own budget's three parameters. A replicate that has no valley is NaN there.

  Returns: None where no budget has more than three sizes.
  """
  pooled, degrees = [], 0
  for one in valleys:
    spare = one.sizes.size - 3
    if spare > 0:
      degrees += spare
      rest = one.losses / one.loss_at(one.sizes) - 1
      pooled.extend(rest * math.sqrt(one.sizes.size / spare))
  if not degrees:
    return None
  rng = np.random.default_rng(seed)
  sizes_RB = np.empty((number, len(valleys)))
  for b, one in enumerate(valleys):
    drawn = rng.choice(np.array(pooled), (one.sizes.size, number))
    losses = one.loss_at(one.sizes)[:, None] * (1 + drawn)
    u = np.log(one.sizes) - one.mean_log_size
    _, c1, c2 = np.polynomial.polynomial.polyfit(u, losses, 2)
    c2 = np.where(c2 > 0, c2, np.nan)
    sizes_RB[:, b] = one.mean_log_size - c1 / (2 * c2)
  return sizes_RB, degrees


class ValleyLine(NamedTuple):
  """size = factor * C^exponent through the lowest points of valleys."""

  log_factor: float
  exponent: float
  interval: tuple[float, float] | None  # of the exponent; None: no residuals
  valley_intervals: list[tuple[float, float]]  # of each best size
  degrees: int  # of freedom of the parabolas' residuals
  without_valley: float  # share of replicates in which one was lost
  scatter: float  # about the line, over what the parabolas' noise explains


def valley_line(
  valleys: Sequence[Valley], *, number: int, seed: int
) -> ValleyLine:
  """Power law of the best size, with the parabolas' noise carried through.

  Where the lowest points scatter more about the line than that noise explains
  (chi squared at `CONFIDENCE`), the interval is widened by Birge's ratio.
  """
  logs_B = np.log([one.compute for one in valleys])
  best_B = np.log([one.best_size for one in valleys])
  exponent, factor = (float(v) for v in np.polyfit(logs_B, best_B, 1))
  drawn = isoflop_replicates(valleys, number=number, seed=seed)
  nothing = ValleyLine(factor, exponent, None, [], 0, 0.0, 1.0)
  if drawn is None:
    return nothing
  sizes_RB, degrees = drawn
  usable = np.isfinite(sizes_RB).all(axis=1)
  nothing = nothing._replace(
    degrees=degrees, without_valley=float(1 - usable.mean())
  )
  if usable.sum() < 20:
    return nothing
  sizes_RB = sizes_RB[usable]
  slopes_R = np.polyfit(logs_B, sizes_RB.T, 1)[0]
  ratio = 1.0
  if len(valleys) > 2:
    rest_B = best_B - factor - exponent * logs_B
    spread_B = np.maximum(sizes_RB.std(axis=0), 1e-12)
    chi = float(np.sum((rest_B / spread_B) ** 2))
    degrees_of_line = len(valleys) - 2
    if chi > stats.chi2.ppf(fit.CONFIDENCE, degrees_of_line):
      ratio = math.sqrt(chi / degrees_of_line)
  widened_R = exponent + ratio * (slopes_R - exponent)
  return nothing._replace(
    interval=fit.interval(exponent, widened_R, degrees),
    valley_intervals=[
      tuple(float(v) for v in np.exp(fit.interval(best, column, degrees)))
      for best, column in zip(best_B, sizes_RB.T, strict=True)
    ],
    scatter=ratio,
  )
