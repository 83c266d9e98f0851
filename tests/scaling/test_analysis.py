"""Analyses: seeds, sweeps, comparisons, and what is warned of."""

import dataclasses

import numpy as np
import pytest
import threadpoolctl

from aunet_jax.scaling import analysis, fit
from tests.scaling.test_fit import LADDER, published, table


@pytest.fixture(autouse=True)
def _one_thread():
  """As the command does; see `analysis.analyse`."""
  with threadpoolctl.threadpool_limits(1, "blas"):
    yield


def ladder_rows(budgets, seeds=1, noise=0.004, model="m"):
  rng = np.random.default_rng(0)
  loss = fit.predict(LADDER, 1.1 * np.array([budgets]))
  return [
    (model, budget, (budget / 10) ** 0.5, seed, float(v * np.exp(draw)))
    for budget, v in zip(budgets, loss, strict=True)
    for seed, draw in enumerate(rng.normal(0, noise, seeds))
  ]


def analysed(rows, **options):
  result = analysis.analyse(
    table(rows), analysis.Options(bootstrap=50, **options)
  )
  return result["models"]["m"]


def test_seeds_are_one_cell_and_do_not_pass_for_budgets():
  model = analysed(ladder_rows(np.geomspace(1e13, 1e15, 4), seeds=3))
  assert (model["runs"], len(model["cells"])) == (12, 4)
  assert model["power_law"]["degrees_of_freedom"] == 1
  cell = model["cells"][0]
  assert cell["loss"] == pytest.approx(np.mean(cell["losses"]), rel=1e-4)


def test_of_a_sweep_the_best_setting_is_fitted_and_the_others_are_listed():
  rows = []
  for rate in (1e-3, 2e-3):
    some = table(ladder_rows([1e13, 1e14], seeds=2, model="m")).rows
    worse = 0.2 if rate == 1e-3 else 0.0
    rows += [
      dataclasses.replace(
        row,
        id=f"{row.id}-{rate}",
        learning_rate=rate,
        batch_bytes=8192.0,
        loss=row.loss + worse,
      )
      for row in some
    ]
  result = analysis.analyse(
    table([])._replace(rows=rows), analysis.Options(bootstrap=50)
  )
  model = result["models"]["m"]
  assert (model["runs"], len(model["cells"])) == (4, 2)
  assert all("0.002" in cell["ids"][0] for cell in model["cells"])
  assert len(model["other_settings"]) == 2


def test_the_largest_budget_is_predicted_from_the_others():
  rows = ladder_rows(np.geomspace(1e13, 1e16, 6), noise=1e-5)
  held = analysed(rows)["power_law"]["heldout"]
  assert held["budget"] == pytest.approx(1e16)
  (point,) = held["points"]
  assert abs(point["relative_error"]) < 2e-3 and held["inside"]
  # A largest budget that breaks the law is seen to.
  model, budget, size, seed, loss = rows[-1]
  rows[-1] = (model, budget, size, seed, 1.1 * loss)
  broken = analysed(rows)["power_law"]
  assert broken["heldout"]["inside"] is False
  assert any("do not extrapolate" in line for line in broken["warnings"])


def test_what_the_data_cannot_support_is_said():
  two = analysed(ladder_rows([1e13, 1e14]))
  assert two["no_offset"]["parameters"]["alpha"]["low"] is None
  assert "2 budgets" in two["power_law"]["not_fitted"]
  assert "2 cells" in two["huber"]["not_fitted"]
  three = analysed(ladder_rows([1e13, 2e13, 3e13]))["power_law"]
  assert three["parameters"]["E"]["low"] is None
  assert any("as many parameters" in line for line in three["warnings"])
  assert any("a factor of 3 only" in line for line in three["warnings"])
  five = analysed(ladder_rows(np.geomspace(1e13, 1e15, 5)))
  assert any("degrees of freedom" in w for w in five["power_law"]["warnings"])
  assert "rise together" in five["vpnls"]["not_fitted"]
  assert "no budget has 3 sizes" in five["isoflop"]["not_fitted"]
  flat = [(*row[:4], 2.0 + 1e-3 * (i % 2)) for i, row in
          enumerate(ladder_rows(np.geomspace(1e13, 1e16, 8)))]  # fmt: skip
  warnings = " ".join(analysed(flat)["power_law"]["warnings"])
  assert "do not show that term" in warnings


def test_a_valley_at_the_edge_of_its_sizes_is_left_out_and_said():
  rows = []
  for budget in (1e13, 1e14, 1e15):
    for size in np.geomspace(1e4, 1e6, 5):
      middle = 1e5 if budget < 1e15 else 1e7
      loss = 2 + 0.02 * np.log(size / middle) ** 2
      rows.append(("m", budget, float(size), 0, float(loss)))
  isoflop = analysed(rows)["isoflop"]
  problems = [valley["problem"] for valley in isoflop["valleys"]]
  assert problems == [None, None, "is lowest beyond its sizes"]
  assert any("Add sizes" in line for line in isoflop["warnings"])
  assert any("two valleys" in line for line in isoflop["warnings"])


def test_outliers_are_named_and_dropped_only_when_asked():
  rows = ladder_rows(np.geomspace(1e13, 1e16, 12), noise=5e-4)
  model, budget, size, seed, loss = rows[5]
  rows[5] = (model, budget, size, seed, 1.05 * loss)
  name = f"m-{budget:g}-{size:g}-s0"
  kept = analysed(rows)
  assert kept["power_law"]["stand_out"] == [name] and kept["runs"] == 12
  assert analysed(rows, drop=(name,))["runs"] == 11
  with pytest.raises(ValueError, match="no usable run is called 'x'"):
    analysed(rows, drop=("x",))
  with pytest.raises(ValueError, match="too few"):
    analysis.Options(bootstrap=5)


def test_models_are_compared_at_equal_budgets_with_their_seeds():
  budgets = np.geomspace(1e13, 1e15, 3)
  rows = ladder_rows(budgets, seeds=3)
  rows += [("n", *row[1:4], row[4] - 0.1) for row in rows]
  result = analysis.analyse(table(rows), analysis.Options(bootstrap=50))
  assert [row["budget"] for row in result["comparison"]] == pytest.approx(
    budgets, rel=1e-4
  )
  for row in result["comparison"]:
    difference = row["models"]["n"]["difference"]
    assert difference["value"] == pytest.approx(-0.1, abs=1e-4)
    assert difference["low"] < -0.1 < difference["high"] < 0


@pytest.mark.slow
def test_every_fit_runs_on_every_published_set():
  table = published("isoflops_published.csv")
  options = analysis.Options(drop_flagged=True, bootstrap=50)
  result = analysis.analyse(table, options)
  assert len(result["models"]) == 8
  flagged = [row.id for row in table.rows if row.flagged]
  assert [item["id"] for item in result["dropped"]] == flagged
  for name, model in result["models"].items():
    for method in ("isoflop", "huber", "vpnls"):
      found = model[method]["allocation"]["size_exponent"]
      assert found["low"] < found["value"] < found["high"], (name, method)
