"""Valleys of a budget: intervals and laws of allocation."""

import numpy as np
import pytest
import threadpoolctl

from aunet_jax.scaling import valleys as valleys_lib
from aunet_jax.scaling.valleys import power_line
from tests.scaling.test_fit import coverage, published


@pytest.fixture(autouse=True)
def _one_thread():
  """As the command does; see `analysis.analyse`."""
  with threadpoolctl.threadpool_limits(1, "blas"):
    yield


def test_intervals_of_a_best_size_hold_the_truth_where_parabolas_are_exact():
  found = coverage("isoflop, symmetric, 1/4 to 4, noise 0.5%", 300, 100)
  share, width = found["size_exponent"]
  assert 0.9 <= share <= 0.99 and width < 0.3


@pytest.mark.parametrize("drop_flagged", [True, False])
def test_valleys_of_every_published_set_give_a_law_of_allocation(drop_flagged):
  table = published("isoflops_published.csv")
  sets = {}
  for row in table.rows:
    if not (drop_flagged and row.flagged):
      budgets = sets.setdefault(row.model, {})
      budgets.setdefault(row.budget_flops, []).append(row)
  assert len(sets) == 8
  for name, budgets in sets.items():
    valleys = []
    for budget, rows in budgets.items():
      columns = np.array([[r.params, r.bytes, r.loss] for r in rows]).T
      if len(set(columns[0])) >= 3:
        one = valleys_lib.valley(budget, *columns)
        valleys += [] if one.problem else [one]
    compute, best = np.array([[v.compute, v.best_size] for v in valleys]).T
    assert compute.size >= 5, name
    assert 0.35 < power_line(compute, best)[1] < 0.65, name
