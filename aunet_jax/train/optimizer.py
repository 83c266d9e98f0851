"""AdamW (paper Tables 6, 11) or Muon, and their learning-rate schedules."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from aunet_jax.aunet import width
from aunet_jax.aunet.network import abstract_params
from aunet_jax.config import Config, ModelConfig, OptimizerConfig


def learning_rate_schedule(
  config: OptimizerConfig, num_steps: int
) -> optax.Schedule:
  """Learning rate of the update that ends step `count + 1`.

  Warmup is linear from 0. The official code's first update has a learning rate
  of exactly 0; ours starts one step further, so no batch is spent on nothing.
  """
  peak = config.learning_rate
  final = peak * config.final_ratio
  warmup = optax.linear_schedule(0.0, peak, max(1, config.warmup_steps))
  after = num_steps - config.warmup_steps
  if config.schedule == "cosine":
    body = optax.cosine_decay_schedule(peak, after, config.final_ratio)
    schedule = optax.join_schedules([warmup, body], [config.warmup_steps])
  elif config.schedule == "wsd":
    decay = config.decay_steps
    decay = max(1, num_steps // 5) if decay is None else decay
    if decay > after:
      raise ValueError(
        f"optimizer.decay_steps={decay} does not fit between "
        f"warmup_steps={config.warmup_steps} and num_steps={num_steps}; "
        f"use at most {after}."
      )
    schedule = optax.join_schedules(
      [
        warmup,
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, final, decay),
      ],
      [config.warmup_steps, num_steps - decay],
    )
  else:
    schedule = optax.join_schedules(
      [warmup, optax.constant_schedule(peak)], [config.warmup_steps]
    )
  return lambda count: schedule(count + 1)


def matrices(model: ModelConfig) -> dict:
  """Which parameters are matrices, and along which of their dims.

  Returns: a tree like the parameters of MuonDimensionNumbers, None for the
    parameters that are no matrices; see `width.matrix_dims`.
  """

  def dimensions(box):
    dims = width.matrix_dims(box)
    return None if dims is None else contrib.MuonDimensionNumbers(*dims)

  return jax.tree.map(
    dimensions,
    abstract_params(model),
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )


class Factors(NamedTuple):
  """What a parameter's learning rate and weight decay are multiplied by."""

  rate: float
  decay: float


def _kind(names: list[str]) -> str | None:
  """Of a parameter by its path: norms, embeddings, head; else None."""
  if names[-1] == "scale":
    return "norms"
  if names[-1] in ("head", "level_head"):
    return "head"
  return "embeddings" if names[-1] in ("embed", "table") else None


def factors(config: Config) -> dict:
  """A tree like the parameters of the Factors that the config asks for."""
  settings, model = config.optimizer, config.model
  ones = (1.0,) * model.num_stages
  rates = ones if settings.stage_lr is None else settings.stage_lr
  decays = ones if settings.stage_decay is None else settings.stage_decay
  of_kind = {"embeddings": settings.embedding_lr, "head": settings.head_lr}

  params = abstract_params(model)

  def of(path, _, scales):
    names = [key.key for key in path]
    stage, kind = width.stage_of(names[0], model), _kind(names)
    by_width = getattr(scales, settings.name)
    decay = 0.0 if kind in settings.undecayed else decays[stage]
    rate = rates[stage] * of_kind.get(kind, 1.0) * by_width
    return Factors(rate, decay / by_width)

  return jax.tree_util.tree_map_with_path(
    of,
    params,
    width.scales(params, model),
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )


def _is_factors(x) -> bool:
  return isinstance(x, Factors)


def freeze(params: dict, tree: dict) -> dict:
  """Parameters without a gradient where their rate in `factors` is 0."""
  return jax.tree.map(
    lambda f, p: p if f.rate else jax.lax.stop_gradient(p),
    tree,
    params,
    is_leaf=_is_factors,
  )


def _scaled(
  inner: optax.GradientTransformation, tree: dict
) -> optax.GradientTransformation:
  """`inner` with the learning rates and weight decays that `factors` gives.

  Weight decay is all that `inner` reads parameters for. What is frozen has no
  state, and no part in the clipped norm.
  """

  def times(name, values):
    def of_parameter(factor, below):
      scale = getattr(factor, name)
      return jax.tree.map(lambda x: x if scale == 1 else scale * x, below)

    return jax.tree.map(of_parameter, tree, values, is_leaf=_is_factors)

  def update(grads, state, params):
    updates, state = inner.update(grads, state, times("decay", params))
    return times("rate", updates), state

  labels = jax.tree.map(
    lambda f: "trained" if f.rate else "frozen", tree, is_leaf=_is_factors
  )
  scaled = optax.GradientTransformation(inner.init, update)
  if "frozen" not in jax.tree.leaves(labels):
    return scaled
  return optax.partition(
    {"trained": scaled, "frozen": optax.set_to_zero()}, labels
  )


class Averaged(NamedTuple):
  """State of `averaged`."""

  inner: optax.OptState
  count: jax.Array  # int32: updates in the mean
  average: dict | None  # like the parameters, float32; None: kept elsewhere


def averaged(
  inner: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
  """`inner`, with a running mean of the parameters that its updates lead to.

  The decay of update t is min(decay, (1 + t) / (10 + t)), so that the first
  parameters are soon forgotten.
  """

  def init(params):
    mean = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return Averaged(inner.init(params), jnp.zeros((), jnp.int32), mean)

  def update(grads, state, params):
    updates, new = inner.update(grads, state.inner, params)
    t = state.count.astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t))
    after = optax.apply_updates(params, updates)
    average = jax.tree.map(
      lambda a, p: a + (1 - keep) * (p.astype(jnp.float32) - a),
      state.average,
      after,
    )
    return updates, Averaged(new, state.count + 1, average)

  return optax.GradientTransformation(init, update)


def state_bytes(config: Config) -> int:
  """Of the state that `make_optimizer` keeps, over all devices.

  AdamW has two moments of every parameter; Muon one of a matrix; what is frozen
  has none; a running mean is one float32 of each.
  """
  tx = make_optimizer(config)
  state = jax.eval_shape(tx.init, abstract_params(config.model))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """Global-norm clipping, then the optimizer that the config names.

  Weight decay acts on every parameter, norms and embeddings included, as in
  the official code, unless `factors` say otherwise. Muon (Jordan et al. 2024)
  orthogonalises the updates of `matrices`, each scaled to the root mean square
  that AdamW's updates have (arXiv 2502.16982, Section 2.2: 0.2), so that one
  learning rate serves both; the other parameters get AdamW.
  """
  settings = config.optimizer
  schedule = learning_rate_schedule(settings, config.train.num_steps)
  decay = settings.weight_decay
  if settings.name == "adamw":
    update = optax.adamw(
      schedule,
      b1=settings.beta1,
      b2=settings.beta2,
      eps=settings.eps,
      weight_decay=decay,
    )
  else:
    update = contrib.muon(
      schedule,
      beta=settings.momentum,
      weight_decay=decay,
      adam_b1=settings.beta1,
      adam_b2=settings.beta2,
      adam_weight_decay=decay,
      muon_weight_dimension_numbers=matrices(config.model),
      consistent_rms=0.2,
    )
  whole = optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)
  tree = factors(config)
  if any(f != (1, 1) for f in jax.tree.leaves(tree, is_leaf=_is_factors)):
    whole = _scaled(whole, tree)
  return (
    whole if settings.average is None else averaged(whole, settings.average)
  )
