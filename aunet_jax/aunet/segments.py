"""Where segments begin, as index arithmetic with static shapes.

Pure functions of levels and documents (AU-Net paper, Section 2.1). Letters: B
batch, L positions of the fine stage, S slots of the coarse stage, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
  """How one stage is cut into segments, each led by a boundary.

  Computed once per transition and used on both paths. A slot past the last
  boundary is filler: it repeats position 0 and no position maps to it.
  """

  index_BS: jax.Array  # int32: position of each slot's boundary; filler 0
  filled_BS: jax.Array  # bool: the slot holds a boundary
  boundary_BL: jax.Array  # bool: the position leads a segment
  slot_BL: jax.Array  # int32: slot of the last boundary at or before, >= 0
  offset_BL: jax.Array  # int32: distance to that boundary, >= 0


def segment(boundary_BL: jax.Array, num_slots: int) -> Segments:
  """Numbers the boundaries of each row from the left.

  Args: boundary_BL: bool. num_slots: the coarse stage's capacity; boundaries
    past it are ignored, so the last kept segment runs to the end of the row
    (the official code does the same; our packer never lets it happen).
  """
  B, L = boundary_BL.shape
  rank_BL = jnp.cumsum(boundary_BL, axis=1, dtype=jnp.int32) - 1
  boundary_BL = boundary_BL & (rank_BL < num_slots)
  position_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
  # Non-boundaries aim past the last slot, where the scatter drops them.
  target_BL = jnp.where(boundary_BL, rank_BL, num_slots)
  rows_B1 = jnp.arange(B)[:, None]
  index_BS = jnp.zeros((B, num_slots), jnp.int32)
  index_BS = index_BS.at[rows_B1, target_BL].set(position_BL, mode="drop")
  count_B1 = boundary_BL.sum(axis=1, keepdims=True)
  last_BL = jax.lax.cummax(jnp.where(boundary_BL, position_BL, 0), axis=1)
  return Segments(
    index_BS=index_BS,
    filled_BS=jnp.arange(num_slots)[None] < count_B1,
    boundary_BL=boundary_BL,
    slot_BL=jnp.clip(rank_BL, 0, num_slots - 1),
    offset_BL=position_BL - last_BL,
  )


def take(x_BLD: jax.Array, index_BS: jax.Array) -> jax.Array:
  """x_BLD[b, index_BS[b, s]]: down with `index_BS`, up with `slot_BL`."""
  return jnp.take_along_axis(x_BLD, index_BS[:, :, None], axis=1)


def piece_starts(documents_BL: jax.Array) -> jax.Array:
  """True where a row starts or the document id changes."""
  before_BL = jnp.pad(documents_BL[:, :-1], ((0, 0), (1, 0)))
  first_1L = jnp.arange(documents_BL.shape[1])[None] == 0
  return first_1L | (documents_BL != before_BL)


def piece_positions(documents_BL: jax.Array) -> jax.Array:
  """Positions counted from the start of each piece, int32."""
  B, L = documents_BL.shape
  position_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
  start_BL = jnp.where(piece_starts(documents_BL), position_BL, 0)
  return position_BL - jax.lax.cummax(start_BL, axis=1)
