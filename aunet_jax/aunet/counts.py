"""Parameters, FLOPs and memory of a model, from its config alone.

Sums what each part says of itself (`block`, its mixer, `transition`) over the
stages. `aunet_jax/counts.py`, the command, says what the kinds of FLOPs are.
"""

from collections.abc import Sequence

import numpy as np

from aunet_jax.aunet import ngrams
from aunet_jax.aunet.block import Block, SwiGLU, mixer_of
from aunet_jax.aunet.heads import Head
from aunet_jax.aunet.transition import Pool, upsampling_of
from aunet_jax.config import ModelConfig

# Of an attention kernel's two products forward, the backward pass forms one
# again rather than keep it.
SCORES_AGAIN = 0.5


def _layers(model: ModelConfig, i: int) -> int:
  """Blocks of stage i + 1, on both paths together."""
  paths = 1 if i == model.num_stages - 1 else 2
  return paths * model.stages[i].num_layers


def _transition_dims(model: ModelConfig, i: int) -> tuple[int, int]:
  """Widths of stage i + 1 and the one below it."""
  return model.stages[i].dim, model.stages[i + 1].dim


# ----- parameters -----------------------------------------------------------


def parameters(model: ModelConfig) -> tuple[dict[str, int], ...]:
  """Number of parameters by stage (first = bytes), then by kind.

  A transition belongs to its finer stage. Equal to what `AUNet` initialises.
  """
  result = []
  for i, stage in enumerate(model.stages):
    kinds = {
      kind: _layers(model, i) * number
      for kind, number in Block.num_parameters(stage).items()
    }
    more = []
    if i == 0:
      matrix = model.vocab_size * stage.dim
      head = 0 if model.tie_embeddings else matrix
      more.append({"embedding": matrix, "head": head, "norms": stage.dim})
      if model.ngram_rows:
        rows = ngrams.num_sizes(model) * model.ngram_rows
        more.append({"ngrams": rows * stage.dim})
      if model.level_loss_weight > 0:
        width = 2 * stage.dim
        more.append({"level head": width * model.num_stages, "norms": width})
      if model.heads > 1:
        heads = (model.heads - 1) * Head.num_weights(model)
        norms = (model.heads - 1) * Head.num_small(model)
        more.append({"heads": heads, "norms": norms})
    if i < model.num_stages - 1:
      widths = _transition_dims(model, i)
      more.append(Pool.num_parameters(model, *widths))
      more.append(upsampling_of(model).num_parameters(model, *widths))
    for part in more:
      for kind, number in part.items():
        kinds[kind] = kinds.get(kind, 0) + number
    result.append(kinds)
  return tuple(result)


def num_parameters(model: ModelConfig) -> int:
  return sum(sum(kinds.values()) for kinds in parameters(model))


# ----- FLOPs by the paper's accounting --------------------------------------


def paper_flops_per_byte(model: ModelConfig, *, head: bool = True) -> float:
  """Training FLOPs per byte as the paper's Table 10 prints them.

  Sum over stages of F / k (Appendix A), F = 6 N + 6 d L (w (2 S - w) / S),
  N the block matrices, k = (row length) / S, S the stage's capacity. As in the
  official estimator, transitions are left out. `head` adds 6 d_1 V; without
  it the paper's data-to-model ratio comes out as 10.000 in every scaling row.
  """
  first = model.stages[0]
  flops = 6 * first.dim * model.vocab_size if head else 0
  for i, stage in enumerate(model.stages):
    layers, mixer = _layers(model, i), mixer_of(stage)
    matrices = mixer.num_weights(stage) + SwiGLU.num_weights(stage)
    per_position = 6 * layers * matrices + mixer.paper_flops(stage, layers)
    flops += per_position * stage.capacity / first.capacity
  return flops


# ----- FLOPs of the program -------------------------------------------------


