"""Scaling laws fitted to points: the mathematics alone, on arrays.

A law is L = E + sum over k of c_k / x_k^e_k. With x = (C,) it is loss against
compute; with x = (N, D) the parametric form of Hoffmann et al. 2022 (arXiv
2203.15556, Section 3.3). Two ways to fit:

  least_squares  variable projection: for given exponents the offset and the
                 coefficients are a linear, non-negative least squares problem,
                 so only the exponents are searched (Golub and Pereyra 1973;
                 for this law Czech et al. 2026, arXiv 2603.22339)
  huber          the Huber loss of log residuals from many starts with
                 L-BFGS, as Hoffmann et al. and Besiroglu et al. 2024 (arXiv
                 2404.10102)

IsoFLOP parabolas are in `valleys.py`.

Intervals come from the bootstrap (`bootstrap`, `interval`). Letters: K
terms of a law, N points, R bootstrap replicates.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

EXPONENTS = (0.01, 3.0)  # searched; a law at either end is no power law
HUBER_DELTA = 1e-3  # of log residuals, as Hoffmann et al.
NUM_STARTS = 24  # best of a grid of several hundred, each followed by L-BFGS
CONFIDENCE = 0.95
_GRID = np.geomspace(0.03, 2.0, 14)
_TOLERANCES = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 3000, "maxfun": 6000}
_ROUGH = {"maxiter": 80}  # of every start; the best three go on
_REFIT = {"ftol": 1e-9, "gtol": 1e-7, "maxiter": 300}  # from a known start

# Points a parameter from which cases are resampled, else residuals.
CASES_PER_PARAMETER = 8


class Law(NamedTuple):
  """L = offset + sum_k coefficients[k] / x_k ** exponents[k]."""

  offset: float
  coefficients: tuple[float, ...]
  exponents: tuple[float, ...]
  has_offset: bool = True  # False: the offset is 0 and was not fitted

  @property
  def num_parameters(self) -> int:
    return self.has_offset + 2 * len(self.exponents)


def predict(law: Law, x_KN: np.ndarray) -> np.ndarray:
  """Loss at every point, float64 (N,)."""
  loss_N = np.full(x_KN.shape[1], law.offset)
  terms = zip(law.coefficients, law.exponents, x_KN, strict=True)
  for coefficient, exponent, x_N in terms:
    loss_N = loss_N + coefficient * x_N**-exponent
  return loss_N


def _centred(x_KN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Logs about their means, and the means: exponents and scales decouple."""
  logs_KN = np.log(x_KN)
  means_K = logs_KN.mean(axis=1)
  return logs_KN - means_K[:, None], means_K


def _check(x_KN: np.ndarray, loss_N: np.ndarray, offset: bool = True) -> None:
  if x_KN.ndim != 2 or loss_N.shape != x_KN.shape[1:]:
    raise ValueError(
      f"x is {x_KN.shape} and the losses are {loss_N.shape}; give (K, N) and "
      f"(N,)."
    )
  for values in (x_KN, loss_N):
    if not (np.isfinite(values).all() and (values > 0).all()):
      raise ValueError(
        "every size, amount of data, compute and loss must be above 0 and "
        "finite; leave out the points that are not."
      )
  needed = offset + 2 * len(x_KN)
  if loss_N.size < needed:
    raise ValueError(
      f"{loss_N.size} points cannot fix {needed} parameters; at least {needed} "
      f"are needed, and one more for intervals."
    )


# ----- variable projection --------------------------------------------------


def _project(exponents_K, logs_KN, loss_N):
  """Best offset and coefficients for these exponents; residuals; columns."""
  terms_KN = np.exp(-np.asarray(exponents_K)[:, None] * logs_KN)
  columns = np.vstack([np.ones_like(loss_N), *terms_KN]).T
  weights, _ = optimize.nnls(columns, loss_N)
  return weights, loss_N - columns @ weights, terms_KN


def least_squares(
  x_KN: np.ndarray, loss_N: np.ndarray, start: Law | None = None
) -> Law:
  """Least squares of the loss by variable projection (VPNLS).

  Args: x_KN, loss_N: above 0. start: where to search; None = over a grid.
  Raises: ValueError for too few points, or values that are not above 0.
  """
  _check(x_KN, loss_N)
  logs_KN, means_K = _centred(x_KN)
  scale = max(float(np.var(loss_N)) * loss_N.size, 1e-300)

  def objective(exponents_K):
    weights, rest_N, terms_KN = _project(exponents_K, logs_KN, loss_N)
    # The inner problem is at its optimum, so it adds nothing to the gradient.
    gradient_K = 2 * (rest_N * logs_KN * terms_KN).sum(axis=1) * weights[1:]
    return rest_N @ rest_N / scale, gradient_K / scale

  if start is None:
    grid = np.array(np.meshgrid(*[_GRID] * len(logs_KN))).reshape(
      len(logs_KN), -1
    )
    values = [objective(exponents_K)[0] for exponents_K in grid.T]
    starts = grid.T[np.argsort(values, kind="stable")[:3]]
  else:
    starts = [np.clip(start.exponents, *EXPONENTS)]
  found = [
    optimize.minimize(
      objective,
      one,
      jac=True,
      method="L-BFGS-B",
      bounds=[EXPONENTS] * len(logs_KN),
      options=_TOLERANCES if start is None else _REFIT,
    )
    for one in starts
  ]
  exponents_K = min(found, key=lambda result: result.fun).x
  weights, _, _ = _project(exponents_K, logs_KN, loss_N)
  return Law(
    float(weights[0]),
    tuple(float(v) for v in weights[1:] * np.exp(exponents_K * means_K)),
    tuple(float(v) for v in exponents_K),
  )


