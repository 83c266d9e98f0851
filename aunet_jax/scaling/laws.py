"""The paper's scaling laws, its published runs, and a config for a budget.

Paper: arXiv 2506.14761, Section 2.3 (laws), Appendix A (accounting), Tables 9
(shapes), 10 (runs) and 11 (learning rates).

Two readings reproduce the published numbers where the text leaves a choice:
stage capacities of 8192, 1664, 1144 and about 780 positions, and FLOPs per
unit without the output head in the data-to-model ratio and the laws, with the
head in the FLOPs that Table 10 prints. The text once speaks of a ratio of 2;
every scaling run has 10. Feed-forward widths are `config.swiglu_dim` in every
row but the 8B model's.
"""

import dataclasses
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


def bpe_model(dim: int, layers: int, length: int) -> ModelConfig:
  """The paper's BPE baseline: one stage over LLaMA-3 tokens."""
  stage = StageConfig(
    dim=dim, num_layers=layers, head_dim=128, window=None, capacity=length
  )
  return ModelConfig(stages=(stage,), vocab_size=BPE_VOCAB_SIZE)


@dataclasses.dataclass(frozen=True)
class Run:
  """A row of Table 10 with its shape from Table 9. Units: bytes or tokens."""

  name: str
  dims: tuple[int, ...]
  layers: tuple[int, ...]
  length: int  # units of a row
  batch: tuple[int, int, int]  # accumulation, rows of a GPU, GPUs
  num_steps: int
  printed_flops: float  # of the whole run
  printed_units_per_step: float
  printed_flops_per_unit: float
  learning_rate: float
  ffn_dims: tuple[int, ...] | None = None  # None = swiglu_dim

  @property
  def is_bpe(self) -> bool:
    return self.name.startswith("BPE")

  @property
  def model(self) -> ModelConfig:
    if self.is_bpe:
      return bpe_model(self.dims[0], self.layers[0], self.length)
    return aunet_model(self.dims, self.layers, self.ffn_dims)

  @property
  def units_per_step(self) -> int:
    return math.prod(self.batch) * self.length

  @property
  def units(self) -> int:
    return self.units_per_step * self.num_steps

  @property
  def flops_per_unit(self) -> float:
    """Without the output head, as in the laws."""
    return counts.paper_flops_per_byte(self.model, head=False)

  @property
  def compute(self) -> float:
    """C of the laws: training FLOPs without the output head."""
    return self.flops_per_unit * self.units

  @property
  def ratio(self) -> float:
    return data_to_model_ratio(
      self.units, self.flops_per_unit, BYTES_PER_TOKEN if self.is_bpe else 1.0
    )

  @property
  def law_learning_rate(self) -> float:
    law = bpe_learning_rate if self.is_bpe else aunet_learning_rate
    return law(self.compute)

  @property
  def law_units_per_step(self) -> float:
    law = bpe_batch_tokens if self.is_bpe else aunet_batch_bytes
    return law(self.compute)


def _runs(family: str, length: int, table: str) -> tuple[Run, ...]:
  """Runs from lines of: name, dims, layers, accumulation and rows of a GPU and
  GPUs, steps, FLOPs, units per step, FLOPs per unit, learning rate, and, where
  they are not `swiglu_dim`, feed-forward widths."""

  def numbers(text):
    return tuple(int(number) for number in text.split(","))

  runs = []
  for line in table.strip().splitlines():
    name, dims, layers, batch, steps, flops, units, unit, rate, *ffn = (
      line.split()
    )
    runs.append(
      Run(
        name=f"{family} {name}",
        dims=numbers(dims),
        layers=numbers(layers),
        length=length,
        batch=numbers(batch),
        num_steps=int(steps),
        printed_flops=float(flops),
        printed_units_per_step=float(units),
        printed_flops_per_unit=float(unit),
        learning_rate=float(rate),
        ffn_dims=numbers(ffn[0]) if ffn else None,
      )
    )
  return tuple(runs)


