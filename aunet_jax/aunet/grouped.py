"""Grouped matrix product: y[n] = x[row[n]] @ kernel[group[n]].

What multi-linear upsampling needs (AU-Net paper, Section 2.2). Masking would
multiply everything by every matrix; here the rows are put in order of their
group first, which costs two gathers.

  by_tiles   the TPU's grouped product that ships with JAX (Pallas): a tile of
             rows that two groups share is multiplied once for each.
  by_blocks  plain XLA, runs anywhere: every group is padded to whole blocks.

Letters: R rows of x, N products, G groups, E and D widths, P rows in order of
their group, Q blocks of C rows.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import megablox

# Rows of a tile or block at least: the shortest side a matrix unit fills.
_MIN_TILE, _MAX_TILE = 64, 512

_MIN_BLOCK = 16


def tile_rows(num_products: int, num_groups: int) -> int:
  """Rows of a tile of `by_tiles`: shared tiles add at most about an eighth."""
  tile = _MAX_TILE
  while tile > _MIN_TILE and 8 * (num_groups - 1) * tile > num_products:
    tile //= 2
  return tile


def block_rows(num_products: int) -> int:
  """Rows of a block of `by_blocks`.

  Padding adds half a block per group: a 64th keeps sixteen groups near an
  eighth.
  """
  return max(_MIN_BLOCK, num_products // 64)


def rows_multiplied(num_products: int, num_groups: int, platform: str) -> int:
  """Rows the device multiplies for `num_products`, at most."""
  if platform == "tpu":
    tile = tile_rows(num_products, num_groups)
    return (-(-num_products // tile) + num_groups - 1) * tile
  block = block_rows(num_products)
  return (-(-num_products // block) + num_groups) * block


def _rank(group_N, num_groups):
  """Each product's number within its group, and the groups' sizes."""
  member_NG = group_N[:, None] == jnp.arange(num_groups)[None]
  rank_NG = jnp.cumsum(member_NG, axis=0, dtype=jnp.int32) - 1
  rank_N = jnp.take_along_axis(rank_NG, group_N[:, None], axis=1)[:, 0]
  return rank_N, rank_NG[-1] + 1


def by_tiles(
  x_RE: jax.Array,
  row_N: jax.Array,
  group_N: jax.Array,
  kernel_GED: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """y_ND, dtype of x_RE. `interpret`: on a CPU, for tests."""
  (N,) = row_N.shape
  G = kernel_GED.shape[0]
  tile = tile_rows(N, G)
  rank_N, size_G = _rank(group_N, G)
  place_N = (jnp.cumsum(size_G) - size_G)[group_N] + rank_N
  extra = -N % tile  # rows after the last group; nobody reads them
  row_P = jnp.zeros((N + extra,), jnp.int32)
  row_P = row_P.at[place_N].set(row_N, unique_indices=True)
  y_PD = megablox.gmm(
    x_RE[row_P],
    kernel_GED,
    size_G.at[-1].add(extra),
    x_RE.dtype,
    lambda m, k, n: (tile, _tile_side(k), _tile_side(n)),
    interpret=interpret,
  )
  return y_PD[place_N]


def _tile_side(width: int) -> int:
  """Columns of a tile: whole lanes that divide the width, or all of it."""
  for side in (512, 384, 256, 128):
    if width % side == 0:
      return side
  return width


def by_blocks(
  x_RE: jax.Array, row_N: jax.Array, group_N: jax.Array, kernel_GED: jax.Array
) -> jax.Array:
  """y_ND, dtype of x_RE."""
  (N,) = row_N.shape
  G, _, D = kernel_GED.shape
  block = block_rows(N)
  num_blocks = -(-N // block) + G
  rank_N, size_G = _rank(group_N, G)
  blocks_G = -(-size_G // block)
  end_G = jnp.cumsum(blocks_G)
  place_N = (end_G - blocks_G)[group_N] * block + rank_N
  row_P = jnp.zeros((num_blocks * block,), jnp.int32)
  row_P = row_P.at[place_N].set(row_N, unique_indices=True)
  group_Q = jnp.searchsorted(end_G, jnp.arange(num_blocks), side="right")
  group_Q = jnp.minimum(group_Q, G - 1)  # blocks past the last group
  x_QCE = x_RE[row_P].reshape(num_blocks, block, -1)
  y_QCD = _block_products(x_QCE, group_Q, kernel_GED)
  return y_QCD.reshape(num_blocks * block, D)[place_N]


@jax.custom_vjp
def _block_products(x_QCE, group_Q, kernel_GED):
  """x[q] @ kernel[group[q]], one block after the other."""

  def one_block(carry, inputs):
    x_CE, group = inputs
    return carry, x_CE @ kernel_GED[group]

  _, y_QCD = jax.lax.scan(one_block, None, (x_QCE, group_Q))
  return y_QCD


def _block_products_fwd(x_QCE, group_Q, kernel_GED):
  return _block_products(x_QCE, group_Q, kernel_GED), (
    x_QCE,
    group_Q,
    kernel_GED,
  )


def _block_products_bwd(saved, dy_QCD):
  """Adds each block's weight gradient to its own matrix, in place.

  The transpose of `kernel_GED[group]` would add G matrices for each block.
  float32: a group's gradient is a sum over its blocks.
  """
  x_QCE, group_Q, kernel_GED = saved

  def one_block(sum_GED, inputs):
    x_CE, dy_CD, group = inputs
    dx_CE = dy_CD @ kernel_GED[group].T
    dkernel_ED = jnp.matmul(x_CE.T, dy_CD, preferred_element_type=jnp.float32)
    return sum_GED.at[group].add(dkernel_ED), dx_CE

  zero_GED = jnp.zeros(kernel_GED.shape, jnp.float32)
  sum_GED, dx_QCE = jax.lax.scan(one_block, zero_GED, (x_QCE, dy_QCD, group_Q))
  return dx_QCE, None, sum_GED.astype(kernel_GED.dtype)


_block_products.defvjp(_block_products_fwd, _block_products_bwd)
