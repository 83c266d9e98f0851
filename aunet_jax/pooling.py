"""Between two stages: which vectors go down, and which come back up.

Pure functions of levels with static shapes (AU-Net paper, Sections 2.1, 2.2).
Letters: B batch, L positions of the fine stage, S slots of the coarse stage,
D width of the fine stage, E width of the coarse stage, O offset matrices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aunet_jax import grouped, sharding

_NOTHING = jax.checkpoint_policies.nothing_saveable


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
  interpret: bool = False,
) -> jax.Array:
  """Multi-linear upsampling's second term: x[slot] @ kernel[offset mod O].

  A grouped product with one group per offset (`grouped.py`), about 1.1 times
  the work of one dense product on TPUs and 1.25 times elsewhere. Groups are
  formed from a device's own rows, never across devices.

  Args: x_BSE: float. slot_BL: int32 in [0, S). offset_BL: int32 >= 0.
    interpret: take the TPU's kernel and interpret it on a CPU, for tests.
  Returns: y_BLD, dtype of x_BSE.
  """
  on_tpu = interpret or sharding.platform() == "tpu"

  # The rows in order of their offset are gathered again in the backward pass:
  # they are L vectors of the coarse width, the largest array of a transition.
  @functools.partial(jax.checkpoint, policy=_NOTHING)
  def own_rows(x_BSE, slot_BL, offset_BL, kernel_OED):
    B, S, E = x_BSE.shape
    L = slot_BL.shape[1]
    O, _, D = kernel_OED.shape
    row_BL = slot_BL + jnp.arange(B, dtype=jnp.int32)[:, None] * S
    arrays = (
      x_BSE.reshape(B * S, E),
      row_BL.reshape(B * L),
      (offset_BL % O).reshape(B * L),
      kernel_OED,
    )
    if on_tpu:
      y_ND = grouped.by_tiles(*arrays, interpret=interpret)
    else:
      y_ND = grouped.by_blocks(*arrays)
    return y_ND.reshape(B, L, D)

  if jax.sharding.get_abstract_mesh().empty:
    return own_rows(x_BSE, slot_BL, offset_BL, kernel_OED)
  rows = sharding.row_axes(x_BSE.shape[0])
  columns = sharding.axis_of("transition")
  return jax.shard_map(
    own_rows,
    in_specs=(
      PartitionSpec(rows, None, None),
      PartitionSpec(rows, None),
      PartitionSpec(rows, None),
      PartitionSpec(None, None, columns),
    ),
    out_specs=PartitionSpec(rows, None, columns),
    check_vma=False,
  )(x_BSE, slot_BL, offset_BL, kernel_OED)