# Scaling runs, named by their budget in FLOPs (Tables 9 and 10).
AUNET2_LADDER = _runs(
  "AU-Net 2",
  8192,
  """
1e19   256,1024       3,11    2,53,1   56240  1.1e19 8.7e5 2.4e8 0.002923
2e19   256,1152       3,13    3,43,1   63457  2.2e19 1.1e6 3.2e8 0.002615
4e19   256,1280       3,14    4,39,1   68794  3.7e19 1.3e6 4.2e8 0.002377
8e19   384,1536       3,14    6,32,1   79862  7.6e19 1.6e6 6.0e8 0.002096
1e20   384,1536       3,19    4,28,2   89768  1.3e20 1.8e6 7.9e8 0.001906
3e20   512,1920       3,17    4,24,3   99036  2.6e20 2.4e6 1.1e9 0.001685
5e20   512,2048       3,21    4,18,5   108807 5.0e20 2.9e6 1.5e9 0.001507
9e20   512,2304       3,24    1,14,32  119909 9.3e20 3.7e6 2.1e9 0.001348
2e21   640,2560       3,26    2,8,32   141463 1.7e21 4.2e6 2.9e9 0.001214
3e21   640,2688       3,33    2,10,32  153594 3.1e21 5.2e6 3.9e9 0.00109
6e21   768,3200       3,32    1,8,96   176692 5.9e21 6.3e6 5.3e9 0.0009731
1e22   896,3584       3,35    1,6,160  193096 1.1e22 7.9e6 7.3e9 0.0008719
""",
)


AUNET3_LADDER = _runs(
  "AU-Net 3",
  8192,
  """
1e19   256,1024,1536  3,3,4   2,55,1   56992  1.3e19 9.0e5 2.5e8 0.002872
2e19   256,1152,1792  3,3,5   3,45,1   64347  2.4e19 1.1e6 3.4e8 0.002561
5e19   256,1280,1920  3,3,7   4,42,1   71962  4.7e19 1.4e6 4.8e8 0.002279
7e19   256,1280,1920  3,3,10  5,38,1   79222  7.3e19 1.6e6 5.9e8 0.00211
2e20   384,1536,2304  3,3,10  4,30,2   90845  1.5e20 2.0e6 8.6e8 0.001852
2.7e20 384,1536,2304  3,3,15  4,24,3   100198 2.7e20 2.4e6 1.1e9 0.001678
5e20   512,1920,2816  3,3,13  2,22,8   113583 5.2e20 2.9e6 1.6e9 0.001496
9e20   512,2048,3072  3,3,16  1,14,32  119374 9.2e20 3.7e6 2.1e9 0.001351
2e21   512,2304,3456  3,3,18  1,16,32  141594 1.7e21 4.2e6 2.9e9 0.001213
3e21   640,2560,3840  3,3,21  1,10,64  158941 3.3e21 5.2e6 4.0e9 0.001077
6e21   640,2688,4096  3,3,26  1,8,96   177921 6.0e21 6.3e6 5.4e9 0.0009707
1e22   768,3200,4864  3,3,26  1,4,256  187518 1.2e22 8.4e6 7.6e9 0.0008612
""",
)


BPE_LADDER = _runs(
  "BPE",
  2048,
  """
1e19   1024           12      15,25,1  14008  2.0e19 7.7e5 1.9e9 0.008152
2e19   1152           13      18,24,1  16120  3.3e19 8.8e5 2.3e9 0.007378
4e19   1280           14      22,22,1  19438  5.6e19 9.9e5 2.9e9 0.006633
8e19   1536           15      15,19,2  24252  1.1e20 1.2e6 4.0e9 0.005788
1e20   1664           17      13,17,3  28160  2.0e20 1.4e6 5.1e9 0.005204
3e20   1792           20      11,14,5  32466  3.3e20 1.6e6 6.5e9 0.004693
5e20   2048           21      12,12,6  39573  6.0e20 1.8e6 8.6e9 0.0042
1e21   2304           24      4,8,32   46980  1.1e21 2.1e6 1.2e10 0.003722
2e21   2560           26      4,9,32   55900  2.0e21 2.4e6 1.5e10 0.003357
3e21   2816           29      3,7,64   64711  3.6e21 2.8e6 2.0e10 0.003018
6e21   3072           34      4,6,64   77520  6.5e21 3.1e6 2.7e10 0.002701
1e22   3456           37      3,5,128  84915  1.2e22 3.9e6 3.6e10 0.002416
""",
)


