"""The paper's Tables 9 and 10 recomputed from shapes, batches and steps."""

import math

import pytest

from aunet_jax.aunet import counts
from aunet_jax.scaling import laws
from tests.scaling import published_runs
from tests.scaling.published_runs import FIXED_BUDGET_RUNS, config_for_budget

SCALING = (
  published_runs.AUNET2_LADDER
  + published_runs.AUNET3_LADDER
  + published_runs.BPE_LADDER
)
AUNET = published_runs.AUNET2_LADDER + published_runs.AUNET3_LADDER
EVERY = SCALING + FIXED_BUDGET_RUNS


def name(run):
  return run.name.replace(" ", "-")


def as_printed(value):
  return float(f"{value:.1e}")  # two digits


def test_every_row_is_there():
  assert [
    len(t) for t in (published_runs.AUNET2_LADDER, published_runs.AUNET3_LADDER)
  ] == [12, 12]
  assert len(published_runs.BPE_LADDER) == 12 and len(FIXED_BUDGET_RUNS) == 10


@pytest.mark.parametrize("run", AUNET, ids=name)
def test_aunet_scaling_runs_have_ratio_10(run):
  assert run.ratio == pytest.approx(10, abs=0.05)


@pytest.mark.parametrize("run", published_runs.BPE_LADDER, ids=name)
def test_bpe_scaling_runs_have_ratio_10(run):
  assert run.ratio == pytest.approx(10, abs=0.05)


def test_the_ratio_counts_the_output_head_out():
  def ratio(run, head):
    flops = counts.paper_flops_per_byte(run.model, head=head)
    return laws.data_to_model_ratio(run.units, flops, 1.0)

  smallest = published_runs.AUNET2_LADDER[0]
  assert abs(ratio(smallest, False) - 10) < 0.002 < 0.01
  assert abs(ratio(smallest, True) - 10) > 0.01


@pytest.mark.parametrize("run", SCALING, ids=name)
def test_learning_rate_and_batch_follow_the_laws(run):
  rate, batch = laws.aunet_learning_rate, laws.aunet_batch_bytes
  if run.is_bpe:
    rate, batch = laws.bpe_learning_rate, laws.bpe_batch_tokens
  assert rate(run.compute) == pytest.approx(run.learning_rate, rel=0.01)
  assert batch(run.compute) == pytest.approx(run.units_per_step, rel=0.07)


@pytest.mark.parametrize("run", EVERY, ids=name)
def test_printed_flops_and_batches(run):
  flops = counts.paper_flops_per_byte(run.model)
  close = flops == pytest.approx(run.printed_flops_per_unit, rel=0.02)
  assert close or as_printed(flops) == run.printed_flops_per_unit
  assert as_printed(run.units_per_step) == run.printed_units_per_step
  assert flops * run.units == pytest.approx(run.printed_flops, rel=0.05)


@pytest.mark.parametrize(
  ("run_name", "millions"),
  [
    ("AU-Net 2-1B", 1324),
    ("AU-Net 3-1B", 2500),
    ("AU-Net 4-1B", 4170),
    ("AU-Net 4-dm8", 4453),
    ("AU-Net 2-7B", 7961),
    ("BPE 1B", 1810),
    ("BPE 7B", 7527),
  ],
)
def test_sizes_of_the_published_models(run_name, millions):
  (run,) = [run for run in FIXED_BUDGET_RUNS if run.name == run_name]
  total = counts.num_parameters(run.model)
  assert total == pytest.approx(millions * 1e6, rel=1e-3)


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("compute", [1e17, 1e18, 1e19, 1e20, 1e21, 1e22])
def test_a_config_spends_its_budget_by_the_laws(compute, num_stages):
  config = config_for_budget(compute, num_stages)
  assert config.model.num_stages == num_stages
  flops = counts.paper_flops_per_byte(config.model, head=False)
  row = config.model.capacities[0]
  total_bytes = config.train.num_steps * config.train.batch_size * row
  assert flops * total_bytes == pytest.approx(compute, rel=0.02)
  ratio = laws.data_to_model_ratio(total_bytes, flops, 1.0)
  assert 10 / 4 < ratio < 10 * 4
  assert config.optimizer.learning_rate == laws.aunet_learning_rate(compute)
  batch_bytes = config.train.batch_size * row
  law = laws.aunet_batch_bytes(compute)
  assert abs(batch_bytes - law) <= row / 2 + 1


def test_a_budget_of_the_ladder_gives_its_model():
  run = published_runs.AUNET3_LADDER[7]
  config = config_for_budget(run.compute, 3)
  assert config.model == run.model
  assert config.train.num_steps * config.train.batch_size == pytest.approx(
    run.units / run.length, rel=0.01
  )


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    ((1e20, 5), "num_stages=5"),
    ((-1.0, 2), "compute=-1.0"),
    ((math.nan, 2), "compute=nan"),
    ((1e20, 2, 0.0), "ratio=0.0"),
    ((1e26, 2), "budgets of .* to .* FLOPs"),
  ],
)
def test_what_no_law_covers_is_refused(arguments, match):
  with pytest.raises(ValueError, match=match):
    config_for_budget(*arguments)
