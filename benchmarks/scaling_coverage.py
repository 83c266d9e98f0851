"""How often stated 95% intervals of scaling fits hold the truth.

  python -m benchmarks.scaling_coverage
  python -m benchmarks.scaling_coverage --only=huber --trials=100

Losses are drawn about a known law with log-normal noise, fitted and given
intervals as `aunet_jax.scaling fit` does; a trial counts for a parameter when
its interval holds the truth. Designs: a ladder of budgets with one size each;
grids of budgets x sizes; IsoFLOP parabolas (5 budgets of 7 sizes) over a
symmetric and a skewed surface, at sizes between two multiples of the best,
where a parabola's own error shows once noise is small.
`loss_beyond` is the law's loss at three times the largest compute, or at three
times the largest size and data.

Per design and parameter: coverage, its standard error over the trials, and the
median width of the interval over the true value. The last line of the output
is one JSON object.
"""

import argparse
import json
import math
import platform
import time

import numpy as np
import scipy
import threadpoolctl

from aunet_jax.scaling import fit
from aunet_jax.scaling.valleys import valley, valley_line

LADDER = fit.Law(0.9, (30.0,), (0.09,))  # bits per byte against FLOPs
SURFACE = fit.Law(1.8, (480.0, 2100.0), (0.35, 0.37))  # near Chinchilla's
SYMMETRIC = fit.Law(1.8, (480.0, 480.0), (0.35, 0.35))
ASYMMETRIC = fit.Law(1.8, (6000.0, 500.0), (0.5, 0.3))


def isoflop_grid(law: fit.Law, num_budgets: int, num_sizes: int, low, high):
  """Sizes and data (2, N) about the best of each budget, and budgets (N,).

  Args: low, high: sizes of a budget, as multiples of its best.
  """
  best = fit.allocation(law, 6.0)
  budget = np.repeat(np.geomspace(1e18, 1e21, num_budgets), num_sizes)
  middle = np.exp(best.size_log_factor) * budget**best.size_exponent
  steps = np.geomspace(low, high, num_sizes)
  size = middle * np.tile(steps, num_budgets)
  return np.array([size, budget / (6 * size)]), budget


def law_trial(function, law, x_KN, noise, rng, seed, bootstrap, seeds=1):
  """Name -> (inside, width over the truth)."""
  drawn = rng.normal(0, noise, (seeds, x_KN.shape[1]))
  loss_N = (fit.predict(law, x_KN) * np.exp(drawn)).mean(axis=0)
  found = function(x_KN, loss_N)
  replicates = fit.bootstrap(
    function, found, x_KN, loss_N, number=bootstrap, seed=seed
  )
  spans = fit.parameter_intervals(found, replicates)
  truth = fit.parameters(law)
  if len(law.exponents) == 2:
    spans["size_exponent"] = fit.interval(
      fit.allocation(found, 6.0).size_exponent,
      np.array([fit.allocation(x, 6.0).size_exponent for x in replicates.laws]),
      replicates.degrees,
    )
    truth["size_exponent"] = fit.allocation(law, 6.0).size_exponent
  beyond_KN = x_KN.max(axis=1, keepdims=True) * 3
  spans["loss_beyond"] = fit.band(found, replicates, beyond_KN)[:, 0]
  truth["loss_beyond"] = float(fit.predict(law, beyond_KN)[0])
  return _inside(spans, truth)


def isoflop_trial(law, x_KN, budget_N, noise, rng, seed, bootstrap):
  loss_N = fit.predict(law, x_KN)
  loss_N = loss_N * np.exp(rng.normal(0, noise, loss_N.size))
  valleys = [
    valley(b, *x_KN[:, budget_N == b], loss_N[budget_N == b])
    for b in np.unique(budget_N)
  ]
  found = valley_line(valleys, number=bootstrap, seed=seed)
  truth = {"size_exponent": fit.allocation(law, 6.0).size_exponent}
  return _inside({"size_exponent": found.interval}, truth)


def _inside(spans, truth):
  return {
    name: (span[0] <= truth[name] <= span[1], np.ptp(span) / abs(truth[name]))
    for name, span in spans.items()
    if span is not None  # then none is stated
  }


