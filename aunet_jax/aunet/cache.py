"""Rows of a batch taken and put back, and what a stack writes to its caches.

A decoding loop computes a block of the batch's rows at a time: rows_C holds
the batch row of each block row, and B, a row that is not there, means none.

Letters: B rows of the batch, C rows of the block, W slots of a ring, G
key/value heads, K head dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Collection that a pass over a row leaves for decoding, where it is mutable.
HISTORY = "history"


def take(x_B, rows_C):
  """Rows of a block; where the block is the batch, the array itself."""
  return (
    x_B if x_B.shape[0] == rows_C.shape[0] else x_B.at[rows_C].get(mode="clip")
  )


def put(x_B, rows_C, value_C):
  """Writes rows of a block; row number B writes nothing."""
  B = x_B.shape[0]
  if B == rows_C.shape[0]:
    active_B = (rows_C < B).reshape(B, *(1,) * (x_B.ndim - 1))
    return jnp.where(active_B, value_C.astype(x_B.dtype), x_B)
  return x_B.at[rows_C].set(value_C.astype(x_B.dtype), mode="drop")


def put_slot(ring_BGWK, rows_C, slot_C, value_CGK):
  """ring[rows, :, slot] = value, in place inside the loop."""
  B, _, W, _ = ring_BGWK.shape
  if B == rows_C.shape[0]:
    # One scatter per row, batched: stays local where rows are sharded.
    slot_C = jnp.where(rows_C < B, slot_C, W)
    return jax.vmap(lambda r, s, v: r.at[:, s].set(v, mode="drop"))(
      ring_BGWK, slot_C, value_CGK
    )
  return ring_BGWK.at[rows_C, :, slot_C].set(value_CGK, mode="drop")


class Write(NamedTuple):
  """What one position of each row adds to the caches of a stack."""

  rows_C: jax.Array
  position_C: jax.Array
  entries: list[Any]  # over layers, as the mixer's `step` gives them
