"""A model of tokens of random weights, for tests of what scores and writes."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np

from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.data import tokenizer as tokenizer_lib
from aunet_jax.generate.generator import Generator
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.workdir import load

TEXT = b"the cat sat on the mat; the cat sat on that mat, that the cat sat on. "
LENGTH = 32  # tokens of a row, BOS among them


@functools.cache
def tokenizer() -> tokenizer_lib.Tokenizer:
  """All bytes, and eight tokens of several."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tokenizer.json"
    path.write_text(tokenizer_lib.train([TEXT * 9], 264))
    return tokenizer_lib.Tokenizer(path)


def make_config() -> config_lib.Config:
  stage = config_lib.StageConfig(
    dim=16, num_layers=1, head_dim=8, window=None, capacity=LENGTH
  )
  return config_lib.Config(
    model=config_lib.ModelConfig(
      stages=(stage,), vocab_size=tokenizer().vocab_size, dtype="float32"
    ),
    data=config_lib.DataConfig(tokenizer=tokenizer().path),
  )


@functools.cache
def loaded() -> load.Loaded:
  config = make_config()
  init = jax.jit(network.init_params, static_argnums=0)
  params = sharding.unbox(init(config.model, jax.random.key(0)))
  model = AUNet(config.model)
  return load.Loaded(model, params, Splitter(()), config, 0, tokenizer())


@functools.cache
def generator(has_roles: bool = False) -> Generator:
  """With weights so wide that what it writes varies; many tokens of several
  bytes, and documents that go on for long."""
  config, rng = make_config().model, np.random.default_rng(1)

  def draw(path, x):
    values = 0.3 * rng.normal(size=x.shape).astype(np.float32)
    if path[-1].key == "head":
      values[:, 256 : tokenizer().size] *= 3
      values[:, tokenizer().eos] = 0
    return 1 + values if path[-1].key == "scale" else values

  shapes = sharding.unbox(network.abstract_params(config))
  params = jax.tree_util.tree_map_with_path(draw, shapes)
  splitter = Splitter((), has_roles=has_roles)
  return Generator(config, params, splitter, tokenizer=tokenizer())
