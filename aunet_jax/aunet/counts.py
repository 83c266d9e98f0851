"""Parameters, FLOPs and memory of a model, from its config alone.

    python -m aunet_jax.counts --config=configs/aunet2_1b.py
    python -m aunet_jax.counts --config=configs/aunet2_1b.py --json
    python -m aunet_jax.counts --config=configs/aunet2_1b.py \\
        --contraction=4.92 --config.model.upsampling=repeat

Three kinds of FLOPs, never mixed; a multiplication and an addition are two:

  paper    training FLOPs per byte by the official code's estimator (paper
           Section 2.3 and Appendix A): no transitions, full stages.
  padded   what the device runs: every slot, attention's whole key blocks,
           multi-linear upsampling's padded groups. The kernels of CPUs, where
           no platform is named.
  useful   the same products at real positions and unmasked keys only.

Norms, softmax and other elementwise work are in none of them. Training is
three times forward; what rematerialisation repeats is given on its own.
"""

from collections.abc import Sequence

import numpy as np

from aunet_jax.aunet import attention
from aunet_jax.aunet.grouped import rows_multiplied
from aunet_jax.config import ModelConfig, StageConfig


def _layers(model: ModelConfig, i: int) -> int:
  """Blocks of stage i + 1, on both paths together."""
  paths = 1 if i == model.num_stages - 1 else 2
  return paths * model.stages[i].num_layers


def _projection_weights(stage: StageConfig) -> int:
  """Weights of one block's query, key, value and output matrices."""
  return stage.dim * stage.head_dim * 2 * (stage.num_heads + stage.kv_heads)


def _ffn_weights(stage: StageConfig) -> int:
  return 3 * stage.dim * stage.ffn


# ----- parameters -----------------------------------------------------------


def parameters(model: ModelConfig) -> tuple[dict[str, int], ...]:
  """Number of parameters by stage (first = bytes), then by kind.

  A transition belongs to its finer stage. Equal to what `AUNet` initialises.
  """
  result = []
  for i, stage in enumerate(model.stages):
    layers = _layers(model, i)
    kinds = {
      "attention": layers * _projection_weights(stage),
      "ffn": layers * _ffn_weights(stage),
      "norms": layers * 2 * stage.dim,
    }
    if i == 0:
      kinds["embedding"] = model.vocab_size * stage.dim
      kinds["head"] = model.vocab_size * stage.dim
      kinds["norms"] += stage.dim
      if model.level_loss_weight > 0:
        kinds["level head"] = 2 * stage.dim * model.num_stages
        kinds["norms"] += 2 * stage.dim
    if i < model.num_stages - 1:
      D, E, O = stage.dim, model.stages[i + 1].dim, model.num_offsets
      kinds["pool"] = D * E if model.parametric else 0
      kinds["upsample"] = D * E if model.parametric else 0
      kinds["norms"] += D + E if model.parametric else 0
      if model.upsampling == "multi_linear":
        kinds["upsample"] += O * D * E
        kinds["norms"] += 0 if model.parametric else E
      elif model.upsampling == "repeat":
        kinds["upsample"] += O * E
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
    S, layers = stage.capacity, _layers(model, i)
    w = S if stage.window is None else min(stage.window, S)
    per_position = (
      6 * layers * (_projection_weights(stage) + _ffn_weights(stage))
    )
    per_position += 6 * stage.dim * layers * w * (2 * S - w) / S
    flops += per_position * S / first.capacity
  return flops


# ----- FLOPs of the program -------------------------------------------------


def _forward(
  model: ModelConfig,
  positions: Sequence[float],
  pairs: Sequence[float],
  grouped: Sequence[float],
) -> tuple[dict[str, float], ...]:
  """Forward FLOPs by stage and kind.

  Args:
    positions: of each stage. pairs: (query, key) pairs of each stage.
    grouped: rows through the offset matrices, per transition.
  """
  result = []
  for i, stage in enumerate(model.stages):
    layers, n = _layers(model, i), positions[i]
    kinds = {
      "projections": 2 * n * layers * _projection_weights(stage),
      "scores": 4 * pairs[i] * layers * stage.dim,
      "ffn": 2 * n * layers * _ffn_weights(stage),
    }
    if i == 0:
      kinds["head"] = 2 * n * stage.dim * model.vocab_size
      if model.level_loss_weight > 0:
        kinds["head"] += 2 * n * 2 * stage.dim * model.num_stages
    if i < model.num_stages - 1:
      matrix = 2 * stage.dim * model.stages[i + 1].dim
      kinds["pool"] = matrix * positions[i + 1] if model.parametric else 0
      kinds["upsample"] = matrix * positions[i + 1] if model.parametric else 0
      if model.upsampling == "multi_linear":
        kinds["upsample"] += matrix * grouped[i]
    result.append(kinds)
  return tuple(result)


