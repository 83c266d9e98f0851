"""What counts as a matrix, what Muon does to it, and that runs resume."""

import dataclasses
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.train import __main__ as train_main
from aunet_jax.train import optimizer, state
from aunet_jax.train.step import loss_sums, make_train_step

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow  # Newton-Schulz of many shapes is slow to compile
NO_DECAY = "--config.optimizer.weight_decay=0"
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"


def tiny(*flags) -> config_lib.Config:
  return config_lib.parse_flags([TINY, *flags])


def random_batch() -> dict[str, np.ndarray]:
  B, L = 8, 128
  bytes_BL = np.random.default_rng(0).integers(97, 123, (B, L), np.int32)
  return {
    "bytes": bytes_BL,
    "targets": np.roll(bytes_BL, -1, axis=1),
    "levels": (np.arange(L) % 5 == 0).astype(np.int32)[None].repeat(B, 0),
    "documents": np.ones((B, L), np.int32),
    "weights": np.ones((B, L), np.int32),
  }


def is_dims(x) -> bool:
  return x is None or isinstance(x, contrib.MuonDimensionNumbers)


def flat(tree) -> dict[str, object]:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_dims)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): x
    for path, x in leaves
  }


@pytest.mark.parametrize("upsampling", ["multi_linear", "repeat", "simple"])
def test_layers_heads_and_offsets_are_known(upsampling):
  model = dataclasses.replace(
    tiny().model, upsampling=upsampling, level_loss_weight=0.1
  )
  dims = flat(optimizer.matrices(model))
  params = flat(sharding.unbox(network.abstract_params(model)))
  assert dims.keys() == params.keys()
  block = "deepest/blocks/"
  # (layers, embed, heads, head_dim) and (layers, heads, head_dim, embed).
  assert dims[block + "attention/query"] == ((1,), (2, 3))
  assert dims[block + "attention/out"] == ((1, 2), (3,))
  assert dims[block + "ffn/down"] == ((1,), (2,))
  assert dims["upsample_1/kernel"] == dims["pool_1/kernel"] == ((0,), (1,))
  tables = {name for name, x in dims.items() if x is None}
  expected = {"embed", "head", "level_head"}
  if upsampling == "multi_linear":  # sixteen matrices, one an offset
    assert dims["upsample_1/offsets"] == ((1,), (2,))
  elif upsampling == "repeat":  # an embedding of the offset
    expected.add("upsample_1/offsets")
  assert {name for name in tables if "norm" not in name} == expected
  assert all(dims[name] is None for name in params if "norm" in name)


def test_muon_turns_every_matrix_of_a_stack_by_itself():
  config = tiny("--config.optimizer.name=muon")
  tx = optimizer.make_optimizer(config)
  init = jax.jit(network.init_params, static_argnums=0)
  params = sharding.unbox(init(config.model, jax.random.key(0)))
  keys = iter(jax.random.split(jax.random.key(1), 99))
  grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
  zeros = jax.tree.map(jnp.zeros_like, params)  # no weight decay
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), zeros)
  rate = float(optimizer.learning_rate_schedule(config.optimizer, 12)(0))
  found, dims = flat(updates), flat(optimizer.matrices(config.model))
  for name, (rows, columns) in ((k, v) for k, v in dims.items() if v):
    batch = [i for i in range(found[name].ndim) if i not in rows + columns]
    x = found[name].transpose(*batch, *rows, *columns)
    fan_in = math.prod(found[name].shape[i] for i in rows)
    fan_out = math.prod(found[name].shape[i] for i in columns)
    singular = jnp.linalg.svd(
      x.reshape(-1, fan_in, fan_out), compute_uv=False
    ) / (0.2 * rate * math.sqrt(max(fan_in, fan_out)))
    # Five Newton-Schulz steps leave singular values near 1, on purpose not
    # at it (Jordan et al. 2024); the smallest of a square matrix lag.
    assert singular.max() < 1.3 and jnp.median(singular) > 0.6, name
    assert singular.min() > 0.05, name
  # One rate serves both: updates have the root mean square of AdamW's.
  rms = jnp.sqrt(jnp.square(found["deepest/blocks/ffn/up"]).mean()) / rate
  assert 0.1 < rms < 0.3


@pytest.mark.parametrize(
  "settings",
  [
    [],
    ["optimizer.name=muon"],
    ["optimizer.name=muon", "optimizer.stage_lr=0,1", "optimizer.average=0.9"],
  ],
  ids=["adamw", "muon", "frozen, averaged"],
)
def test_its_memory_is_that_of_its_arrays(settings):
  config = tiny(*(f"--config.{s}" for s in settings))
  init = jax.jit(network.init_params, static_argnums=0)
  params = sharding.unbox(init(config.model, jax.random.key(0)))
  held = optimizer.make_optimizer(config).init(params)
  size = sum(x.nbytes for x in jax.tree.leaves(held))
  assert optimizer.state_bytes(config) == size
  # By hand: one moment of a matrix with Muon, else two, and the counters.
  leaves, dims = flat(params), flat(optimizer.matrices(config.model))
  expected = 0
  for name, x in leaves.items():
    frozen = bool(config.optimizer.stage_lr) and in_stage_1(name)
    one = config.optimizer.name == "muon" and dims[name] is not None
    moments = 0 if frozen else 1 if one else 2
    expected += x.nbytes * (moments + (config.optimizer.average is not None))
  assert 0 <= size - expected <= 64


