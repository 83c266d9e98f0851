"""Between two stages: which vectors go down, and which come back up.

Pure functions of levels with static shapes (AU-Net paper, Sections 2.1, 2.2).
Letters: B batch, L positions of the fine stage, S slots of the coarse stage,
D width of the fine stage, E width of the coarse stage, O offset matrices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aunet_jax import sharding


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


def non_parametric_pool(x_BSD: jax.Array, width: int) -> jax.Array:
  """Widens by linear interpolation between neighbouring features.

  The official code's `non_param`: feature j repeated r = width / D times, copy
  c (1-based) mixed as c/r of itself and 1 - c/r of the copy before it.
  """
  D = x_BSD.shape[-1]
  ratio = width // D
  repeated_BSE = jnp.repeat(x_BSD, ratio, axis=-1)
  weight_E = jnp.tile(jnp.arange(1, ratio + 1, dtype=x_BSD.dtype) / ratio, D)
  weight_11E = weight_E[None, None]
  shifted_BSE = jnp.roll(repeated_BSE, ratio, axis=-1)
  return repeated_BSE * weight_11E + shifted_BSE * (1 - weight_11E)


def non_parametric_upsample(x_BSE: jax.Array, width: int) -> jax.Array:
  """Narrows by averaging each group of E / width neighbouring features."""
  B, S, E = x_BSE.shape
  return x_BSE.reshape(B, S, width, E // width).mean(axis=-1)


def offset_matmul(
  x_BSE: jax.Array,
  slot_BL: jax.Array,
  offset_BL: jax.Array,
  kernel_OED: jax.Array,
) -> jax.Array:
  """Multi-linear upsampling's second term: x[slot] @ kernel[offset mod O].

  Positions are grouped by offset, each group padded to whole blocks, and every
  block multiplied by its group's matrix: about 1.25 times the work of one
  dense matmul, against 16 times for masking. Groups are formed per device
  (rows of a batch shard together), never across devices.

  Args: x_BSE: float. slot_BL: int32 in [0, S). offset_BL: int32 >= 0.
  Returns: y_BLD, dtype of x_BSE.
  """
  B, S, E = x_BSE.shape
  L = slot_BL.shape[1]
  O, _, D = kernel_OED.shape
  shards = sharding.num_batch_shards()
  shards = shards if B % shards == 0 else 1
  rows = B // shards
  slot_BL = slot_BL + (jnp.arange(B, dtype=jnp.int32) % rows)[:, None] * S
  y_BLD = jax.vmap(_grouped_matmul, in_axes=(0, 0, 0, None))(
    x_BSE.reshape(shards, rows * S, E),
    slot_BL.reshape(shards, rows * L),
    (offset_BL % O).reshape(shards, rows * L),
    kernel_OED,
  )
  return y_BLD.reshape(B, L, D)


def _grouped_matmul(x_RE, row_N, group_N, kernel_GED):
  """y[n] = x[row[n]] @ kernel[group[n]], by blocks of one group each."""
  (N,) = row_N.shape
  G, _, D = kernel_GED.shape
  # Padding adds half a block per group: N / 64 keeps it near a tenth, and
  # blocks of 16 rows still fill a matrix unit's shortest side.
  block = max(16, N // 64)
  num_blocks = -(-N // block) + G
  member_NG = group_N[:, None] == jnp.arange(G)[None]
  rank_NG = jnp.cumsum(member_NG, axis=0, dtype=jnp.int32) - 1
  rank_N = jnp.take_along_axis(rank_NG, group_N[:, None], axis=1)[:, 0]
  blocks_G = -(-(rank_NG[-1] + 1) // block)
  end_G = jnp.cumsum(blocks_G)
  place_N = (end_G - blocks_G)[group_N] * block + rank_N
  row_P = jnp.zeros((num_blocks * block,), jnp.int32)
  row_P = row_P.at[place_N].set(row_N, unique_indices=True)
  group_Q = jnp.searchsorted(end_G, jnp.arange(num_blocks), side="right")
  group_Q = jnp.minimum(group_Q, G - 1)  # blocks past the last group

  def one_block(carry, inputs):
    x_CE, group = inputs
    return carry, x_CE @ kernel_GED[group]

  x_QCE = x_RE[row_P].reshape(num_blocks, block, -1)
  _, y_QCD = jax.lax.scan(one_block, None, (x_QCE, group_Q))
  return y_QCD.reshape(num_blocks * block, D)[place_N]
