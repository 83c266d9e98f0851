"""Weight-only int8: matrices as int8 with one scale per output column.

Letters: D rows (contracted), E columns of a weight matrix, C rows of x.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Int8(NamedTuple):
  """value_DE * scale_E is the matrix."""

  value_DE: jax.Array  # int8
  scale_E: jax.Array  # float32


def quantize(w_DE: jax.Array) -> Int8:
  """Rounds each column to 127 steps of its largest magnitude."""
  w_DE = w_DE.astype(jnp.float32)
  scale_E = jnp.abs(w_DE).max(axis=0) / 127
  scale_E = jnp.where(scale_E > 0, scale_E, 1.0)
  return Int8(jnp.round(w_DE / scale_E[None]).astype(jnp.int8), scale_E)


# Contracted dims of every kernel that `step.make_weights` quantizes, by name;
# layers are stacked in front. The offset table of `repeat` is no matrix.
_CONTRACTED = {
  "query": (1,),
  "key": (1,),
  "value": (1,),
  "out": (1, 2),
  "gate": (1,),
  "up": (1,),
  "down": (1,),
  "kernel": (0,),
  "head": (0,),
  "offsets": (1,),
}


def round_params(params: dict, upsampling: str) -> dict:
  """Parameters with the values that int8 keeps, in their own dtype.

  The parallel pass over a prompt uses these, so that it and the int8 loop are
  one model.
  """

  def rounded(path, x):
    name = path[-1].key
    if name not in _CONTRACTED:
      return x
    if name == "offsets" and upsampling != "multi_linear":
      return x
    w = x.astype(jnp.float32)
    scale = jnp.abs(w).max(axis=_CONTRACTED[name], keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return (jnp.round(w / scale) * scale).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(rounded, params)


def matmul(x_CD: jax.Array, w_DE, dtype=None) -> jax.Array:
  """x @ w in x's dtype; `dtype` asks for float32 sums and result."""
  if isinstance(w_DE, Int8):
    y_CE = jnp.matmul(
      x_CD,
      w_DE.value_DE.astype(x_CD.dtype),
      preferred_element_type=jnp.float32,
    )
    return (y_CE * w_DE.scale_E[None]).astype(dtype or x_CD.dtype)
  return jnp.matmul(x_CD, w_DE, preferred_element_type=dtype)