def test_another_optimizer_is_named(capsys, tmp_path):
  workdir = f"--workdir={tmp_path / 'run'}"
  assert train_main.main([TINY, workdir, "--config.optimizer.name=moun"]) == 2
  error = capsys.readouterr().err
  assert "optimizer.name='moun'" in error and "muon" in error


def updates_of(config, params, grads):
  """The update of a first step."""
  tx = optimizer.make_optimizer(config)
  return flat(jax.jit(tx.update)(grads, tx.init(params), params)[0])


@pytest.fixture(scope="module")
def leaves():
  """Parameters and gradients of the tiny model, none of them zero."""
  init = jax.jit(network.init_params, static_argnums=0)
  params = sharding.unbox(init(tiny().model, jax.random.key(0)))
  keys = iter(jax.random.split(jax.random.key(1), 99))
  grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
  return params, grads


def in_stage_1(name: str) -> bool:
  return not name.startswith("deepest")


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=SLOW)])
def test_factors_multiply_rates_and_decays(leaves, name):
  plain = f"--config.optimizer.name={name}"
  far = "--config.optimizer.clip_norm=1e6"  # nothing is clipped
  params, grads = leaves
  usual = updates_of(tiny(plain, far), params, grads)
  bare = updates_of(tiny(plain, far, NO_DECAY), params, grads)
  changed = updates_of(
    tiny(
      plain,
      far,
      "--config.optimizer.stage_lr=0.5,2",
      "--config.optimizer.stage_decay=3,0",
      "--config.optimizer.head_lr=4",
      "--config.optimizer.no_decay=norms,embeddings",
    ),
    params,
    grads,
  )
  for path, found in changed.items():
    rate, decay = (0.5, 3.0) if in_stage_1(path) else (2.0, 0.0)
    if path == "head":
      rate *= 4
    if path == "embed" or path.endswith("scale"):
      decay = 0.0
    expected = rate * (bare[path] + decay * (usual[path] - bare[path]))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=SLOW)])
def test_a_frozen_stage_does_not_move_and_costs_nothing(leaves, name):
  config = tiny(
    f"--config.optimizer.name={name}", "--config.optimizer.stage_lr=0,1"
  )
  params, _ = leaves
  tx = optimizer.make_optimizer(config)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  start = state.create_state(config.model, tx, mesh, 0)
  whole = state.create_state(config.model, optimizer.make_optimizer(
    tiny(f"--config.optimizer.name={name}")), mesh, 0)  # fmt: skip
  size = sum(x.size for k, x in flat(start.params).items() if in_stage_1(k))
  held = [sum(x.size for x in jax.tree.leaves(s.opt_state))
          for s in (whole, start)]  # fmt: skip
  assert held[0] - held[1] >= size
  batch = random_batch()
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    after, metrics = jax.jit(make_train_step(config, tx))(start, batch)
    (_, _), grads = jax.jit(
      jax.value_and_grad(loss_sums, argnums=1, has_aux=True), static_argnums=0
    )(AUNet(config.model), start.params, batch, metrics["targets"])
  moved = {
    path: bool((x != y).any())
    for (path, x), y in zip(
      flat(start.params).items(), flat(after.params).values(), strict=True
    )
  }
  assert {path for path, x in moved.items() if not x} == set(
    filter(in_stage_1, moved)
  )
  trained = [g for k, g in flat(grads).items() if not in_stage_1(k)]
  norm = math.sqrt(sum(float(jnp.square(g).sum()) for g in trained))
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
  "setting, says",
  [
    ("stage_lr=1,2,3", "3 numbers; the model has 2 stages"),
    ("stage_lr=-1,1", "at least 0"),
    ("stage_decay=fast", "'fast' must be numbers"),
    ("stage_lr=nan,1", "must be numbers"),
    ("no_decay=norm", "Did you mean 'norms'"),
    ("head_lr=-1", "optimizer.head_lr=-1.0"),
  ],
)
def test_bad_factors_are_refused(setting, says):
  with pytest.raises(ValueError, match=says):
    tiny(f"--config.optimizer.{setting}")


def test_factors_come_back_from_config_json():
  config = tiny("--config.optimizer.stage_lr=0,0.5")
  assert config.optimizer.stage_lr == (0.0, 0.5)
  assert config_lib.from_json(config.to_json()) == config


def test_schedules_meet_their_ends():
  base = config_lib.OptimizerConfig(learning_rate=1.0, warmup_steps=10)
  cosine = optimizer.learning_rate_schedule(base, 100)
  np.testing.assert_allclose([cosine(0), cosine(9)], [0.1, 1.0], rtol=1e-6)
  np.testing.assert_allclose(cosine(99), 0.01, rtol=1e-4)
  wsd = optimizer.learning_rate_schedule(
    dataclasses.replace(base, schedule="wsd", decay_steps=20), 100
  )
  np.testing.assert_allclose([wsd(50), wsd(79)], [1.0, 1.0])
  np.testing.assert_allclose(wsd(99), 0.01, rtol=1e-4)


def test_the_running_mean_is_that_of_the_parameters():
  tx = optimizer.averaged(optax.sgd(1.0), decay=0.3)
  params = {"x": jnp.array([1.0, -2.0])}
  state_now, mean = tx.init(params), np.array([1.0, -2.0])
  for t in range(5):
    grads = {"x": jnp.array([t + 1.0, -0.5])}
    updates, state_now = tx.update(grads, state_now, params)
    params = optax.apply_updates(params, updates)
    keep = min(0.3, (1 + t) / (10 + t))
    mean = keep * mean + (1 - keep) * np.asarray(params["x"])
  np.testing.assert_allclose(state_now.average["x"], mean, rtol=1e-6)
  assert int(state_now.count) == 5