def _multiplied_pairs(stage: StageConfig, platform: str) -> int:
  """Pairs that attention multiplies for one row, masked or not."""
  kernel = attention.pick(stage.attention, platform)
  return attention.multiplied_pairs(kernel, stage.capacity, stage.window)


def _causal_pairs(stage: StageConfig) -> int:
  """Pairs causality and the window leave in a row that is one piece."""
  L = stage.capacity
  window = L if stage.window is None else min(stage.window, L)
  return window * L - window * (window - 1) // 2


def padded_forward_flops(
  model: ModelConfig, rows_per_device: int = 1, platform: str = "cpu"
) -> tuple[dict[str, float], ...]:
  """Forward FLOPs a device runs for one row, by stage and kind.

  Args: platform: cpu, gpu or tpu; kernels differ in what they pad.
  """
  multiplied = [
    rows_multiplied(rows_per_device * length, model.num_offsets, platform)
    / rows_per_device
    for length in model.capacities[:-1]
  ]
  pairs = [_multiplied_pairs(stage, platform) for stage in model.stages]
  return _forward(model, model.capacities, pairs, multiplied)


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
  pairs = [
    n * _causal_pairs(stage) / stage.capacity
    for n, stage in zip(positions_per_stage, model.stages, strict=True)
  ]
  return _forward(model, positions_per_stage, pairs, positions_per_stage)


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
  """Padded FLOPs of a row that the backward pass computes once more."""
  again = {
    "none": (),
    "dots": ("scores",),  # products with a batch dim are not kept
    "full": ("projections", "scores", "ffn"),
  }
  forward = padded_forward_flops(model, platform=platform)
  return sum(
    kinds[kind]
    for stage, kinds in zip(model.stages, forward, strict=True)
    for kind in again[stage.remat]
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
  result = []
  for i, stage in enumerate(model.stages):
    L, D, F = stage.capacity, stage.dim, stage.ffn
    qkv = (stage.num_heads + 2 * stage.kv_heads) * stage.head_dim
    values = {
      "none": 5 * D + 2 * qkv + 4 * F,
      "dots": 3 * D + qkv + 2 * F,
      "full": D,
    }[stage.remat]
    per_layer = L * values * size
    if stage.remat == "none":  # scores float32, weights in the compute dtype
      pairs = _multiplied_pairs(stage, "cpu")
      per_layer += pairs * stage.num_heads * (4 + size)
    total = _layers(model, i) * per_layer
    if i == 0:
      total += L * model.vocab_size * 4 * 2  # logits and their gradient
    result.append(total)
  return tuple(result)


def kv_cache_bytes(model: ModelConfig) -> tuple[int, ...]:
  """Bytes of keys and values per generated row, by stage, at full length."""
  result = []
  for i, stage in enumerate(model.stages):
    length = stage.capacity
    if stage.window is not None:
      length = min(stage.window, length)
    width = 2 * stage.kv_heads * stage.head_dim
    result.append(_layers(model, i) * width * length * _itemsize(model.dtype))
  return tuple(result)


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
    layered += kinds["attention"] + kinds["ffn"]
    gathered_twice += kinds.get("pool", 0)
    gathered_once += kinds.get("upsample", 0)
    whole += sum(
      kinds.get(kind, 0)
      for kind in ("norms", "embedding", "head", "level head")
    )
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
  model: ModelConfig, positions_per_stage: Sequence[float] | None = None
) -> dict:
  """Everything above as one JSON-able dict; the CLI prints it.

  positions_per_stage: real positions of an average row; None = every slot.
  """
  if positions_per_stage is None:
    positions_per_stage = model.capacities
  counted = parameters(model)
  padded = padded_forward_flops(model)
  useful = useful_forward_flops(model, positions_per_stage)
  activations = activation_bytes(model)
  cache = kv_cache_bytes(model)
  row_bytes = positions_per_stage[0]
  total_parameters = num_parameters(model)
  weights = total_parameters * _itemsize(model.param_dtype)
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
      "optimizer": 2 * weights,  # AdamW's two moments
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
