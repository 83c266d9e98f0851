"""The training step: pure, and compiled once."""

import math
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from aunet_jax import memory
from aunet_jax.aunet import counts, loss, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import Config, ModelConfig
from aunet_jax.data import packing
from aunet_jax.train import optimizer
from aunet_jax.train.state import TrainState

# ----- what it will take ----------------------------------------------------


def sizes_targets(config: Config) -> bool:
  """Whether a batch says how many bytes of text every target is."""
  return config.data.tokenizer is not None or config.has_roles


def measure_flops_per_second(config: Config, repeats: int = 3) -> float:
  """Padded FLOPs a second of a training step here, compilation apart."""
  from aunet_jax.train import state

  mesh = sharding.make_mesh(config.mesh)
  tx = optimizer.make_optimizer(config)
  train_state = state.create_state(config.model, tx, mesh, 0)
  abstract = packing.abstract_batch(
    config.train.batch_size,
    config.model.capacities[0],
    sizes_targets=sizes_targets(config),
  )
  shape = abstract["bytes"].shape
  rng = np.random.default_rng(0)
  batch = {name: np.ones(shape, np.int32) for name in abstract}
  batch |= {
    "bytes": rng.integers(0, 256, shape, np.int32),
    "targets": rng.integers(0, 256, shape, np.int32),
    "levels": np.zeros(shape, np.int32),
  }
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  _, shardings = state.abstract_state(config.model, tx, mesh)
  step = compile_step(config, tx, mesh, shardings, train_state, batch)
  best = math.inf
  for _ in range(repeats + 1):
    began = time.perf_counter()
    train_state, step_metrics = step(train_state, batch)
    jax.block_until_ready(step_metrics)
    best = min(best, time.perf_counter() - began)
  rows = config.train.batch_size
  return rows * counts.train_flops_per_row(config.model) / best


# ----- the step -------------------------------------------------------------


def loss_sums(
  model: AUNet, params, batch: dict[str, jax.Array], num_targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """This batch's share of the loss of a step with `num_targets` targets.

  Returns: (objective, (nats, level_nats, ahead_nats)): sums over positions of
    the bytes' loss, of the level head's, 0 where there is none, and of each
    head's after the first; the objective is their weighted sum, divided by
    num_targets.
  """
  config = model.config
  inputs = (batch["bytes"], batch["levels"], batch["documents"])
  predicted = model.apply({"params": params}, *inputs, batch["targets"])
  nats_BL = loss.cross_entropy(predicted.logits_BLV, batch["targets"])
  nats = objective = (nats_BL * batch["weights"]).sum()
  level_nats = jnp.float32(0)
  if config.level_loss_weight > 0:
    level_BL, known_BL = loss.target_levels(
      batch["levels"], batch["documents"], batch["targets"]
    )
    nats_BL = loss.cross_entropy(predicted.level_logits_BLP, level_BL)
    level_nats = (nats_BL * known_BL * batch["weights"]).sum()
    objective += config.level_loss_weight * level_nats
  ahead_nats = []
  for ahead, logits_BLV in enumerate(predicted.ahead_BLV, start=1):
    target_BL, weight_BL = loss.targets_ahead(batch, ahead)
    nats_BL = loss.cross_entropy(logits_BLV, target_BL)
    ahead_nats.append((nats_BL * weight_BL).sum())
    objective += config.heads_loss_weight * ahead_nats[-1]
  return objective / num_targets, (nats, level_nats, tuple(ahead_nats))


def make_train_step(
  config: Config, tx: optax.GradientTransformation
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """The pure update (state, batch) -> (state, metrics).

  The gradient is that of the mean over all weighted targets of the global
  batch, whatever the number of microbatches. A step whose loss or gradient is
  not finite changes nothing but the counters.
  """
  model = AUNet(config.model)
  num_micro = config.train.grad_accumulation
  factors = optimizer.factors(config)

  def objective(params, batch, num_targets):
    return loss_sums(
      model, optimizer.freeze(params, factors), batch, num_targets
    )

  def train_step(train_state, batch):
    num_targets, num_bytes = loss.count_targets(batch)
    grad = jax.value_and_grad(objective, has_aux=True)
    # At least 1: a batch of padding alone.
    divisor = jnp.maximum(num_targets.astype(jnp.float32), 1.0)
    # Gradients come in the dtype of what they are of, and are added up in it:
    # over microbatches and devices, bfloat16 would drop the small ones.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), train_state.params)

    def micro(carry, microbatch):
      (_, sums), grads = grad(wide, microbatch, divisor)
      return jax.tree.map(jnp.add, carry, (sums, grads)), None

    if num_micro == 1:
      (_, sums), grads = grad(wide, batch, divisor)
    else:
      zeros = jax.tree.map(jnp.zeros_like, wide)
      zero = jnp.float32(0)
      nothing = (zero, zero, (zero,) * (config.model.heads - 1))
      (sums, grads), _ = jax.lax.scan(
        micro, (nothing, zeros), _microbatches(batch, num_micro)
      )

    nats, level_nats, ahead_nats = sums
    grad_norm = optax.tree.norm(grads)
    grads = jax.tree.map(
      lambda g, p: g.astype(p.dtype), grads, train_state.params
    )
    updates, opt_state = tx.update(
      grads, train_state.opt_state, train_state.params
    )
    finite = jnp.isfinite(nats) & jnp.isfinite(grad_norm)
    params = optax.apply_updates(train_state.params, updates)

    def keep_finite(new, old):
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = 1 - finite.astype(jnp.int32)
    new_state = TrainState(
      step=train_state.step + 1,
      params=keep_finite(params, train_state.params),
      opt_state=keep_finite(opt_state, train_state.opt_state),
      nonfinite_in_row=(train_state.nonfinite_in_row + 1) * skipped,
      nonfinite_total=train_state.nonfinite_total + skipped,
    )
    step_metrics = {
      "nats": nats,
      "level_nats": level_nats,
      "ahead_nats": ahead_nats,
      "targets": num_targets,
      "bytes": num_bytes,
      "positions": count_positions(config.model, batch),
      "grad_norm": grad_norm,
      "nonfinite_in_row": new_state.nonfinite_in_row,
      "nonfinite_total": new_state.nonfinite_total,
    }
    return new_state, step_metrics

  return train_step


def _microbatches(batch, num_micro):
  """(B, ...) -> (num_micro, B / num_micro, ...), each spread over devices."""

  def split(x):
    x = x.reshape(x.shape[0] // num_micro, num_micro, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 0)
    names = (None, "batch") + (None,) * (x.ndim - 2)
    return nn.with_logical_constraint(x, names)

  return jax.tree.map(split, batch)


def count_positions(
  config: ModelConfig, batch: dict[str, jax.Array]
) -> jax.Array:
  """Real positions of every stage in the batch, int32 (num_stages,)."""
  real_BL = batch["documents"] > 0
  return jnp.stack(
    [
      (real_BL & (batch["levels"] >= i)).sum(dtype=jnp.int32)
      for i in range(config.num_stages)
    ]
  )


def compile_step(config: Config, tx, mesh, shardings, abstract, batch):
  """Compiles the step ahead of the loop; donates the old state's memory."""
  step = jax.jit(
    make_train_step(config, tx),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    compiled = step.lower(abstract, batch).compile()
  memory.give_back()
  return compiled