def no_offset(
  x_KN: np.ndarray, loss_N: np.ndarray, start: Law | None = None
) -> Law:
  """L = c / x^e: a line in logs, for ladders too short to show an offset.

  Args: x_KN: one row. start: not used, a line has one best fit.
  Raises: ValueError as `least_squares`.
  """
  _check(x_KN, loss_N, offset=False)
  (x_N,) = x_KN
  slope, height = np.polyfit(np.log(x_N), np.log(loss_N), 1)
  return Law(0.0, (math.exp(height),), (float(-slope),), has_offset=False)


# ----- Huber loss of log residuals ------------------------------------------


def huber(
  x_KN: np.ndarray,
  loss_N: np.ndarray,
  start: Law | None = None,
  delta: float = HUBER_DELTA,
) -> Law:
  """Huber loss of log L - log prediction; smooth in logs of E and c_k.

  Args and Raises: as `least_squares`.
  """
  _check(x_KN, loss_N)
  logs_KN, means_K = _centred(x_KN)
  log_loss_N = np.log(loss_N)
  K = len(logs_KN)

  def objective(theta):
    """theta: log E, K logs of c at the points' middle, K exponents."""
    parts = np.vstack(
      [
        np.full(log_loss_N.shape, theta[0]),
        theta[1 : K + 1, None] - theta[K + 1 :, None] * logs_KN,
      ]
    )
    top_N = parts.max(axis=0)
    shares = np.exp(parts - top_N)
    total_N = shares.sum(axis=0)
    shares /= total_N
    error_N = top_N + np.log(total_N) - log_loss_N
    size_N = np.abs(error_N)
    value_N = np.where(
      size_N <= delta, 0.5 * error_N**2, delta * (size_N - 0.5 * delta)
    )
    slope_N = np.clip(error_N, -delta, delta)
    gradient = np.concatenate(
      [shares @ slope_N, -(shares[1:] * logs_KN) @ slope_N]
    )
    # In units of delta, so that the tolerances do not depend on it.
    return value_N.sum() / delta, gradient / delta

  low = float(log_loss_N.min())
  bounds = [(low - 15.0, low + 0.5)] + [(low - 25.0, low + 10.0)] * K
  bounds += [EXPONENTS] * K
  if start is None:
    starts = _huber_starts(low, log_loss_N, K)
    values = [objective(theta)[0] for theta in starts]
    starts = [starts[i] for i in np.argsort(values, kind="stable")][:NUM_STARTS]
  else:
    at_middle = np.log(np.maximum(start.coefficients, 1e-300))
    at_middle -= np.array(start.exponents) * means_K
    first = math.log(max(start.offset, 1e-300))
    starts = [np.concatenate([[first], at_middle, start.exponents])]
  edges = np.array(bounds).T

  def search(theta, options):
    return optimize.minimize(
      objective,
      np.clip(theta, *edges),
      jac=True,
      method="L-BFGS-B",
      bounds=bounds,
      options=options,
    )

  if len(starts) > 1:
    rough = [search(theta, _ROUGH) for theta in starts]
    rough.sort(key=lambda result: result.fun)
    starts = [result.x for result in rough[:3]]
  options = _TOLERANCES if start is None else _REFIT
  found = [search(theta, options) for theta in starts]
  theta = min(found, key=lambda result: result.fun).x
  return Law(
    float(np.exp(theta[0])),
    tuple(
      float(v) for v in np.exp(theta[1 : K + 1] + theta[K + 1 :] * means_K)
    ),
    tuple(float(v) for v in theta[K + 1 :]),
  )


