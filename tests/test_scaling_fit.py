"""Laws of known constants are recovered; published points give what they gave.

The published points are beside a checkout, in ../shared/data/scaling; without
them those tests are skipped.
"""

from pathlib import Path

import numpy as np
import pytest

from aunet_jax import scaling_analysis, scaling_collect
from aunet_jax import scaling_fit as fit

POINTS = Path(__file__).parents[2] / "shared" / "data" / "scaling"
SURFACE = fit.Law(1.8, (480.0, 2100.0), (0.35, 0.37))
LADDER = fit.Law(0.9, (30.0,), (0.09,))


def published(name: str) -> scaling_collect.Table:
  path = POINTS / name
  if not path.exists():
    pytest.skip(f"{path} is not there")
  return scaling_collect.load(path)


def surface_points(budgets=(1e18, 1e19, 1e20, 1e21), num_sizes=7):
  """An IsoFLOP grid about the best size: (2, N) sizes and data; budgets."""
  best = fit.allocation(SURFACE, 6.0)
  sizes, data, of_budget = [], [], []
  for budget in budgets:
    middle = np.exp(best.size_log_factor) * budget**best.size_exponent
    size = middle * np.geomspace(1 / 4, 4, num_sizes)
    sizes.append(size)
    data.append(budget / (6 * size))
    of_budget.append(np.full(num_sizes, budget))
  return np.array([np.concatenate(sizes), np.concatenate(data)]), (
    np.concatenate(of_budget)
  )


@pytest.mark.parametrize("function", [fit.least_squares, fit.huber])
def test_points_on_a_law_give_the_law(function):
  x_KN, _ = surface_points()
  law = function(x_KN, fit.predict(SURFACE, x_KN))
  assert law.offset == pytest.approx(SURFACE.offset, rel=1e-4)
  np.testing.assert_allclose(law.coefficients, SURFACE.coefficients, rtol=5e-3)
  np.testing.assert_allclose(law.exponents, SURFACE.exponents, rtol=5e-4)


def test_one_outlier_moves_least_squares_and_not_huber():
  x_KN, _ = surface_points()
  loss_N = fit.predict(SURFACE, x_KN)
  loss_N[3] *= 1.2
  far = fit.least_squares(x_KN, loss_N)
  near = fit.huber(x_KN, loss_N)
  assert abs(near.exponents[0] - 0.35) < 0.005 < abs(far.exponents[0] - 0.35)


def test_a_term_the_data_do_not_have_gets_no_weight():
  x_KN, _ = surface_points()
  law = fit.least_squares(x_KN, 1.0 + 50 * x_KN[1] ** -0.2)
  assert law.exponents[1] == pytest.approx(0.2, rel=1e-3)
  size_term = law.coefficients[0] * x_KN[0] ** -law.exponents[0]
  assert np.ptp(size_term) < 1e-4


@pytest.mark.parametrize(
  "x, loss, message",
  [
    ([[1.0, 2.0]], [3.0, 2.0], "2 points cannot fix 3 parameters"),
    ([[1.0, 2.0, 0.0]], [3.0, 2.0, 1.0], "above 0"),
    ([[1.0, 2.0, 3.0]], [3.0, 2.0, np.nan], "above 0"),
    ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], "give"),
  ],
)
def test_points_that_cannot_be_fitted_are_refused(x, loss, message):
  for function in (fit.least_squares, fit.huber):
    with pytest.raises(ValueError, match=message):
      function(np.array(x), np.array(loss))


def test_the_frontier_is_where_the_loss_of_a_budget_is_lowest():
  best = fit.allocation(SURFACE, 6.0)
  for budget in (1e18, 1e22):
    size = np.geomspace(1e6, 1e12, 20001)
    loss = fit.predict(SURFACE, np.array([size, budget / (6 * size)]))
    predicted = np.exp(best.size_log_factor) * budget**best.size_exponent
    assert size[loss.argmin()] == pytest.approx(predicted, rel=1e-3)
    data = np.exp(best.data_log_factor) * budget**best.data_exponent
    assert 6 * predicted * data == pytest.approx(budget)


# ----- published points -----------------------------------------------------

# Besiroglu et al. 2024 (arXiv 2404.10102): value, standard error.
EPOCH = {
  "E": (1.8172, 0.03),
  "A": (482.01, 124.58),
  "B": (2085.43, 1293.23),
  "alpha": (0.3478, 0.02),
  "beta": (0.3658, 0.02),
}


def test_the_chinchilla_points_give_what_epoch_published():
  """Without the five highest losses, as they did."""
  table = published("chinchilla_epoch_extracted.csv")
  options = scaling_analysis.Options(drop_highest=5, bootstrap=50)
  result = scaling_analysis.analyse(table, options)
  assert len(result["dropped"]) == 5
  model = result["models"]["points"]
  assert model["runs"] == 240
  for name, (value, error) in EPOCH.items():
    found = model["huber"]["parameters"][name]
    assert abs(found["value"] - value) < 0.1 * error, name
    # Their errors are those of resampled points, as ours.
    assert 0.5 < (found["high"] - found["low"]) / (2 * 1.96 * error) < 2, name


@pytest.mark.parametrize("drop_flagged", [True, False])
def test_valleys_of_every_published_set_give_a_law_of_allocation(drop_flagged):
  table = published("isoflops_published.csv")
  sets = {}
  for row in table.rows:
    if not (drop_flagged and row["flagged"]):
      budgets = sets.setdefault(row["model"], {})
      budgets.setdefault(row["budget_flops"], []).append(row)
  assert len(sets) == 8
  for name, budgets in sets.items():
    valleys = []
    for budget, rows in budgets.items():
      columns = np.array([[r["params"], r["bytes"], r["loss"]] for r in rows]).T
      if len(set(columns[0])) >= 3:
        one = fit.valley(budget, *columns)
        valleys += [] if one.problem else [one]
    compute, best = np.array([[v.compute, v.best_size] for v in valleys]).T
    assert compute.size >= 5, name
    assert 0.35 < fit.power_line(compute, best)[1] < 0.65, name


@pytest.mark.slow
def test_every_fit_runs_on_every_published_set():
  table = published("isoflops_published.csv")
  options = scaling_analysis.Options(drop_flagged=True, bootstrap=50)
  result = scaling_analysis.analyse(table, options)
  assert len(result["models"]) == 8
  flagged = [row["id"] for row in table.rows if row["flagged"]]
  assert [item["id"] for item in result["dropped"]] == flagged
  for name, model in result["models"].items():
    for method in ("isoflop", "huber", "vpnls"):
      found = model[method]["allocation"]["size_exponent"]
      assert found["low"] < found["value"] < found["high"], (name, method)
