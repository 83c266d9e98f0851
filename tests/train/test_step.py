"""The update: pure, the same over meshes and microbatches, with exact sums."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import loss, network, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.train import optimizer, state, step
from aunet_jax.train.step import make_train_step
from tests.tiny_runs import batch_of, new_params, tiny, write_corpus


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


ONE_DEVICE = config_lib.MeshConfig(data=1, fsdp=1, tensor=1)


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> dict:
  return batch_of(write_corpus(tmp_path_factory.mktemp("batch") / "corpus"))


def step_on(mesh_config, config, batch, num_steps=1):
  """Losses and final parameters of some steps on one batch."""
  sizes = [mesh_config.data, mesh_config.fsdp, mesh_config.tensor]
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = sharding.make_mesh(mesh_config, devices)
  tx = optimizer.make_optimizer(config)
  train_state = state.create_state(config.model, tx, mesh, config.seed)
  where = sharding.batch_sharding(mesh)
  placed = {k: jax.device_put(v, where) for k, v in batch.items()}
  losses = []
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    step = jax.jit(make_train_step(config, tx))
    for _ in range(num_steps):
      train_state, step_metrics = step(train_state, placed)
      losses.append(
        float(step_metrics["nats"]) / float(step_metrics["targets"])
      )
  return losses, jax.device_get(train_state.params)


def test_step_is_adamw_on_the_mean_over_all_targets(batch):
  config = tiny()
  tx = optimizer.make_optimizer(config)
  params = new_params(config.model, jax.random.key(config.seed))
  model = AUNet(config.model)

  def mean_nats(p):
    logits_BLV = model.apply(
      {"params": p}, batch["bytes"], batch["levels"], batch["documents"]
    )
    log_BLV = jax.nn.log_softmax(logits_BLV)
    picked_BL = jnp.take_along_axis(
      log_BLV, jnp.asarray(batch["targets"])[..., None], axis=-1
    )[..., 0]
    return -(picked_BL * batch["weights"]).sum() / batch["weights"].sum()

  value, grads = jax.jit(jax.value_and_grad(mean_nats))(params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  expected = optax.apply_updates(params, updates)
  losses, got = step_on(ONE_DEVICE, config, batch)
  assert losses[0] == pytest.approx(float(value), rel=1e-5)
  # Adam divides by sqrt of the squared gradient: tiny gradients amplify
  # rounding, so the bound is a small part of the learning rate.
  rate = config.optimizer.learning_rate
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=0.02 * rate),
    got,
    jax.device_get(expected),
  )


@pytest.fixture(scope="module")
def on_one_device(batch):
  """Losses of four steps."""
  losses, _ = step_on(ONE_DEVICE, tiny(), batch, 4)
  assert losses[-1] < losses[0]
  return losses


@pytest.mark.parametrize(
  "shape",
  [
    (2, 2, 2),
    (1, 8, 1),
    pytest.param((8, 1, 1), marks=pytest.mark.slow),
    pytest.param((1, 4, 2), marks=pytest.mark.slow),
  ],
)
def test_every_mesh_gives_the_same_losses(batch, on_one_device, shape):
  sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
  other, _ = step_on(config_lib.MeshConfig(**sizes), tiny(), batch, 4)
  np.testing.assert_allclose(other, on_one_device, rtol=1e-5)


def test_microbatches_equal_one_batch(batch, on_one_device):
  config = tiny()
  mesh = config_lib.MeshConfig(data=2, fsdp=1, tensor=1)
  split = dataclasses.replace(
    config, train=dataclasses.replace(config.train, grad_accumulation=4)
  )
  parts, _ = step_on(mesh, split, batch, 3)
  np.testing.assert_allclose(parts, on_one_device[:3], rtol=1e-5)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(batch, what, monkeypatch):
  config = tiny()
  tx = optimizer.make_optimizer(config)
  params = new_params(config.model, jax.random.key(0))
  if what == "loss":
    params["head"] = params["head"].at[0, 0].set(jnp.inf)
  else:  # a root is finite where its slope is not

    def root(model, params, batch, num_targets):
      nothing = jnp.sqrt(0 * params["head"].sum())
      return nothing, (nothing, nothing, ())

    monkeypatch.setattr(step, "loss_sums", root)
  zero = jnp.zeros((), jnp.int32)
  before = state.TrainState(zero, params, tx.init(params), zero, zero)
  after, _ = jax.jit(make_train_step(config, tx))(before, batch)
  for old, new in zip(
    jax.tree.leaves((before.params, before.opt_state)),
    jax.tree.leaves((after.params, after.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(old, new)
  assert (after.step, after.nonfinite_in_row, after.nonfinite_total) == (
    1,
    1,
    1,
  )