# The fixed-budget runs of Table 2 (Tables 9, 10, 11). They do not follow the
# laws. The 7B row of AU-Net 2 is printed with 128 rows a step, which
# contradicts its own 4.2e6 bytes per step and 1.2e22 FLOPs; 4 times the rows
# agree with both.
FIXED_BUDGET_RUNS = (
  *_runs(
    "BPE",
    4096,
    """
1B      2048 25 1,4,64  60000  6.6e20 1.0e6 1.1e10 0.003
7B      4096 32 1,2,256 100000 9.5e21 2.1e6 4.5e10 0.001
""",
  ),
  *_runs(
    "BPE",
    2048,
    """
1B-dm8  2048 25 1,9,64  310000 3.6e21 1.2e6 9.9e9  0.001
""",
  ),
  *_runs(
    "AU-Net",
    8192,
    """
2-1B  512,2048           3,25     1,12,16 180000 5.1e20 1.6e6 1.8e9 0.00165
3-1B  512,2048,3072      3,3,18   1,14,24 105000 6.7e20 2.8e6 2.3e9 0.0015
4-1B  512,2048,3072,4608 3,3,4,10 1,14,24 105000 8.0e20 2.8e6 2.8e9 0.0015
2-dm8 512,2048           3,25     1,7,32  950000 3.2e21 1.8e6 1.8e9 0.00094
3-dm8 512,2048,3072      3,3,18   1,11,64 300000 4.0e21 5.8e6 2.3e9 0.0011
4-dm8 512,2048,3072,4608 3,3,3,12 1,11,64 300000 5.0e21 5.8e6 2.9e9 0.0011
2-7B  1024,4096 3,32 4,1,128 277834 1.2e22 4.2e6 1.0e10 0.000818 4096,14336
""",
  ),
)


LADDERS = {2: AUNET2_LADDER, 3: AUNET3_LADDER}


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
    large = [(run.dims[0], run.layers[0]) for run in BPE_LADDER]
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
      for dim, layers in small + large
    ]
  if num_stages not in (2, 3, 4):
    raise ValueError(
      f"num_stages={num_stages} has no published ladder; use 2 or 3, or 1 or "
      f"4 for our own."
    )
  models = []
  for dim in _SMALL_WIDTHS:
    dims = (_narrow(dim), dim, dim * 3 // 2, dim * 9 // 4 // 16 * 16)
    trunk = max(3, dim // 96) if num_stages == 2 else 3
    layers = (3,) * (num_stages - 1) + (trunk,)
    models.append(aunet_model(dims[:num_stages], layers))
  for run in LADDERS[min(num_stages, 3)]:
    if num_stages < 4:
      models.append(run.model)
    else:
      wide = run.dims[2] * 3 // 2 // 128 * 128
      models.append(aunet_model((*run.dims, wide), (3, 3, 3, run.layers[2])))
  return models


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


def config_for_budget(
  compute: float, num_stages: int = 2, ratio: float = SCALING_RATIO
) -> Config:
  """A complete run that spends `compute` training FLOPs as the paper would.

  The model is the ladder's whose FLOPs per byte are nearest to what the ratio
  asks for; data then spends the budget. C excludes the output head, as in the
  laws. The sweep behind the laws and the ladders lie at or above about 1e18
  FLOPs; below, shapes and laws are extrapolated.

  Raises: ValueError for a depth without a ladder, or a budget for which the
    ladder has no model within a factor of two of the right size.
  """
  if num_stages not in LADDERS:
    raise ValueError(
      f"num_stages={num_stages} has no published ladder; use "
      f"{' or '.join(map(str, LADDERS))}."
    )
  wanted = flops_per_byte_for(compute, ratio)
  return run_config(nearest_model(ladder(num_stages), wanted), compute)


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
