"""Sums of a training step, where float32 or bfloat16 would lose some."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import loss, network, sharding
from aunet_jax.train import state
from aunet_jax.train.step import make_train_step


def test_targets_are_counted_beyond_2_to_the_24():
  shape = (4097, 4096)  # 2^24 + 4096 targets, the last one apart
  weights = np.ones(shape, np.int8)
  weights[-1, 1:] = 0
  batch = {"weights": weights, "targets": np.zeros(shape, np.int8)}
  num_targets, num_bytes = jax.jit(loss.count_targets)(batch)
  assert int(num_targets) == int(num_bytes) == 2**24 + 1
  half = batch | {"weights": weights[:2, :3] * 0.5, "targets": weights[:2, :3]}
  assert float(loss.count_targets(half)[0]) == 3.0  # shares of a target


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
  """Many microbatches, each with a gradient that bfloat16 sums would drop."""
  stage = config_lib.StageConfig(
    dim=16, num_layers=1, head_dim=8, window=8, capacity=8
  )
  config = config_lib.Config(
    model=config_lib.ModelConfig(
      stages=(stage,), param_dtype="bfloat16", dtype="float32"
    ),
  )
  rng = np.random.default_rng(0)
  row = rng.integers(0, 256, (1, 8), np.int32)
  batch = {
    "bytes": row,
    "targets": np.roll(row, -1, 1),
    "levels": np.zeros_like(row),
    "documents": np.ones_like(row),
    "weights": np.ones_like(row),
  }
  tx = optax.sgd(1.0)
  key = jax.random.key(0)
  params = sharding.unbox(network.init_params(config.model, key))
  zero = jnp.zeros((), jnp.int32)

  def grad_norm(num_rows):
    settings = config_lib.TrainConfig(
      batch_size=num_rows, grad_accumulation=num_rows
    )
    rows = {name: np.repeat(x, num_rows, 0) for name, x in batch.items()}
    start = state.TrainState(zero, params, tx.init(params), zero, zero)
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
      after, metrics = jax.jit(
        make_train_step(dataclasses.replace(config, train=settings), tx)
      )(start, rows)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after.params))
    return float(metrics["grad_norm"])

  # Every row is the same: 512 equal parts, which stop growing in bfloat16
  # once the sum is 256 times a part.
  assert grad_norm(512) == pytest.approx(grad_norm(1), rel=1e-3)
