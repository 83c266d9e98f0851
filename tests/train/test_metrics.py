"""Numbers of the log."""

import json

import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.train import metrics
from tests.tiny_runs import tiny

STAGE = config_lib.StageConfig(
  dim=32, num_layers=1, head_dim=16, window=16, capacity=64
)
CONFIG = config_lib.Config(
  model=config_lib.ModelConfig(stages=(STAGE,)),
  train=config_lib.TrainConfig(num_steps=100),
  optimizer=config_lib.OptimizerConfig(learning_rate=1.0, warmup_steps=50),
)


@pytest.mark.parametrize(
  ("in_row", "total", "updates"),
  [
    (0, 0, 9),
    (0, 4, 5),  # four steps before this one were skipped
    (1, 4, 6),  # this one as well: it would have been the seventh update
    (3, 3, 7),  # this one and two before it
  ],
)
def test_the_logged_rate_is_the_one_of_the_optimizer(in_row, total, updates):
  """Step 10 after some skipped ones; the warmup is linear, a 50th a step."""
  skipped = {
    "nonfinite_in_row": np.int32(in_row),
    "nonfinite_total": np.int32(total),
  }
  rate = metrics.rate_of_step(CONFIG, 10, skipped)
  assert rate == pytest.approx((updates + 1) / 50)


def test_a_loss_that_stands_out_is_logged_once_and_after_a_resume_too():
  rng = np.random.default_rng(0)

  def step_metrics(bits):
    return {
      "nats": np.float32(bits * np.log(2) * 1000),
      "bytes": np.int32(1000),
      "grad_norm": np.float32(1),
    }

  interval = metrics.Interval()
  assert interval.spike(1, step_metrics(50.0), 6) is None  # nothing to compare
  for step in range(2, 302):
    usual = step_metrics(2 + 0.05 * rng.standard_normal())
    assert interval.spike(step, usual, 6) is None
  assert interval.spike(302, step_metrics(np.nan), 6) is None
  resumed = metrics.Interval(json.loads(json.dumps(interval.to_json())))
  row = interval.spike(303, step_metrics(3.5), 6)
  assert row == resumed.spike(303, step_metrics(3.5), 6)
  assert row["step"] == 303 and row["spike_bits_per_byte"] > 3.4
  assert row["usual_bits_per_byte"] < 3
  assert interval.spike(304, step_metrics(2.0), 6) is None


def test_an_interval_without_a_finite_loss_is_null():
  config = tiny()
  interval = metrics.Interval()
  step_metrics = {
    "nats": np.float32("nan"),
    "level_nats": np.float32(0),
    "ahead_nats": (),
    "targets": np.float32(10),
    "bytes": np.int32(9),
    "positions": np.array([10, 3]),
    "grad_norm": np.float32("inf"),
    "nonfinite_in_row": np.int32(1),
    "nonfinite_total": np.int32(1),
  }
  interval.add(step_metrics)
  row = interval.row(config, 1, step_metrics)
  assert (row["loss_nats"], row["bits_per_byte"], row["grad_norm"]) == (
    None,
  ) * 3
  assert row["bytes_seen"] == 9
  interval.add(step_metrics | {"nats": np.float32(7.0)})
  assert interval.row(config, 2, step_metrics)["loss_nats"] == pytest.approx(
    0.7
  )


def test_heads_after_the_first_are_logged_over_all_targets():
  config = config_lib.override(tiny(), ["model.heads=3"])
  step_metrics = {
    "nats": np.float32(4), "level_nats": np.float32(0),
    "ahead_nats": (np.float32(6), np.float32(8)), "targets": np.float32(10),
    "bytes": np.int32(9), "positions": np.array([10, 3]),
    "grad_norm": np.float32(1), "nonfinite_in_row": np.int32(0),
    "nonfinite_total": np.int32(0),
  }  # fmt: skip
  interval = metrics.Interval()
  interval.add(step_metrics)
  interval = metrics.Interval(json.loads(json.dumps(interval.to_json())))
  later = {"nats": np.float32(2), "ahead_nats": (np.float32(2), np.nan)}
  interval.add(step_metrics | later)
  row = interval.row(config, 2, step_metrics)
  assert row["loss_nats"] == pytest.approx(0.3)
  assert row["ahead_2_loss_nats"] == pytest.approx(0.4)
  assert row["ahead_3_loss_nats"] == pytest.approx(0.4)  # NaN is left out
  interval.reset()
  interval.add(step_metrics)
  row = interval.row(config, 3, step_metrics)
  assert row["ahead_2_loss_nats"] == pytest.approx(0.6)


def test_a_row_that_cannot_be_written_names_its_file(tmp_path):
  log = metrics.Log(tmp_path, tiny(), step=0, active=True)
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  with pytest.raises(OSError, match="No space left.*metrics.jsonl"):
    log.row({"step": 1})
  log.close()
