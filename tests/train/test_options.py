"""Every option beside the paper's model obeys the laws of the whole.

A new option is one more row of OPTIONS. All together run by default, each by
itself as a slow test.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import counts, network, sharding
from aunet_jax.convert import lingua, lingua_arguments
from aunet_jax.data.rows import make_rows
from aunet_jax.generate.generator import Generator
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import __main__ as train_main
from aunet_jax.train import optimizer, state
from aunet_jax.train.step import make_train_step
from tests.generate import test_decode as decoding

ROOT = Path(__file__).parents[2]
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"

# Of the model, by what it is called: settings that turn it on.
MODEL = {
  "conv": ["model.stages[0].conv=4"],
  "qk_norm": ["model.stages[0].qk_norm=True", "model.stages[1].qk_norm=True"],
  "logit_cap": ["model.logit_cap=2"],
  "ngram_rows": ["model.ngram_rows=16", "model.ngram_longest=5"],
  "tie_embeddings": ["model.tie_embeddings=True"],
  "heads": ["model.heads=3", "model.heads_loss_weight=0.5"],
}
# Of model and training.
WIDTH = {
  "base_dim": ["model.stages[0].base_dim=16", "model.stages[1].base_dim=16"]
}
# Of training.
TRAINING = {
  "muon": ["optimizer.name=muon"],
  "frozen": ["optimizer.stage_lr=0,1"],
  "average": ["optimizer.average=0.9"],
  "factors": ["optimizer.stage_lr=0.5,1", "optimizer.no_decay=norms"],
}


def rows_of(*groups):
  """Parameters of a test: all options of the groups, then each by itself."""
  options = {k: v for group in groups for k, v in group.items()}
  together = [setting for v in options.values() for setting in v]
  each = [
    pytest.param(v, id=k, marks=pytest.mark.slow) for k, v in options.items()
  ]
  return [pytest.param(together, id="all"), *each]


each_model = pytest.mark.parametrize("settings", rows_of(MODEL, WIDTH))


def tiny(settings) -> config_lib.Config:
  return config_lib.parse_flags([TINY, *[f"--config.{s}" for s in settings]])


def pack(texts, model):
  """Texts behind each other in one row: bytes, levels, documents."""
  splitter = Splitter(model.rules)
  rows = [make_rows([text], splitter, model.num_stages) for text in texts]
  sizes = [len(text) + 1 for text in texts]

  def joined(name):
    parts = [getattr(r, name)[0, :n] for r, n in zip(rows, sizes, strict=True)]
    return np.concatenate(parts)[None]

  numbers = np.repeat(np.arange(1, len(texts) + 1), sizes)[None]
  return joined("bytes_BL"), joined("levels_BL"), numbers


TEXT = b"a cat, a cat and a cat; 12 dogs."


@each_model
def test_a_byte_changes_no_logit_before_it(settings):
  model = tiny(settings).model
  params = decoding.random_params(model)
  for where in (0, 9, 20, len(TEXT) - 1):
    changed = TEXT[:where] + b"Z" + TEXT[where + 1 :]
    a, b = (
      decoding.apply(params, *pack([text], model), config=model)
      for text in (TEXT, changed)
    )
    np.testing.assert_array_equal(a[0, : where + 1], b[0, : where + 1])
    assert (a[0, where + 1] != b[0, where + 1]).any()  # it does see it


@each_model
def test_a_piece_gives_what_it_gives_alone(settings):
  model = tiny(settings).model
  params = decoding.random_params(model)
  texts = [b"ab", TEXT, b"", b"a cat again"]
  whole = decoding.apply(params, *pack(texts, model), config=model)
  at = 0
  for text in texts:
    alone = decoding.apply(params, *pack([text], model), config=model)
    size = len(text) + 1
    np.testing.assert_allclose(
      whole[0, at : at + size], alone[0], rtol=1e-5, atol=2e-5
    )
    at += size


@each_model
def test_decoding_equals_the_forward_pass(settings):
  model = tiny(settings).model
  prompts = decoding.PROMPTS[:6]
  forced_BT = np.stack(
    [
      np.roll(np.frombuffer(decoding.CONTINUATION, np.uint8), 5 * b)
      for b in range(len(prompts))
    ]
  ).astype(np.int32)
  params = decoding.random_params(model)
  decoding.check(model, params, prompts, forced_BT, "pack")


@each_model
def test_drafts_write_what_plain_decoding_writes(settings):
  model = dataclasses.replace(tiny(settings).model, heads=4)
  params = decoding.random_params(model)
  generator = Generator(model, params, decoding.make_splitter(model.rules))
  for seed, prompt in enumerate((TEXT, b"", b"a cat")):
    plain, drafted = (
      generator.generate([prompt], max_bytes=40, seed=seed, drafts=drafts)[0]
      for drafts in (False, True)
    )
    assert drafted.data == plain.data


@each_model
def test_int8_decoding_is_the_model_of_rounded_parameters(settings):
  model = tiny(settings).model
  params = decoding.random_params(model)
  x_CD = np.random.default_rng(0).normal(size=(3, model.stages[0].dim))
  x_CD = x_CD.astype(np.float32)

  def both(params):
    rounded = network.round_params(params, model)
    int8 = network.make_weights(params, model, int8=True)
    plain = network.make_weights(rounded, model)
    return [(network.logits(w, model, x_CD), w["embed"]) for w in (int8, plain)]

  found, expected = jax.jit(both)(params)
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4)


@each_model
def test_parameters_are_counted(settings):
  model = tiny(settings).model
  shapes = network.abstract_params(model)
  size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  assert counts.num_parameters(model) == size
  assert counts.report(model)["parameters"] == size


@pytest.mark.slow  # a step for eight devices takes long to compile
@pytest.mark.parametrize("settings", rows_of(MODEL, WIDTH, TRAINING))
def test_losses_do_not_depend_on_the_mesh(settings):
  config = tiny([*settings, "train.num_steps=9"])
  tx = optimizer.make_optimizer(config)
  B, L = 8, 128
  bytes_BL = np.random.default_rng(0).integers(97, 123, (B, L), np.int32)
  batch = {
    "bytes": bytes_BL,
    "targets": np.roll(bytes_BL, -1, axis=1),
    "levels": (np.arange(L) % 5 == 0).astype(np.int32)[None].repeat(B, 0),
    "documents": 1 + (np.arange(L) > 70).astype(np.int32)[None].repeat(B, 0),
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


@pytest.mark.slow  # two starts of the command, each compiles
@pytest.mark.parametrize("settings", rows_of(MODEL, WIDTH, TRAINING))
def test_a_run_resumes_bit_for_bit(settings, tmp_path):
  (tmp_path / "text.txt").write_text("the cat sat on the mat, again. " * 300)
  run = tmp_path / "run"
  flags = [
    f"--workdir={run}",
    f"--config.data.train={tmp_path / 'text.txt'}",
    "--config.data.heldout_fraction=0",
    "--config.train.num_steps=4",
    "--config.train.log_every_steps=1",
    "--config.checkpoint.every_steps=2",
    *[f"--config.{s}" for s in settings],
  ]

  def train():
    assert train_main.main([TINY, *flags]) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
      (row["step"], row["loss_nats"], row["grad_norm"])
      for row in map(json.loads, lines)
      if "loss_nats" in row
    ]

  logged = train()
  shutil.rmtree(run / "checkpoints" / "4")
  assert train() == logged


@pytest.mark.parametrize("name", MODEL)
def test_official_code_has_none_of_them(name):
  model = tiny(MODEL[name]).model
  with pytest.raises(ValueError, match=f"official code has no .*{name}"):
    lingua_arguments.to_arguments(model)
  with pytest.raises(ValueError, match=f"official code has no .*{name}"):
    lingua.to_lingua(model, {})
