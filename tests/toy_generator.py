"""A two-stage model of fixed random weights that writes varied bytes."""

import functools

import jax
import numpy as np

from aunet_jax.aunet import network, sharding
from aunet_jax.config import EOS, ModelConfig, StageConfig
from aunet_jax.generate.generator import Generator
from aunet_jax.splitting.splitter import Splitter


def make_config(window=16):
  stages = (
    StageConfig(dim=32, num_layers=1, head_dim=16, window=window, capacity=128),
    StageConfig(
      dim=64, num_layers=1, head_dim=16, window=8, capacity=64, rule="word@1"
    ),
  )
  return ModelConfig(stages=stages, dtype="float32", num_offsets=4)


def make_params(config):
  """Drawn by NumPy, wide enough that greedy text varies."""
  rng = np.random.default_rng(1)
  boxed = network.abstract_params(config)

  def draw(path, x):
    values = 0.3 * rng.normal(size=x.shape).astype(np.float32)
    if path[-1].key == "head":
      values[:, EOS] = 0  # documents go on for long
    return 1 + values if path[-1].key == "scale" else values

  return jax.tree_util.tree_map_with_path(draw, sharding.unbox(boxed))


@functools.cache
def talker():
  """The same, as if it had been tuned on conversations."""
  config = make_config()
  splitter = Splitter(config.rules, has_roles=True)
  return Generator(config, make_params(config), splitter)


@functools.cache
def generator():
  config = make_config()
  return Generator(config, make_params(config), Splitter(config.rules))
