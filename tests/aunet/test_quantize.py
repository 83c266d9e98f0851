"""int8 columns, and that the rounded parameters are what the loop multiplies.

Letters: C rows of x, D rows and E columns of a matrix.
"""

import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet import quantize


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_column_has_127_steps_of_its_largest_magnitude():
  w_DE = normal(6, 4) * np.array([1, 10, 0.1, 0], np.float32)
  value_DE, scale_E = quantize.quantize(jnp.asarray(w_DE))
  assert value_DE.dtype == jnp.int8 and scale_E.dtype == jnp.float32
  np.testing.assert_allclose(scale_E[:3], abs(w_DE).max(0)[:3] / 127, rtol=1e-6)
  assert scale_E[3] == 1 and not value_DE[:, 3].any()
  assert abs(np.asarray(value_DE)).max(0).tolist() == [127, 127, 127, 0]
  error_DE = abs(value_DE * scale_E[None] - w_DE)
  assert (error_DE <= 0.51 * scale_E[None]).all()


def test_rounded_parameters_are_the_values_of_the_matrices():
  w_DE = jnp.asarray(normal(6, 4))
  params = {"a": {"kernel": w_DE, "scale": w_DE}}
  rounded = quantize.round_params(params, {"kernel": (0,)})["a"]
  np.testing.assert_array_equal(rounded["scale"], w_DE)
  value_DE, scale_E = quantize.quantize(w_DE)
  np.testing.assert_allclose(
    rounded["kernel"], value_DE * scale_E[None], rtol=1e-6
  )
  assert (rounded["kernel"] != w_DE).any()


def test_a_product_is_that_of_the_values():
  x_CD, w_DE = jnp.asarray(normal(3, 6)), jnp.asarray(normal(6, 4))
  int8 = quantize.quantize(w_DE)
  y_CE = quantize.matmul(x_CD, int8)
  expected = np.asarray(x_CD) @ np.asarray(int8.value_DE * int8.scale_E[None])
  np.testing.assert_allclose(y_CE, expected, rtol=1e-5, atol=1e-6)
  half = quantize.matmul(x_CD.astype(jnp.bfloat16), int8, jnp.float32)
  assert half.dtype == jnp.float32
  assert quantize.matmul(x_CD.astype(jnp.bfloat16), int8).dtype == jnp.bfloat16
