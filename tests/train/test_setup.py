"""What a run checks before it opens anything."""

from pathlib import Path

import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import sharding
from aunet_jax.train import setup

TINY = f"--config={Path(__file__).parents[1] / 'tiny.py'}"


@pytest.mark.parametrize(
  ("batch_size", "microbatches", "says"),
  [
    (8, 1, None),
    (16, 2, None),
    (12, 1, "gives 12 rows, which do not divide over 8 devices"),
    (8, 2, "in 2 microbatches gives 4 rows.*a multiple of 16"),
  ],
)
def test_rows_divide_over_the_devices(batch_size, microbatches, says):
  config = config_lib.parse_flags(
    [
      TINY,
      f"--config.train.batch_size={batch_size}",
      f"--config.train.grad_accumulation={microbatches}",
      "--config.mesh.fsdp=2",
    ]
  )
  mesh = sharding.make_mesh(config.mesh)
  if says is None:
    setup.check_batch(config, mesh)
  else:
    with pytest.raises(ValueError, match=says):
      setup.check_batch(config, mesh)
