"""Everything a training step reads and writes, and where it lives."""

import functools
from collections.abc import Callable
from dataclasses import fields

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from aunet_jax import memory
from aunet_jax.aunet import sharding
from aunet_jax.aunet.network import abstract_params, init_params
from aunet_jax.config import ModelConfig
from aunet_jax.train.optimizer import Averaged


class TrainState(struct.PyTreeNode):
  step: jax.Array  # int32: updates attempted so far
  params: dict
  opt_state: optax.OptState
  nonfinite_in_row: jax.Array  # int32: skipped steps since the last good one
  nonfinite_total: jax.Array  # int32: skipped steps since the start

  @property
  def model_params(self) -> dict:
    """Of the model that a run gives: their running mean, where one is kept."""
    kept = isinstance(self.opt_state, Averaged)
    return self.opt_state.average if kept else self.params

  def items(self) -> dict[str, object]:
    """As a checkpoint holds it: the model, and apart from it all the rest.

    With a running mean the model is that, and what is trained is in the rest.
    """
    counters = {field.name: getattr(self, field.name) for field in fields(self)}
    if isinstance(self.opt_state, Averaged):
      counters["opt_state"] = self.opt_state._replace(average=None)
      return {"params": self.model_params, "optimizer": counters}
    return {"params": counters.pop("params"), "optimizer": counters}

  @classmethod
  def from_items(cls, items: dict[str, object]) -> "TrainState":
    counters, model_params = dict(items["optimizer"]), items["params"]
    if "params" not in counters:
      return cls(params=model_params, **counters)
    opt_state = counters.pop("opt_state")._replace(average=model_params)
    return cls(opt_state=opt_state, **counters)


def _begin(params, optimizer):
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(params), zero, zero)


def abstract_state(
  config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
  """Shapes and shardings of a TrainState; nothing is allocated."""
  boxed = jax.eval_shape(
    lambda params: _begin(params, optimizer), abstract_params(config)
  )
  return sharding.unbox(boxed), sharding.tree_shardings(boxed, mesh)


def create_state(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  seed: int,
) -> TrainState:
  """A fresh TrainState, each shard initialised where it will live."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    params = _init(config, mesh)(jax.random.key(seed))
  return with_params(params, config, optimizer, mesh)


@functools.cache  # the network is traced for it
def _init(config: ModelConfig, mesh: Mesh) -> Callable[[jax.Array], dict]:
  """Parameters of a key, sharded."""
  return jax.jit(
    lambda key: sharding.unbox(init_params(config, key)),
    out_shardings=sharding.tree_shardings(abstract_params(config), mesh),
  )


def with_params(
  params, config: ModelConfig, optimizer: optax.GradientTransformation, mesh
) -> TrainState:
  """A TrainState at step 0 around given parameters."""
  _, shardings = abstract_state(config, optimizer, mesh)
  zero = jnp.zeros((), jnp.int32)
  made = jax.jit(
    lambda p: TrainState(zero, p, optimizer.init(p), zero, zero),
    out_shardings=shardings,
  )(params)
  memory.give_back()
  return made
