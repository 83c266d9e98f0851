"""Everything a training step reads and writes, and where it lives."""

from dataclasses import fields

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from aunet_jax.aunet import sharding
from aunet_jax.aunet.network import init_params
from aunet_jax.config import ModelConfig


class TrainState(struct.PyTreeNode):
  step: jax.Array  # int32: updates attempted so far
  params: dict
  opt_state: optax.OptState
  nonfinite_in_row: jax.Array  # int32: skipped steps since the last good one
  nonfinite_total: jax.Array  # int32: skipped steps since the start

  def items(self) -> dict[str, object]:
    """As a checkpoint holds it: the model, and apart from it all the rest."""
    counters = {field.name: getattr(self, field.name) for field in fields(self)}
    return {"params": counters.pop("params"), "optimizer": counters}

  @classmethod
  def from_items(cls, items: dict[str, object]) -> "TrainState":
    return cls(params=items["params"], **items["optimizer"])


def _init(config, optimizer, seed):
  params = init_params(config, jax.random.key(seed))
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(params), zero, zero)


def abstract_state(
  config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
  """Shapes and shardings of a TrainState; nothing is allocated."""
  boxed = jax.eval_shape(lambda: _init(config, optimizer, 0))
  return sharding.unbox(boxed), sharding.tree_shardings(boxed, mesh)


def create_state(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  seed: int,
) -> TrainState:
  """A fresh TrainState, each shard initialised where it will live."""
  _, shardings = abstract_state(config, optimizer, mesh)

  def init():
    return sharding.unbox(_init(config, optimizer, seed))

  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    return jax.jit(init, out_shardings=shardings)()


def with_params(
  params, config: ModelConfig, optimizer: optax.GradientTransformation, mesh
) -> TrainState:
  """A TrainState at step 0 around given parameters."""
  _, shardings = abstract_state(config, optimizer, mesh)
  zero = jnp.zeros((), jnp.int32)
  return jax.jit(
    lambda p: TrainState(zero, p, optimizer.init(p), zero, zero),
    out_shardings=shardings,
  )(params)