def _huber_starts(low: float, log_loss_N: np.ndarray, K: int) -> list:
  """Offsets as shares of the lowest loss, the rest split between the terms."""
  middle = float(np.exp(np.median(log_loss_N)))
  exponents = (0.1, 0.25, 0.4, 0.7, 1.2)
  starts = []
  for share in (0.05, 0.3, 0.6, 0.8, 0.95):
    offset = share * math.exp(low)
    for split in (0.2, 0.5, 0.8) if K == 2 else (1.0,):
      rest = np.array([split, 1 - split][:K]) * (middle - offset)
      for i in range(len(exponents) ** K):
        chosen = [exponents[i // len(exponents) ** k % 5] for k in range(K)]
        starts.append(
          np.concatenate([[math.log(offset)], np.log(rest), chosen])
        )
  return starts


# ----- intervals ------------------------------------------------------------


class Replicates(NamedTuple):
  """Refits to losses redrawn about a fit."""

  laws: list[Law]
  noise_R: np.ndarray  # one redrawn log residual a replicate, of a new point
  degrees: int  # of freedom the residuals have
  resampled: str  # "residuals" or "cases"


def bootstrap(
  fit: Callable[..., Law],
  law: Law,
  x_KN: np.ndarray,
  loss_N: np.ndarray,
  *,
  number: int,
  seed: int,
) -> Replicates | None:
  """Refits to resampled points.

  With `CASES_PER_PARAMETER` points a parameter or more, points are drawn with
  replacement, so that noise may differ between them (Besiroglu et al. do so).
  A smaller design would lose all points of a budget to that: its points stay,
  and their log residuals are drawn with replacement, enlarged by
  sqrt(n / (n - p)), for a fit of p parameters leaves smaller ones than the
  noise.

  Returns: None where n = p: such a fit leaves no residuals.
  """
  count, p = loss_N.size, law.num_parameters
  if count == p:
    return None
  fitted_N = predict(law, x_KN)
  rest_N = np.log(loss_N / fitted_N) * math.sqrt(count / (count - p))
  rng = np.random.default_rng(seed)
  cases = count >= CASES_PER_PARAMETER * p
  laws = []
  for _ in range(number):
    drawn_N = rng.integers(0, count, count)
    if cases:
      laws.append(fit(x_KN[:, drawn_N], loss_N[drawn_N], start=law))
    else:
      laws.append(fit(x_KN, fitted_N * np.exp(rest_N[drawn_N]), start=law))
  noise_R = rng.choice(rest_N, number)
  resampled = "cases" if cases else "residuals"
  return Replicates(laws, noise_R, count - p, resampled)


def interval(
  value: float, values_R: np.ndarray, degrees: int, logs: bool = False
) -> tuple[float, float]:
  """Percentile interval at `CONFIDENCE`, for few degrees of freedom.

  The distances from `value` are stretched by Student's t over the normal
  quantile. Args: logs: stretch in logs, for what is positive.
  """
  tail = (1 - CONFIDENCE) / 2
  stretch = stats.t.ppf(1 - tail, degrees) / stats.norm.ppf(1 - tail)
  low, high = np.quantile(values_R, [tail, 1 - tail])
  if not logs:
    return value - stretch * (value - low), value + stretch * (high - value)
  if value <= 0:
    return 0.0, float(high)
  below = 0.0 if low <= 0 else value * (low / value) ** stretch
  with np.errstate(over="ignore"):
    return float(below), float(value * (high / value) ** stretch)


def parameter_names(num_terms: int) -> list[str]:
  """As in the literature: E, A, alpha, or E, A, B, alpha, beta."""
  return ["E", *"AB"[:num_terms], *("alpha", "beta")[:num_terms]]


def parameters(law: Law) -> dict[str, float]:
  names = parameter_names(len(law.exponents))
  values = (law.offset, *law.coefficients, *law.exponents)
  found = dict(zip(names, values, strict=True))
  return found if law.has_offset else {n: found[n] for n in names[1:]}


def parameter_intervals(
  law: Law, replicates: Replicates
) -> dict[str, tuple[float, float]]:
  """Name -> (low, high)."""
  values = [parameters(one) for one in replicates.laws]
  spans = {
    name: interval(
      value,
      np.array([one[name] for one in values]),
      replicates.degrees,
      logs=name in "AB",
    )
    for name, value in parameters(law).items()
  }
  if law.has_offset:
    spans["E"] = (max(spans["E"][0], 0.0), spans["E"][1])
  return spans


def band(
  law: Law,
  replicates: Replicates,
  x_KN: np.ndarray,
  new_point: bool = False,
) -> np.ndarray:
  """Intervals of the law at `x_KN`, (2, N): low and high.

  Args: new_point: the interval of a new run there, its noise included, and
    not of the law alone.
  """
  value_N = predict(law, x_KN)
  values_RN = np.array([predict(one, x_KN) for one in replicates.laws])
  if new_point:
    values_RN = values_RN * np.exp(replicates.noise_R)[:, None]
  pairs = [
    interval(value, values_R, replicates.degrees, logs=True)
    for value, values_R in zip(value_N, values_RN.T, strict=True)
  ]
  return np.array(pairs).T


class Allocation(NamedTuple):
  """Best size and data of a budget C, each as factor * C^exponent."""

  size_log_factor: float
  size_exponent: float
  data_log_factor: float
  data_exponent: float


def allocation(law: Law, compute_per_size_and_data: float) -> Allocation:
  """The frontier of a parametric law (Hoffmann et al., Equation 4).

  Args: compute_per_size_and_data: k of C = k N D.
  """
  (A, B), (alpha, beta) = law.coefficients, law.exponents
  total = alpha + beta
  with np.errstate(divide="ignore", invalid="ignore"):
    scale = float(np.log(alpha * A) - np.log(beta * B)) / total
  constant = math.log(compute_per_size_and_data)
  return Allocation(
    scale - beta / total * constant,
    beta / total,
    -scale - alpha / total * constant,
    alpha / total,
  )
