"""Hash embeddings of the byte n-grams that end at a position.

As BLT's encoder (arXiv 2412.09871, Section 3.2.1): for each n from 3 on, the n
bytes that end at a position are hashed to a row of a table of their own; the
byte's vector and the n-grams' are summed and divided by their number. A table
costs look-ups and almost no FLOPs. The hash is ours.

An n-gram that would reach over the start of its piece has a filler in place of
the bytes there, so that a piece is what it is alone.

Letters: B batch, L positions, C rows of a block, D width, M bytes before a
position that n-grams reach, W = M + 1, G sizes of n-grams.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax.aunet.segments import piece_positions
from aunet_jax.config import ModelConfig

SHORTEST = 3  # bytes of the shortest n-gram


def reach(model: ModelConfig) -> int:
  """M: bytes before a position that its n-grams hold; 0 without n-grams."""
  return model.ngram_longest - 1 if model.ngram_rows else 0


def num_sizes(model: ModelConfig) -> int:
  return model.ngram_longest - SHORTEST + 1


def filler(model: ModelConfig) -> int:
  """What stands before the start of a piece; no id of the vocabulary."""
  return model.vocab_size


def rows(window: jax.Array, model: ModelConfig) -> jax.Array:
  """Rows of the joint table, int32 (..., G), of the newest W ids (..., W).

  A multiplicative hash of the ids from the newest back, with its bits mixed
  before the lowest are taken; in 32 bits, which wrap.
  """
  ids = window.astype(jnp.uint32)
  key = jnp.full(window.shape[:-1], 0x811C9DC5, jnp.uint32)
  found = []
  for n in range(1, model.ngram_longest + 1):
    key = (key ^ (ids[..., -n] + jnp.uint32(1))) * jnp.uint32(0x01000193)
    if n >= SHORTEST:
      mixed = (key ^ (key >> 15)) * jnp.uint32(0x2C1B3C6D)
      mixed = (mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)
      row = (mixed ^ (mixed >> 15)) & jnp.uint32(model.ngram_rows - 1)
      found.append(row + jnp.uint32(len(found) * model.ngram_rows))
  return jnp.stack(found, axis=-1).astype(jnp.int32)


def mean(x: jax.Array, table, row, model: ModelConfig) -> jax.Array:
  """The bytes' vectors (..., D) and those of their n-grams, on average."""
  return (x + table[row].sum(axis=-2)) / (num_sizes(model) + 1)


class NGrams(nn.Module):
  """Adds the n-grams' vectors to the bytes'."""

  model: ModelConfig

  @nn.compact
  def __call__(self, x_BLD, bytes_BL, documents_BL):
    model, D = self.model, x_BLD.shape[-1]
    # At 0: an n-gram that was never seen says nothing.
    init = nn.with_logical_partitioning(
      nn.initializers.zeros, ("ngram", "activation")
    )
    shape = (num_sizes(model) * model.ngram_rows, D)
    table = self.param("table", init, shape, jnp.dtype(model.param_dtype))
    position_BL = piece_positions(documents_BL)
    window = [bytes_BL.astype(jnp.int32)]
    for back in range(1, reach(model) + 1):
      shifted_BL = jnp.pad(window[0], ((0, 0), (back, 0)))
      shifted_BL = shifted_BL[:, : bytes_BL.shape[1]]
      window.append(jnp.where(position_BL >= back, shifted_BL, filler(model)))
    row_BLG = rows(jnp.stack(window[::-1], axis=-1), model)
    return mean(x_BLD, table.astype(x_BLD.dtype), row_BLG, model)

  # ----- one position -------------------------------------------------------

  @staticmethod
  def step(table, model: ModelConfig, x_CD, byte_C, recent_CM):
    """Returns: x_CD, and the M newest bytes with this one."""
    window_CW = jnp.concatenate(
      [recent_CM, byte_C[:, None].astype(jnp.int32)], axis=1
    )
    x_CD = mean(x_CD, table, rows(window_CW, model), model)
    return x_CD, window_CW[:, 1:]

  @staticmethod
  def fill(bytes_BL, count_B, model: ModelConfig) -> jax.Array:
    """The M newest of count_B bytes of each row, (B, M) int32."""
    M = reach(model)
    index_BM = count_B[:, None] - M + jnp.arange(M, dtype=jnp.int32)[None]
    recent_BM = jnp.take_along_axis(bytes_BL, jnp.maximum(index_BM, 0), axis=1)
    return jnp.where(index_BM >= 0, recent_BM.astype(jnp.int32), filler(model))
