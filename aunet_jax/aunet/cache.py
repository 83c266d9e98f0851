"""One position through the network, on plain arrays and with ring caches.

The mathematics of `layers.py` and `aunet.py` for a single new position per row,
so that a loop can call each part when its turn comes (`decode.py`). The tests
pin it to the model.

Letters: B rows of the batch, C rows of the block computed here, W slots of a
ring, D width, E width of the next stage, H query heads, G key/value heads, R
query heads per key/value head, K head dim, F feed-forward, V vocabulary, O
offsets. rows_C holds the batch row of each block row; B means none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
  """What one position adds to the rings of a stack."""

  rows_C: jax.Array
  slot_C: jax.Array
  keys: list  # over layers, (C, G, K)
  values: list