def designs():
  """Name -> (function of (rng, seed, bootstrap), trials, bootstrap)."""

  def ladder(budgets, noise, seeds):
    x_KN = np.geomspace(1e13, 1e16, budgets)[None]
    return lambda *rest: law_trial(
      fit.least_squares, LADDER, x_KN, noise, *rest, seeds=seeds
    )

  def grid(function, budgets, sizes, noise):
    x_KN, _ = isoflop_grid(SURFACE, budgets, sizes, 1 / 4, 4.0)
    return lambda *rest: law_trial(function, SURFACE, x_KN, noise, *rest)

  def valleys(law, low, high, noise):
    x_KN, budget_N = isoflop_grid(law, 5, 7, low, high)
    return lambda *rest: isoflop_trial(law, x_KN, budget_N, noise, *rest)

  def named(text, trial, trials, bootstrap=150):
    return text, (trial, trials, bootstrap)

  half, tenth = 5e-3, 1e-3
  return dict(
    [
      named(
        "power law, 5 budgets x 3 seeds, noise 0.5%", ladder(5, half, 3), 100
      ),
      named(
        "power law, 8 budgets x 1 seed, noise 0.5%", ladder(8, half, 1), 100
      ),
      named(
        "vpnls, 4 x 7, noise 0.5%", grid(fit.least_squares, 4, 7, half), 100
      ),
      named(
        "vpnls, 6 x 9, noise 0.5%", grid(fit.least_squares, 6, 9, half), 100
      ),
      named("huber, 4 x 7, noise 0.5%", grid(fit.huber, 4, 7, half), 40, 60),
      named("huber, 6 x 9, noise 0.5%", grid(fit.huber, 6, 9, half), 40, 60),
      named(
        "isoflop, symmetric, 1/4 to 4, noise 0.5%",
        valleys(SYMMETRIC, 1 / 4, 4, half),
        500,
      ),
      named(
        "isoflop, skewed, 1/4 to 4, noise 0.5%",
        valleys(ASYMMETRIC, 1 / 4, 4, half),
        500,
      ),
      named(
        "isoflop, skewed, 1/4 to 4, noise 0.1%",
        valleys(ASYMMETRIC, 1 / 4, 4, tenth),
        500,
      ),
      named(
        "isoflop, skewed, 1/2 to 16, noise 0.1%",
        valleys(ASYMMETRIC, 1 / 2, 16, tenth),
        500,
      ),
    ]
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.scaling_coverage",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--only", default="", help="designs with this in the name"
  )
  parser.add_argument("--trials", type=int, help="of each (default: its own)")
  parser.add_argument("--bootstrap", type=int, help="refits an interval")
  args = parser.parse_args()
  results = {}
  for name, (trial, trials, bootstrap) in designs().items():
    if args.only not in name:
      continue
    trials, bootstrap = args.trials or trials, args.bootstrap or bootstrap
    began, seen = time.perf_counter(), {}
    with threadpoolctl.threadpool_limits(1, "blas"):  # as the command does
      for seed in range(trials):
        found = trial(np.random.default_rng([7, seed]), seed, bootstrap)
        for key, value in found.items():
          seen.setdefault(key, []).append(value)
    entry = {"trials": trials, "bootstrap": bootstrap, "parameters": {}}
    for key, values in seen.items():
      share = float(np.mean([inside for inside, _ in values]))
      entry["parameters"][key] = {
        "coverage": round(share, 4),
        "standard_error": round(
          math.sqrt(share * (1 - share) / len(values)), 4
        ),
        "intervals": len(values),
        "median_relative_width": float(
          f"{np.median([width for _, width in values]):.3g}"
        ),
      }
    results[name] = entry
    shown = {k: v["coverage"] for k, v in entry["parameters"].items()}
    print(f"{name}: {shown} ({time.perf_counter() - began:.0f} s)", flush=True)
  print(
    json.dumps(
      {
        "command": "python -m benchmarks.scaling_coverage",
        "confidence": fit.CONFIDENCE,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "designs": results,
      }
    )
  )


if __name__ == "__main__":
  main()
