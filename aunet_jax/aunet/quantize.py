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


def round_params(params: dict, contracted: dict[str, tuple[int, ...]]) -> dict:
  """Parameters with the values that int8 keeps, in their own dtype.

  A pass over a row uses these, so that it and the int8 loop are one model.

  Args: contracted: name of a matrix -> its dims that a product contracts.
  """

  def rounded(path, x):
    axes = contracted.get(path[-1].key)
    if axes is None:
      return x
    w = x.astype(jnp.float32)
    scale = jnp.abs(w).max(axis=axes, keepdims=True) / 127
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
