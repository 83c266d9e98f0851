"""The paper's scaling laws, its ladders of models, and a config for a budget.

Paper: arXiv 2506.14761, Section 2.3 (laws), Appendix A (accounting), Tables 9
(shapes), 10 (runs) and 11 (learning rates).

Two readings reproduce the published numbers where the text leaves a choice:
stage capacities of 8192, 1664, 1144 and about 780 positions, and FLOPs per
unit without the output head in the data-to-model ratio and the laws, with the
head in the FLOPs that Table 10 prints. The text once speaks of a ratio of 2;
every scaling run has 10. Feed-forward widths are `config.swiglu_dim` in every
row but the 8B model's.
"""

import math

from aunet_jax import config as config_lib
from aunet_jax.aunet import counts
from aunet_jax.config import Config, ModelConfig, StageConfig

BYTES_PER_TOKEN = 4.56  # LLaMA-3 tokens on DCLM, Appendix A
SCALING_RATIO = 10.0  # data-to-model ratio of all scaling runs, Section 3.2
CAPACITIES = (8192, 1664, 1144, 780)  # what reproduces Table 10
WINDOWS = (512, 4096, 4096, 4096)  # released configs; bytes 512
RULES = (None, "word@1", "word@2", "word@4")  # released configs
BPE_VOCAB_SIZE = 128_256  # LLaMA-3; Table 2's 525M embedding at width 2048
WARMUP_STEPS = 10_000  # AU-Net scaling runs, Table 11
BPE_WARMUP_STEPS = 2_000  # BPE scaling runs, Table 11


def aunet_batch_bytes(compute: float) -> float:
  """BSZ(C) of AU-Net in bytes (Section 2.3); C in training FLOPs."""
  return 0.66 * compute**0.321


def aunet_learning_rate(compute: float) -> float:
  """LR(C) of AU-Net (Section 2.3)."""
  return 6.6 * compute**-0.176


def bpe_batch_tokens(compute: float) -> float:
  """BSZ(C) of BPE Transformers in tokens (Section 2.3)."""
  return 29.9 * compute**0.231


def bpe_learning_rate(compute: float) -> float:
  """LR(C) of BPE Transformers (Section 2.3)."""
  return 19.3 * compute**-0.177


def data_to_model_ratio(
  units: float, flops_per_unit: float, bytes_per_unit: float
) -> float:
  """gamma in LLaMA-3 tokens: units / FLOPs per unit, over k^2 (Appendix A).

  Args: units: trained on. flops_per_unit: without the output head.
    bytes_per_unit: 1 for bytes, `BYTES_PER_TOKEN` for tokens.
  """
  units_per_token = BYTES_PER_TOKEN / bytes_per_unit
  return units / flops_per_unit / units_per_token**2


