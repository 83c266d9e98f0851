"""Laws of known constants are recovered; published points give what they gave.

The published points are beside a checkout, in ../shared/data/scaling; without
them those tests are skipped.
"""

from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from scipy import stats

from aunet_jax.scaling import analysis, collect, fit
from aunet_jax.scaling.study import Description, Run, Table
from benchmarks import scaling_coverage

POINTS = Path(__file__).parents[3] / "shared" / "data" / "scaling"
SURFACE = fit.Law(1.8, (480.0, 2100.0), (0.35, 0.37))
LADDER = fit.Law(0.9, (30.0,), (0.09,))


@pytest.fixture(autouse=True)
def _one_thread():
  """As the command does; see `analysis.analyse`."""
  with threadpoolctl.threadpool_limits(1, "blas"):
    yield


def published(name: str) -> Table:
  path = POINTS / name
  if not path.exists():
    pytest.skip(f"{path} is not there")
  return collect.load(path)


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


def test_a_line_in_logs_needs_two_points_and_has_no_offset():
  x_KN = np.geomspace(1e12, 1e15, 3)[None]
  law = fit.no_offset(x_KN, 40 * x_KN[0] ** -0.1)
  assert law.coefficients[0] == pytest.approx(40) and law.offset == 0
  assert law.exponents[0] == pytest.approx(0.1) and law.num_parameters == 2
  assert list(fit.parameters(law)) == ["A", "alpha"]
  with pytest.raises(ValueError, match="1 points cannot fix 2"):
    fit.no_offset(x_KN[:, :1], np.array([2.0]))


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
    ([[1.0, 2.0]] * 2, [3.0, 2.0], "2 points cannot fix 5 parameters"),
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


# ----- intervals ------------------------------------------------------------


def coverage(design: str, trials: int, bootstrap: int) -> dict:
  """Parameter -> (share of intervals that hold the truth, median width)."""
  trial, *_ = scaling_coverage.designs()[design]
  seen = {}
  for seed in range(trials):
    found = trial(np.random.default_rng([1, seed]), seed, bootstrap)
    for name, value in found.items():
      seen.setdefault(name, []).append(value)
  return {
    name: tuple(float(f(column)) for f, column in
                zip((np.mean, np.median), zip(*values, strict=True),
                    strict=True))
    for name, values in seen.items()
  }  # fmt: skip


def test_intervals_of_a_ladder_hold_the_truth_as_often_as_they_say():
  """Two degrees of freedom: without Student's t they would do so rarely."""
  found = coverage("power law, 5 budgets x 3 seeds, noise 0.5%", 40, 60)
  for name, (share, width) in found.items():
    assert share >= 0.85, name
    assert width < (0.1 if name == "loss_beyond" else 4), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vpnls", "huber"])
def test_intervals_of_the_parametric_law_hold_the_truth(method):
  found = coverage(f"{method}, 4 x 7, noise 0.5%", 60, 100)
  for name, (share, _) in found.items():
    assert share >= 0.85, name


def test_few_points_give_wider_intervals_or_none():
  x_KN = np.geomspace(1e13, 1e16, 4)[None]
  noise = np.exp([0.002, -0.003, 0.003, -0.001])
  loss_N = fit.predict(LADDER, x_KN) * noise
  law = fit.least_squares(x_KN, loss_N)
  refits = fit.bootstrap(
    fit.least_squares, law, x_KN, loss_N, number=60, seed=0
  )
  assert (refits.degrees, refits.resampled) == (1, "residuals")
  values = np.array([one.exponents[0] for one in refits.laws])
  few = fit.interval(law.exponents[0], values, 1)
  many = fit.interval(law.exponents[0], values, 1000)
  assert few[1] - few[0] > 6 * (many[1] - many[0])
  three = fit.least_squares(x_KN[:, :3], loss_N[:3])
  refits = fit.bootstrap(
    fit.least_squares, three, x_KN[:, :3], loss_N[:3], number=60, seed=0
  )
  assert refits is None


def test_the_fit_of_noisy_points_is_where_its_own_loss_is_lowest():
  """Any small step from what was found is no better."""
  x_KN, _ = surface_points()
  rng = np.random.default_rng(3)
  loss_N = fit.predict(SURFACE, x_KN) * np.exp(rng.normal(0, 0.01, 28))

  def squares(law):
    return np.sum((fit.predict(law, x_KN) - loss_N) ** 2)

  def huber(law, delta=fit.HUBER_DELTA):
    size_N = np.abs(np.log(fit.predict(law, x_KN) / loss_N))
    return np.sum(
      np.where(size_N <= delta, size_N**2 / 2, delta * (size_N - delta / 2))
    )

  for function, cost in ((fit.least_squares, squares), (fit.huber, huber)):
    law = function(x_KN, loss_N)
    found = np.array([law.offset, *law.coefficients, *law.exponents])
    for step in (*np.eye(5), *rng.normal(size=(20, 5))):
      for size in (-1e-3, 1e-3):
        one = found * np.exp(size * step)
        near = fit.Law(one[0], tuple(one[1:3]), tuple(one[3:]))
        assert cost(near) >= cost(law) * (1 - 1e-6), function
    # From where it is, the search stays; from near, it comes back.
    again = function(x_KN, loss_N, start=law)
    assert cost(again) <= cost(law) * (1 + 1e-6)
    near = fit.Law(law.offset, law.coefficients, tuple(found[3:] * 1.05))
    assert cost(function(x_KN, loss_N, start=near)) <= cost(law) * 1.001


