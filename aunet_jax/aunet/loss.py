"""Nats per position, and bits per byte over a corpus.

Bits per byte = total nats / (ln 2 * number of text bytes). The nats include
the EOS of every document, as a codec must say where a document ends; EOS is
not a byte, so it is not in the denominator. So it is for tokens: their nats and
EOS's over the bytes of text they stand for.
"""

import math

import jax
import jax.numpy as jnp

from aunet_jax.aunet.segments import piece_starts
from aunet_jax.config import EOS


def cross_entropy(logits_BLV: jax.Array, targets_BL: jax.Array) -> jax.Array:
  """-log softmax(logits)[target] in nats, float32 (B, L)."""
  logits_BLV = logits_BLV.astype(jnp.float32)
  target_BL = jnp.take_along_axis(logits_BLV, targets_BL[:, :, None], axis=-1)
  return jax.nn.logsumexp(logits_BLV, axis=-1) - target_BL[:, :, 0]


def count_targets(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Weighted targets and text bytes (int32) among them.

  Targets are int32 where weights are integers: float32 counts only to 2^24.
  """
  counted_BL = batch["weights"] > 0
  if "target_bytes" in batch:  # targets are tokens
    bytes_BL = jnp.where(counted_BL, batch["target_bytes"], 0)
  else:
    bytes_BL = counted_BL & (batch["targets"] != EOS)
  weights_BL = batch["weights"]
  whole = jnp.issubdtype(weights_BL.dtype, jnp.integer)
  num_targets = weights_BL.sum(dtype=jnp.int32 if whole else jnp.float32)
  return num_targets, bytes_BL.sum(dtype=jnp.int32)


def target_levels(
  levels_BL: jax.Array, documents_BL: jax.Array, targets_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Level of every target byte, and 1 where it is known.

  A target is the next input of its piece; the last target of a cut piece lies
  in another row, so its level is unknown here. EOS is never a boundary.

  Returns: (int32 levels, float32 weights), both (B, L).
  """
  next_levels_BL = jnp.pad(levels_BL[:, 1:], ((0, 0), (0, 1)))
  ends_BL = jnp.pad(
    piece_starts(documents_BL)[:, 1:], ((0, 0), (0, 1)), constant_values=True
  )
  is_eos_BL = targets_BL == EOS
  known_BL = (is_eos_BL | ~ends_BL) & (documents_BL > 0)
  level_BL = jnp.where(is_eos_BL, 0, next_levels_BL)
  return level_BL, known_BL.astype(jnp.float32)


def targets_ahead(
  batch: dict[str, jax.Array], ahead: int
) -> tuple[jax.Array, jax.Array]:
  """The target so many positions on, and its weight, both (B, L).

  The weight is 0 where the piece ends before.
  """
  documents_BL = batch["documents"]
  pieces_BL = jnp.cumsum(piece_starts(documents_BL), axis=1, dtype=jnp.int32)

  def later(x_BL):
    return jnp.pad(x_BL[:, ahead:], ((0, 0), (0, ahead)))

  same_BL = (later(pieces_BL) == pieces_BL) & (documents_BL > 0)
  weights_BL = later(batch["weights"])
  return later(batch["targets"]), jnp.where(same_BL, weights_BL, 0)


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
  """Raises: ValueError where there is no byte to divide by."""
  if num_bytes <= 0:
    raise ValueError("bits per byte needs at least one byte of text.")
  return total_nats / (math.log(2) * num_bytes)