def _head_dim(dim: int, most: int) -> int:
  """`most`, as in the paper, or less where a stage is narrow: >= 4 heads."""
  most = min(most, max(16, dim // 4))
  return max(
    size for size in (16, 32, 64, 128) if size <= most and not dim % size
  )


def aunet_model(
  dims: tuple[int, ...],
  layers: tuple[int, ...],
  ffn_dims: tuple[int | None, ...] | None = None,
) -> ModelConfig:
  """An AU-Net with the paper's heads (64 for bytes, 128), windows and rules.

  Widths must be multiples of 16.
  """
  ffn_dims = (None,) * len(dims) if ffn_dims is None else ffn_dims
  stages = []
  for i, dim in enumerate(dims):
    stages.append(
      StageConfig(
        dim=dim,
        num_layers=layers[i],
        head_dim=_head_dim(dim, 64 if i == 0 else 128),
        window=WINDOWS[i],
        capacity=CAPACITIES[i],
        rule=RULES[i],
        ffn_dim=ffn_dims[i],
      )
    )
  return ModelConfig(stages=tuple(stages))


# Shapes of the scaling runs (Table 9), smallest first: widths, then blocks of
# the deepest stage. The other stages have `_BLOCKS` each.
LADDERS = {
  1: (
    (1024, 12), (1152, 13), (1280, 14), (1536, 15), (1664, 17), (1792, 20),
    (2048, 21), (2304, 24), (2560, 26), (2816, 29), (3072, 34), (3456, 37),
  ),
  2: (
    (256, 1024, 11), (256, 1152, 13), (256, 1280, 14), (384, 1536, 14),
    (384, 1536, 19), (512, 1920, 17), (512, 2048, 21), (512, 2304, 24),
    (640, 2560, 26), (640, 2688, 33), (768, 3200, 32), (896, 3584, 35),
  ),
  3: (
    (256, 1024, 1536, 4), (256, 1152, 1792, 5), (256, 1280, 1920, 7),
    (256, 1280, 1920, 10), (384, 1536, 2304, 10), (384, 1536, 2304, 15),
    (512, 1920, 2816, 13), (512, 2048, 3072, 16), (512, 2304, 3456, 18),
    (640, 2560, 3840, 21), (640, 2688, 4096, 26), (768, 3200, 4864, 26),
  ),
}  # fmt: skip
_BLOCKS = 3


# Below the ladders, and for models the paper has no ladder of: our own
# extension. Widths keep the paper's proportions (Section 3.1: 1/4, 1, 3/2) and
# every stage has at least 3 blocks; the trunk is as deep as the ladders' for
# its width.
_SMALL_WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896)


def _narrow(width: int) -> int:
  """The byte stage beside a trunk of this width."""
  return max(32, width // 128 * 32)


def ladder(num_stages: int) -> list[ModelConfig]:
  """Models of growing size: our extension below, then the paper's ladder.

  Args: num_stages: 1 is the flat byte Transformer with the BPE ladder's
    shapes; 4 the 3-stage ladder with a fourth stage half as wide again, as the
    paper's 1B model has, and the 3-stage model's last depth.
  Raises: ValueError for any other depth.
  """
  if num_stages == 1:
    small = [(dim, max(3, dim // 85)) for dim in _SMALL_WIDTHS]
    return [
      ModelConfig(
        stages=(
          StageConfig(
            dim=dim,
            num_layers=layers,
            head_dim=_head_dim(dim, 128),
            window=None,
            capacity=CAPACITIES[0],
          ),
        )
      )
      for dim, layers in (*small, *LADDERS[1])
    ]
  if num_stages not in (2, 3, 4):
    raise ValueError(
      f"num_stages={num_stages} has no published ladder; use 2 or 3, or 1 or "
      f"4 for our own."
    )
  shapes = []
  for dim in _SMALL_WIDTHS:
    dims = (_narrow(dim), dim, dim * 3 // 2, dim * 9 // 4 // 16 * 16)
    trunk = max(3, dim // 96) if num_stages == 2 else 3
    shapes.append((*dims[:num_stages], trunk))
  for *dims, trunk in LADDERS[min(num_stages, 3)]:
    wide = [dims[-1] * 3 // 2 // 128 * 128] if num_stages == 4 else []
    shapes.append((*dims, *wide, trunk))
  return [
    aunet_model(tuple(dims), (_BLOCKS,) * (num_stages - 1) + (trunk,))
    for *dims, trunk in shapes
  ]


def flops_per_byte_for(compute: float, ratio: float = SCALING_RATIO) -> float:
  """What a model may cost a byte: C = F N with N = ratio k^2 F (Appendix A).

  Raises: ValueError for numbers that are not positive and finite.
  """
  for name, value in (("compute", compute), ("ratio", ratio)):
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f"{name}={value} must be positive and finite.")
  return math.sqrt(compute / ratio) / BYTES_PER_TOKEN


def nearest_model(models: list[ModelConfig], wanted: float) -> ModelConfig:
  """The model whose FLOPs per byte, without head, are nearest to `wanted`.

  Raises: ValueError where none lies within a factor of two.
  """
  sized = [
    (counts.paper_flops_per_byte(model, head=False), model) for model in models
  ]
  flops, model = min(sized, key=lambda pair: abs(math.log(pair[0] / wanted)))
  if abs(math.log2(flops / wanted)) > 1:
    least, most = (f([flops for flops, _ in sized]) for f in (min, max))
    raise ValueError(
      f"no model has about {wanted:.3g} FLOPs per byte; there are {least:.2g} "
      f"to {most:.2g}. With data as the ratio of {SCALING_RATIO:g} wants it, "
      f"those suit budgets of "
      f"{SCALING_RATIO * (BYTES_PER_TOKEN * least) ** 2:.1e} to "
      f"{SCALING_RATIO * (BYTES_PER_TOKEN * most) ** 2:.1e} FLOPs; use other "
      f"budgets, or another ratio."
    )
  return model


def run_config(
  model: ModelConfig,
  compute: float,
  *,
  batch_bytes: float | None = None,
  learning_rate: float | None = None,
  byte_fill: float = 1.0,
  bytes_per_unit: float | None = None,
) -> Config:
  """Trains `model` for `compute` FLOPs (without the head).

  Args: batch_bytes, learning_rate: None = the laws of AU-Net, or of BPE where
    the model reads tokens. byte_fill: share of a row's positions that hold
    text. bytes_per_unit: of a token; None = the model reads bytes.
  Warmup is Table 11's, or a fifth of the run where that is shorter.
  """
  rate, warmup = aunet_learning_rate(compute), WARMUP_STEPS
  batch = aunet_batch_bytes(compute)
  if bytes_per_unit is not None:
    rate, warmup = bpe_learning_rate(compute), BPE_WARMUP_STEPS
    batch = bpe_batch_tokens(compute) * bytes_per_unit
  batch_bytes = batch_bytes or batch
  row = model.capacities[0] * byte_fill * (bytes_per_unit or 1.0)
  flops = counts.paper_flops_per_byte(model, head=False)
  flops /= bytes_per_unit or 1.0
  batch_size = max(1, round(batch_bytes / row))
  num_steps = max(1, round(compute / flops / (batch_size * row)))
  return Config(
    model=model,
    train=config_lib.TrainConfig(num_steps=num_steps, batch_size=batch_size),
    optimizer=config_lib.OptimizerConfig(
      learning_rate=learning_rate or rate,
      warmup_steps=min(warmup, num_steps // 5),
    ),
  )
