"""Numbers of the log."""

import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.train import metrics

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
