"""The paper's runs (Tables 9, 10 and 11), and a config by its laws."""

import dataclasses
import math

from aunet_jax import config
from aunet_jax.aunet import counts
from aunet_jax.scaling import laws


def bpe_model(dim: int, layers: int, length: int) -> config.ModelConfig:
  """The paper's BPE baseline: one stage over LLaMA-3 tokens."""
  stage = config.StageConfig(
    dim=dim, num_layers=layers, head_dim=128, window=None, capacity=length
  )
  return config.ModelConfig(stages=(stage,), vocab_size=laws.BPE_VOCAB_SIZE)


@dataclasses.dataclass(frozen=True)
class Published:
  """A row of Table 10 with its shape from Table 9. Units: bytes or tokens."""

  name: str
  dims: tuple[int, ...]
  layers: tuple[int, ...]
  length: int  # units of a row
  batch: tuple[int, int, int]  # accumulation, rows of a GPU, GPUs
  num_steps: int
  printed_flops: float  # of the complete run
  printed_units_per_step: float
  printed_flops_per_unit: float
  learning_rate: float
  ffn_dims: tuple[int, ...] | None = None  # None = swiglu_dim

  @property
  def is_bpe(self) -> bool:
    return self.name.startswith("BPE")

  @property
  def model(self) -> config.ModelConfig:
    if self.is_bpe:
      return bpe_model(self.dims[0], self.layers[0], self.length)
    return laws.aunet_model(self.dims, self.layers, self.ffn_dims)

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
    return laws.data_to_model_ratio(
      self.units,
      self.flops_per_unit,
      laws.BYTES_PER_TOKEN if self.is_bpe else 1.0,
    )


def published(family: str, length: int, table: str) -> tuple[Published, ...]:
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
      Published(
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
AUNET2_LADDER = published(
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

AUNET3_LADDER = published(
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

BPE_LADDER = published(
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

LADDERS = {2: AUNET2_LADDER, 3: AUNET3_LADDER}


# The fixed-budget runs of Table 2 (Tables 9, 10, 11). They do not follow the
# laws. The 7B row of AU-Net 2 is printed with 128 rows a step, which
# contradicts its own 4.2e6 bytes per step and 1.2e22 FLOPs; 4 times the rows
# agree with both.
FIXED_BUDGET_RUNS = (
  *published(
    "BPE",
    4096,
    """
1B      2048 25 1,4,64  60000  6.6e20 1.0e6 1.1e10 0.003
7B      4096 32 1,2,256 100000 9.5e21 2.1e6 4.5e10 0.001
""",
  ),
  *published(
    "BPE",
    2048,
    """
1B-dm8  2048 25 1,9,64  310000 3.6e21 1.2e6 9.9e9  0.001
""",
  ),
  *published(
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


def config_for_budget(
  compute: float, num_stages: int = 2, ratio: float = laws.SCALING_RATIO
) -> config.Config:
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
  wanted = laws.flops_per_byte_for(compute, ratio)
  return laws.run_config(
    laws.nearest_model(laws.ladder(num_stages), wanted), compute
  )
