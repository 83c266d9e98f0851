"""AdamW with warmup and cosine or warmup-stable-decay (paper Tables 6, 11)."""

import optax

from aunet_jax.config import OptimizerConfig


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


def make_optimizer(
  config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW.

  Weight decay acts on every parameter, norms and embeddings included, as in
  the official code.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate_schedule(config, num_steps),
      b1=config.beta1,
      b2=config.beta2,
      eps=config.eps,
      weight_decay=config.weight_decay,
    ),
  )
