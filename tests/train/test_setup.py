"""What a run checks before it opens anything."""

import math
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


def test_matrices_divide_over_the_devices():
  config = config_lib.parse_flags([TINY, "--config.mesh.fsdp=4"])
  setup.check_width(config, sharding.make_mesh(config.mesh))
  config = config_lib.parse_flags([TINY, "--config.model.stages[0].dim=48"])
  mesh = sharding.make_mesh(config_lib.MeshConfig(fsdp=8))
  setup.check_width(config, mesh)
  config = config_lib.parse_flags(
    [TINY, "--config.model.stages[0].dim=36",
     "--config.model.stages[0].head_dim=18"]
  )  # fmt: skip
  with pytest.raises(ValueError, match="fsdp=8 .* 36, 64; use a divisor of 4,"):
    setup.check_width(config, mesh)


@pytest.mark.parametrize(
  ("setting", "num_processes", "most"),
  [
    (None, 1, math.inf),
    (None, 2, 10e9),
    (True, 64, math.inf),
    (False, 1, -1),
    (False, 64, -1),
  ],
)
def test_who_builds_an_index_that_is_missing(setting, num_processes, most):
  config = config_lib.parse_flags(
    [TINY, f"--config.data.build_index={setting}"]
  )
  how = setup.who_builds(config, Path("cache"), num_processes)
  assert how.most_bytes == most
  assert (how.num_workers, how.share) == (1, (0, 1))
  if most < math.inf:
    assert f"{num_processes} processes would wait" in how.refusal
    assert f"prepare --index={Path.cwd()}/cache" in how.refusal


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (["model.stages[0].capacity=1000000000"], "1,000,000,000 positions take"),
    (["train.batch_size=1000000000"], "1,000,000,000 rows of 128 positions"),
    (["model.stages[1].num_layers=1000000000"], "a model of .* parameters"),
    (
      ["model.stages[0].dim=1000000000", "model.stages[0].head_dim=1000000000"],
      "a model of .* parameters takes .* GB with its optimizer state",
    ),
    (["train.batch_size=16"], None),
  ],
)
def test_what_fits_no_machine_is_said_at_once(flags, says):
  config = config_lib.parse_flags([TINY, *(f"--config.{f}" for f in flags)])
  mesh = sharding.make_mesh(config.mesh)
  if says is None:
    setup.check_size(config, mesh)
  else:
    with pytest.raises(ValueError, match=says):
      setup.check_size(config, mesh)
