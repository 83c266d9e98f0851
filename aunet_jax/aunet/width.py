"""One learning rate for every width of a stage (muP, arXiv 2203.03466).

What a rate does to a model depends on its width: an update of Adam moves every
number of a matrix alike, so the wider its input, the further its output moves.
A stage with `base_dim` begins and learns such that all its vectors move as far
as those of a model of that width. The rule is that of the spectral norm (arXiv
2310.17813): of a matrix from n numbers to m, first values and updates keep a
norm in proportion to sqrt(m / n). Where its input is u times and its output v
times as wide as in the base model,

  first values   times min(1, sqrt(v / u))
  Adam's rate    times 1 / u
  Muon's rate    times sqrt(v / u), over how much sqrt(max(n, m)) has grown,
                 with which its updates are scaled (`train/optimizer.py`)

The head has v = 1. Tables that are looked up have u = 1; their first values
keep the base model's spread. A head that is the byte table cannot have two
rates: its logits are divided by u instead (`head_scale`). Norms and
convolutions act on a channel at a time and change nothing. Weight decay takes
from a parameter in a step what it takes in the base model (arXiv 2405.13698),
so its factor undoes the rate's. Attention scores need no other scale, since a
stage is widened by heads: `head_dim` stays.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax

from aunet_jax.config import ModelConfig


class Scales(NamedTuple):
  """What is multiplied of a parameter."""

  init: float  # its first values
  adamw: float  # its learning rate, by optimizer
  muon: float


_VECTORS = ("scale", "taps")  # act on a channel at a time


def stage_of(name: str, config: ModelConfig) -> int:
  """Index of the stage of a part, by its name at the top of the parameters.

  A transition belongs to its finer stage; what reads or predicts bytes to the
  byte stage.
  """
  if name == "deepest":
    return config.num_stages - 1
  number = name.rpartition("_")[2]
  return int(number) - 1 if number.isdigit() else 0


def matrix_dims(box) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """Which dims of a parameter are a matrix's input, and which its output.

  Read off the logical dims that parameters are made with: "embed" is the
  residual width; layers of a stack and offsets of an upsampling are matrices
  of their own; heads belong to one matrix. Tables of bytes or of offsets, the
  head and norms are none: None.
  """
  dims = [
    i for i, name in enumerate(box.names) if name not in ("layers", "offset")
  ]
  names = [box.names[i] for i in dims]
  if len(dims) < 2 or "embed" not in names:
    return None
  cut = 1 if names[0] == "embed" else -1
  return tuple(dims[:cut]), tuple(dims[cut:])


def head_scale(model: ModelConfig) -> float:
  """Of the logits."""
  return 1 / model.stages[0].growth if model.tie_embeddings else 1.0


def _growth(names: list[str], model: ModelConfig) -> tuple[float, float]:
  """u and v of a matrix by its path."""
  i = stage_of(names[0], model)
  stage = model.stages[i]
  own, ffn = stage.growth, stage.ffn / stage.base_ffn
  if names[0].startswith(("pool_", "upsample_")):
    coarse = model.stages[i + 1].growth
    return (own, coarse) if names[0].startswith("pool_") else (coarse, own)
  ends = {"head": (own, 1.0), "level_head": (own, 1.0), "down": (ffn, own)}
  ends |= {"gate": (own, ffn), "up": (own, ffn)}
  return ends.get(names[-1], (own, own))


def scales(params: dict, model: ModelConfig) -> dict:
  """A tree like the parameters of their Scales; all 1 at base widths.

  Args: params: with their logical dims (boxed), or their shapes.
  """

  def of(path, box):
    names = [key.key for key in path]
    if names[-1] in _VECTORS:
      return Scales(1.0, 1.0, 1.0)
    u, v = _growth(names, model)
    dims = matrix_dims(box)
    if dims is None and names[-1] not in ("head", "level_head"):  # a table
      width = u if names[-1] == "offsets" else v
      return Scales(math.sqrt(width), 1.0, 1.0)
    init, adam = min(1.0, math.sqrt(v / u)), 1 / u
    if dims is None:
      return Scales(init, adam, adam)
    n, m = (math.prod(box.value.shape[i] for i in some) for some in dims)
    grown = max(n, m) / max(n / u, m / v)
    return Scales(init, adam, math.sqrt(v / u / grown))

  return jax.tree_util.tree_map_with_path(
    of, params, is_leaf=lambda x: isinstance(x, nn.Partitioned)
  )


def scale_init(params: dict, model: ModelConfig) -> dict:
  """First values (boxed) as `scales` wants them."""

  def scaled(factors, box):
    if factors.init == 1:
      return box
    return box.replace_boxed(box.value * factors.init)

  return jax.tree.map(
    scaled,
    scales(params, model),
    params,
    is_leaf=lambda x: isinstance(x, Scales),
  )