def test_residuals_are_enlarged_for_the_parameters_that_were_fitted():
  x_KN = np.geomspace(1e13, 1e16, 6)[None]
  noise = np.exp([0.002, -0.003, 0.003, -0.001, 0.001, -0.002])
  loss_N = fit.predict(LADDER, x_KN) * noise
  law = fit.least_squares(x_KN, loss_N)
  assert law.num_parameters == 3 and SURFACE.num_parameters == 5
  refits = fit.bootstrap(
    fit.least_squares, law, x_KN, loss_N, number=50, seed=0
  )
  rest_N = np.log(loss_N / fit.predict(law, x_KN)) * np.sqrt(6 / (6 - 3))
  assert np.isin(refits.noise_R.round(12), rest_N.round(12)).all()
  many_KN = np.geomspace(1e13, 1e16, 24)[None]
  for points, resampled in ((24, "cases"), (23, "residuals")):
    x_KN = many_KN[:, :points]
    loss_N = fit.predict(LADDER, x_KN) * np.exp(0.001 * np.cos(x_KN[0]))
    refits = fit.bootstrap(
      fit.least_squares,
      fit.least_squares(x_KN, loss_N), x_KN, loss_N, number=3, seed=0,
    )  # fmt: skip
    assert (refits.resampled, refits.degrees) == (resampled, points - 3)


def test_an_interval_is_stretched_by_students_t():
  values_R = np.linspace(1.0, 3.0, 1001)
  ratio = stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975)
  low, high = fit.interval(2.0, values_R, 2)
  assert (low, high) == pytest.approx((2 - 0.95 * ratio, 2 + 0.95 * ratio))
  low, high = fit.interval(2.0, values_R, 2, logs=True)
  assert low == pytest.approx(2 * (1.05 / 2) ** ratio)
  assert high == pytest.approx(2 * (2.95 / 2) ** ratio)
  low, _ = fit.interval(0.2, values_R / 10, 2, logs=True)
  assert low == pytest.approx(0.2 * (1.05 / 2) ** ratio)
  assert fit.interval(0.0, values_R, 2, logs=True) == (0.0, 2.95)
  assert fit.interval(2.0, values_R - 1.5, 2, logs=True)[0] == 0.0


def test_parameters_have_the_interval_of_their_kind():
  """A and B in logs, exponents and E not; E not below 0."""
  laws = [fit.Law(e, (a,), (0.1 * a,)) for e, a in ((-1, 2), (0, 3), (2, 5))]
  refits = fit.Replicates(laws, np.zeros(3), 2, "residuals")
  law = laws[1]._replace(offset=0.5)
  spans = fit.parameter_intervals(law, refits)
  values = {name: np.array([fit.parameters(one)[name] for one in laws])
            for name in ("E", "A", "alpha")}  # fmt: skip
  approx = pytest.approx
  assert spans["A"] == approx(fit.interval(3, values["A"], 2, logs=True))
  assert spans["alpha"] == approx(fit.interval(0.3, values["alpha"], 2))
  assert spans["E"] == approx((0.0, fit.interval(0.5, values["E"], 2)[1]))


def test_a_band_is_of_what_the_refits_predict_in_logs():
  laws = [fit.Law(0, (a,), (0.2,)) for a in (1.0, 3.0, 9.0)]
  refits = fit.Replicates(laws, np.array([0.1, -0.1, 0.2]), 2, "residuals")
  x_KN = np.array([[10.0, 1000.0]])
  for new_point in (False, True):
    found = fit.band(laws[1], refits, x_KN, new_point)
    for n in range(2):
      values = np.array([fit.predict(law, x_KN)[n] for law in laws])
      if new_point:
        values = values * np.exp(refits.noise_R)
      middle = fit.predict(laws[1], x_KN)[n]
      expected = fit.interval(middle, values, 2, logs=True)
      np.testing.assert_allclose(found[:, n], expected)


# ----- what an analysis warns of --------------------------------------------


def table(rows) -> Table:
  """Rows of (model, budget, size, seed, loss)."""
  return Table(
    Description(loss_unit="bits per byte", data_unit="bytes"),
    [
      Run(
        id=f"{model}-{budget:g}-{size:g}-s{seed}",
        model=model,
        seed=seed,
        budget_flops=budget,
        flops_per_byte=size,
        params=int(size),
        bytes=budget / size,
        useful_flops=1.1 * budget,
        loss=loss,
        heldout_bytes=5000,
        run="",
        excluded=None,
      )
      for model, budget, size, seed, loss in rows
    ],
  )


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
  options = analysis.Options(drop_highest=5, bootstrap=50)
  result = analysis.analyse(table, options)
  assert len(result["dropped"]) == 5
  model = result["models"]["points"]
  assert model["runs"] == 240
  for name, (value, error) in EPOCH.items():
    found = model["huber"]["parameters"][name]
    assert abs(found["value"] - value) < 0.1 * error, name
    # Their errors are those of resampled points, as ours.
    assert 0.5 < (found["high"] - found["low"]) / (2 * 1.96 * error) < 2, name