def _forward(
  model: ModelConfig,
  positions: Sequence[float],
  padded: tuple[int, str] | None = None,
) -> tuple[dict[str, float], ...]:
  """Forward FLOPs by stage and kind, of all heads, as in training.

  Args:
    positions: of each stage.
    padded: rows of a device and its platform, for what it multiplies; None:
      what the positions need.
  """
  result = []
  platform = None if padded is None else padded[1]
  for i, stage in enumerate(model.stages):
    layers, n, mixer = _layers(model, i), positions[i], mixer_of(stage)
    kinds = {
      "projections": 2 * n * layers * mixer.num_weights(stage),
      "scores": mixer.flops(stage, n, platform) * layers,
      "ffn": 2 * n * layers * SwiGLU.num_weights(stage),
    }
    if i == 0:
      kinds["head"] = 2 * n * stage.dim * model.vocab_size * model.heads
      if model.heads > 1:
        weights = (model.heads - 1) * Head.num_weights(model)
        kinds["heads"] = 2 * n * weights
      if model.level_loss_weight > 0:
        kinds["head"] += 2 * n * 2 * stage.dim * model.num_stages
    if i < model.num_stages - 1:
      widths, coarse = _transition_dims(model, i), positions[i + 1]
      kinds["pool"] = 2 * coarse * Pool.num_parameters(model, *widths)["pool"]
      kinds["upsample"] = upsampling_of(model).flops(
        model, *widths, n, coarse, padded
      )
    result.append(kinds)
  return tuple(result)


def padded_forward_flops(
  model: ModelConfig, rows_per_device: int = 1, platform: str = "cpu"
) -> tuple[dict[str, float], ...]:
  """Forward FLOPs a device runs for one row, by stage and kind.

  Args: platform: cpu, gpu or tpu; kernels differ in what they pad.
  """
  return _forward(model, model.capacities, (rows_per_device, platform))


def useful_forward_flops(
  model: ModelConfig, positions_per_stage: Sequence[float]
) -> tuple[dict[str, float], ...]:
  """Forward FLOPs that real positions need, by stage and kind.

  A position attends to as many keys as one of a full row that is one piece
  does on average; short documents need less, which positions alone cannot
  tell.

  Args: positions_per_stage: real positions, stage 1 first, of any amount of
    data (a row, a step, a run).
  Raises: ValueError where there is not one number per stage.
  """
  if len(positions_per_stage) != model.num_stages:
    raise ValueError(
      f"{len(positions_per_stage)} position counts were given for a model of "
      f"{model.num_stages} stages; give one per stage, stage 1 first."
    )
  return _forward(model, positions_per_stage)


def _total(stages: Sequence[dict[str, float]]) -> float:
  return sum(sum(kinds.values()) for kinds in stages)


def train_flops_per_row(
  model: ModelConfig, rows_per_device: int = 1, platform: str = "cpu"
) -> float:
  """Padded FLOPs of a row's forward and backward pass; remat not counted."""
  return 3 * _total(padded_forward_flops(model, rows_per_device, platform))


def useful_train_flops(
  model: ModelConfig, positions_per_stage: Sequence[float]
) -> float:
  """Useful FLOPs of forward and backward over these real positions."""
  return 3 * _total(useful_forward_flops(model, positions_per_stage))


def remat_flops_per_row(model: ModelConfig, platform: str = "cpu") -> float:
  """Padded FLOPs of a row that the backward pass computes once more.

  No attention kernel keeps its scores; what remat repeats comes on top.
  """
  again = {"none": (), "dots": (), "full": ("projections", "scores", "ffn")}
  forward = padded_forward_flops(model, platform=platform)
  return sum(
    SCORES_AGAIN * kinds["scores"] + sum(kinds[k] for k in again[stage.remat])
    for stage, kinds in zip(model.stages, forward, strict=True)
  )


# ----- memory ---------------------------------------------------------------


def _itemsize(dtype: str) -> int:
  return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def activation_bytes(model: ModelConfig) -> tuple[int, ...]:
  """Rough bytes one row keeps for the backward pass, by stage.

  Counts the large arrays a block saves, by its remat policy; XLA may fuse some
  away or keep a few more.
  """
  size = _itemsize(model.dtype)
  saved = [
    _layers(model, i) * Block.saved_bytes(stage, size)
    for i, stage in enumerate(model.stages)
  ]
  logits = model.capacities[0] * model.vocab_size * 4 * model.heads
  saved[0] += 2 * logits  # and their gradient
  saved[0] += (model.heads - 1) * Head.saved_bytes(model, size)
  return tuple(saved)


def cache_bytes(model: ModelConfig) -> tuple[int, ...]:
  """Bytes of what mixers keep of a generated row, by stage, at full length."""
  size = _itemsize(model.dtype)
  return tuple(
    _layers(model, i) * mixer_of(stage).cache_bytes(stage, size)
    for i, stage in enumerate(model.stages)
  )


