"""Work of the grouped product, and the sizes where its tiles do not fit.

That it is right, under any mesh, `test_transition.py` checks with both kernels.

Letters: R rows of x, N products, G groups, E and D widths.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax.aunet import grouped

KERNELS = {
  "by_blocks": grouped.by_blocks,
  "by_tiles": functools.partial(grouped.by_tiles, interpret=True),
}


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 32])
@pytest.mark.parametrize(("platform", "limit"), [("tpu", 1.15), ("gpu", 1.3)])
def test_work_stays_near_that_of_one_dense_product(platform, limit, rows):
  num_products = rows * 8192  # the paper's rows, its sixteen matrices
  multiplied = grouped.rows_multiplied(num_products, 16, platform)
  assert num_products <= multiplied <= limit * num_products


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("N", [1, 63, 200], ids=lambda N: f"{N}_products")
def test_bfloat16_and_sizes_of_no_whole_tile(name, N):
  random = np.random.default_rng(N)
  R, G, E, D = 7, 5, 24, 136
  x_RE = jnp.asarray(random.normal(size=(R, E)), jnp.bfloat16)
  kernel_GED = jnp.asarray(random.normal(size=(G, E, D)), jnp.bfloat16)
  row_N = random.integers(0, R, N).astype(np.int32)
  group_N = random.integers(0, G, N).astype(np.int32)

  def plain(x_RE, kernel_GED):
    return jnp.einsum("NE,NED->ND", x_RE[row_N], kernel_GED[group_N])

  def loss(function, x_RE, kernel_GED):
    return jnp.square(function(x_RE, kernel_GED).astype(jnp.float32)).sum()

  def product(x_RE, kernel_GED):
    return KERNELS[name](x_RE, row_N, group_N, kernel_GED)

  y_ND = product(x_RE, kernel_GED)
  assert y_ND.dtype == jnp.bfloat16
  exact = [jnp.asarray(x, jnp.float32) for x in (x_RE, kernel_GED)]
  expected_ND = plain(*exact)
  grads = jax.grad(functools.partial(loss, product), (0, 1))(x_RE, kernel_GED)
  expected = jax.grad(functools.partial(loss, plain), (0, 1))(*exact)
  for found, right in zip(
    (y_ND, *grads), (expected_ND, *expected), strict=True
  ):
    # bfloat16 has 8 bits; a gradient rounds its input and its own value.
    error = np.abs(np.asarray(found, np.float32) - np.asarray(right)).max()
    assert error <= 0.02 * np.abs(right).max()
