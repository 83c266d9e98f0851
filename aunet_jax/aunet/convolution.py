"""A short causal convolution before the attention of a block.

Every channel of a position gets a weighted sum of its own last values, the
newest W of its piece; the weights start at 0, where it is plain attention.
Such convolutions stand in front of the mixer of most recurrent models
(arXiv 2312.00752). Made of the mixer's parts: see `self_attention`.

Letters: B rows of the batch, C rows of a block, L positions, D width, W taps,
M = W - 1 positions kept, Q successive positions of a row, X = M + Q.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax.aunet import cache
from aunet_jax.aunet.cache import put, take
from aunet_jax.aunet.self_attention import Rings, SelfAttention
from aunet_jax.config import StageConfig


class Kept(NamedTuple):
  """What attention keeps, and the last M inputs of each row, newest last."""

  rings: Rings
  inputs_BMD: jax.Array  # 0 before the first


class ConvolvedAttention(SelfAttention):
  """x + convolution(x), then attention."""

  NAME = "convolved"

  @staticmethod
  def tables(stage, model, position_BL):
    return SelfAttention.tables(stage, model, position_BL), position_BL

  @nn.compact
  def __call__(self, x_BLD, tables, documents_BL):
    rope, position_BL = tables
    W, L, D = self.stage.conv, *x_BLD.shape[1:]
    init = nn.with_logical_partitioning(
      nn.initializers.zeros, ("taps", "activation")
    )
    dtype = jnp.dtype(self.model.param_dtype)
    taps_WD = self.param("taps", init, (W, D), dtype).astype(x_BLD.dtype)
    self.sow(cache.HISTORY, "inputs", x_BLD)
    y_BLD = x_BLD
    for back in range(W):
      past_BLD = jnp.pad(x_BLD, ((0, 0), (back, 0), (0, 0)))[:, :L]
      past_BLD = jnp.where(position_BL[:, :, None] >= back, past_BLD, 0)
      y_BLD += past_BLD * taps_WD[back][None, None]
    attend = SelfAttention(self.stage, self.model, name="attention")
    return attend(y_BLD, rope, documents_BL)

  # ----- one position -------------------------------------------------------

  @staticmethod
  def weights(params: dict, matrix) -> dict:
    attention = SelfAttention.weights(params["attention"], matrix)
    return {"taps": params["taps"], "attention": attention}

  @staticmethod
  def step(
    weights, stage, kept: Kept, x_CD, tables, position_C, rows_C, ahead=1
  ):
    """Returns: y_CD, and attention's entry with the inputs (C, M, D)."""
    past_CMD = take(kept.inputs_BMD, rows_C[::ahead])
    x_CQD = x_CD.reshape(-1, ahead, x_CD.shape[-1])
    window_CXD = jnp.concatenate([past_CMD, x_CQD], axis=1)
    M = past_CMD.shape[1]
    for back, taps_D in enumerate(weights["taps"].astype(x_CD.dtype)):
      past_CQD = window_CXD[:, M - back : M - back + ahead]
      x_CQD += past_CQD * taps_D[None, None]
    y_CD, entry = SelfAttention.step(
      weights["attention"], stage, kept.rings, x_CQD.reshape(x_CD.shape),
      tables[0], position_C, rows_C, ahead,
    )  # fmt: skip
    kept_CQMD = jnp.stack(
      [window_CXD[:, q : q + M] for q in range(1, ahead + 1)], axis=1
    )
    return y_CD, (entry, kept_CQMD.reshape(-1, *past_CMD.shape[1:]))

  @staticmethod
  def fill(stage, history: dict, count_B: jax.Array, num_slots: int) -> Kept:
    rings = SelfAttention.fill(stage, history["attention"], count_B, num_slots)
    (x_BLD,) = history["inputs"]
    M = stage.conv - 1
    index_BM = count_B[:, None] - M + jnp.arange(M, dtype=jnp.int32)[None]
    inputs_BMD = jnp.take_along_axis(
      x_BLD, jnp.maximum(index_BM, 0)[:, :, None], axis=1
    )
    return Kept(rings, jnp.where(index_BM[:, :, None] >= 0, inputs_BMD, 0))

  @staticmethod
  def blank(kept: Kept, num_rows: int):
    _, M, D = kept.inputs_BMD.shape
    nothing_CMD = jnp.zeros((num_rows, M, D), kept.inputs_BMD.dtype)
    return SelfAttention.blank(kept.rings, num_rows), nothing_CMD

  @staticmethod
  def write(kept: Kept, rows_C, position_C, entry) -> Kept:
    rings = SelfAttention.write(kept.rings, rows_C, position_C, entry[0])
    B, C = kept.inputs_BMD.shape[0], rows_C.shape[0]
    if C > B:  # several positions of a row: its newest has all that is kept
      later_CC = position_C[None] > position_C[:, None]
      later_CC &= rows_C[None] == rows_C[:, None]
      rows_C = jnp.where(later_CC.any(axis=1), B, rows_C)
    return Kept(rings, put(kept.inputs_BMD, rows_C, entry[1]))

  # ----- counts of one block ------------------------------------------------

  @staticmethod
  def num_small(stage: StageConfig) -> dict[str, int]:
    return SelfAttention.num_small(stage) | {"taps": stage.conv * stage.dim}

  @staticmethod
  def cache_bytes(stage: StageConfig, itemsize: int) -> int:
    inputs = (stage.conv - 1) * stage.dim * itemsize
    return SelfAttention.cache_bytes(stage, itemsize) + inputs