# ----- what devices send each other -----------------------------------------


def collective_bytes(
  model: ModelConfig,
  *,
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  grad_accumulation: int = 1,
) -> dict[str, float]:
  """Bytes per device and training step that a mesh must cost.

  Of a collective, the largest array that one device holds in it (as
  `collectives` counts). `fsdp` splits every matrix between stages or in blocks
  by its "embed" dim, `tensor` by another; embedding, head and norms are whole
  everywhere.

  parameter_gathers: in the compute dtype, once for the forward pass and once
    for the backward; a block that is computed again (remat) does so in the
    loop that already holds its matrices. The matrices of upsampling are
    gathered once, outside any loop, and kept.
  gradient_reductions: of split matrices, in the compute dtype: summed over
    `fsdp`, each device keeping its part, and the parts over `data`; of whole
    parameters, summed in full.

  Both happen for every microbatch. Activations that `tensor` sums are not
  here.
  """
  layered = gathered_once = gathered_twice = whole = 0
  for kinds in parameters(model):
    gathered_twice += kinds.get("pool", 0)
    gathered_once += sum(
      kinds.get(kind, 0) for kind in ("upsample", "ngrams", "heads")
    )
    copied = sum(
      kinds.get(kind, 0)
      for kind in ("norms", "taps", "embedding", "head", "level head")
    )
    whole += copied
    layered += sum(kinds.values()) - copied
  layered -= gathered_once + gathered_twice
  size = _itemsize(model.dtype)
  split = layered + gathered_once + gathered_twice
  gathers = 2 * layered + 2 * gathered_twice + gathered_once
  reductions = 0.0
  if fsdp > 1:
    reductions += split / tensor * size
  if data > 1:
    reductions += split / tensor / fsdp * size
  if data * fsdp > 1:
    reductions += whole * size
  return {
    "parameter_gathers": (
      grad_accumulation * gathers / tensor * size if fsdp > 1 else 0.0
    ),
    "gradient_reductions": grad_accumulation * reductions,
  }


# ----- the report -----------------------------------------------------------


def report(
  model: ModelConfig,
  positions_per_stage: Sequence[float] | None = None,
  optimizer_bytes: int | None = None,
) -> dict:
  """Everything above as one JSON-able dict; the CLI prints it.

  Args:
    positions_per_stage: real positions of an average row; None = every slot.
    optimizer_bytes: of the optimizer's state; None = of AdamW's two moments.
  """
  if positions_per_stage is None:
    positions_per_stage = model.capacities
  counted = parameters(model)
  padded = padded_forward_flops(model)
  useful = useful_forward_flops(model, positions_per_stage)
  activations = activation_bytes(model)
  cache = cache_bytes(model)
  row_bytes = positions_per_stage[0]
  total_parameters = num_parameters(model)
  weights = total_parameters * _itemsize(model.param_dtype)
  if optimizer_bytes is None:
    optimizer_bytes = 2 * weights
  return {
    "parameters": total_parameters,
    "bytes_per_row": row_bytes,
    "paper_train_flops_per_byte": paper_flops_per_byte(model),
    "useful_forward_flops_per_byte": _total(useful) / row_bytes,
    "useful_train_flops_per_byte": 3 * _total(useful) / row_bytes,
    "padded_forward_flops_per_byte": _total(padded) / row_bytes,
    "padded_train_flops_per_byte": 3 * _total(padded) / row_bytes,
    "remat_flops_per_byte": remat_flops_per_row(model) / row_bytes,
    "useful_over_padded": _total(useful) / _total(padded),
    "memory_bytes": {
      "parameters": weights,
      "gradients": weights,
      "optimizer": optimizer_bytes,
      "activations_per_row": sum(activations),
      "kv_cache_per_row": sum(cache),
    },
    "stages": [
      {
        "capacity": stage.capacity,
        "positions": positions_per_stage[i],
        "dim": stage.dim,
        "num_layers": _layers(model, i),
        "parameters": counted[i],
        "padded_forward_flops_per_row": padded[i],
        "useful_forward_flops_per_row": useful[i],
        "activation_bytes_per_row": activations[i],
        "kv_cache_bytes_per_row": cache[i],
      }
      for i, stage in enumerate(model.stages)
    ],
  }
