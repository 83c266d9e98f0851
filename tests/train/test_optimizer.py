"""What counts as a matrix, what Muon does to it, and that runs resume."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding
from aunet_jax.train import __main__ as train_main
from aunet_jax.train import optimizer, state
from aunet_jax.train.step import make_train_step

ROOT = Path(__file__).parents[2]
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"


def tiny(*flags) -> config_lib.Config:
  return config_lib.parse_flags([TINY, *flags])


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
  params = flat(
    sharding.unbox(
      jax.eval_shape(lambda: network.init_params(model, jax.random.key(0)))
    )
  )
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


@pytest.mark.slow  # Newton-Schulz of many shapes takes long to compile
def test_muon_gives_the_same_losses_on_a_mesh():
  config = tiny("--config.optimizer.name=muon")
  tx = optimizer.make_optimizer(config)
  rng = np.random.default_rng(0)
  B, L = 8, 128
  bytes_BL = rng.integers(97, 123, (B, L), np.int32)
  batch = {
    "bytes": bytes_BL,
    "targets": np.roll(bytes_BL, -1, axis=1),
    "levels": (np.arange(L) % 5 == 0).astype(np.int32)[None].repeat(B, 0),
    "documents": np.ones((B, L), np.int32),
    "weights": np.ones((B, L), np.int32),
  }
  losses = []
  for sizes in ((1, 1, 1), (2, 2, 2)):
    axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.make_mesh(config_lib.MeshConfig(**axes), devices)
    train_state = state.create_state(config.model, tx, mesh, config.seed)
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
      step = jax.jit(make_train_step(config, tx))
      nats = []
      for _ in range(3):
        train_state, metrics = step(train_state, placed)
        nats.append(float(metrics["nats"]))
    losses.append(nats)
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  assert losses[0][-1] < losses[0][0]


@pytest.mark.slow  # as above
def test_a_run_with_muon_resumes_bit_for_bit(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  (tmp_path / "text.txt").write_text("the cat sat on the mat, again. " * 300)

  def train():
    flags = ["--config.optimizer.name=muon", "--config.train.num_steps=6"]
    data = f"--config.data.train={tmp_path / 'text.txt'}"
    heldout = "--config.data.heldout_fraction=0"
    keep = "--config.checkpoint.keep=9"
    workdir = f"--workdir={tmp_path / 'run'}"
    assert train_main.main([TINY, workdir, data, heldout, keep, *flags]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [
      (row["step"], row["loss_nats"], row["grad_norm"])
      for row in map(json.loads, lines)
      if "loss_nats" in row
    ]

  logged = train()
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
  assert train() == logged


def test_another_optimizer_is_named(capsys, tmp_path):
  workdir = f"--workdir={tmp_path / 'run'}"
  assert train_main.main([TINY, workdir, "--config.optimizer.name=moun"]) == 2
  error = capsys.readouterr().err
  assert "optimizer.name='moun'" in error and "muon" in error
