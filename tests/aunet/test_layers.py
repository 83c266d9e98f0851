"""Norms and products against their formulas.

Letters: B batch, L positions, D width.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax.aunet import layers, sharding
from tests.aunet.test_self_attention import normal


def test_rms_norm_is_its_formula():
  x_BLD, scale_D = normal(0, 2, 3, 8), normal(1, 8)
  params = {"params": {"scale": scale_D}}
  y_BLD = layers.RMSNorm(1e-5).apply(params, x_BLD)
  mean_BL1 = (x_BLD.astype(np.float64) ** 2).mean(-1, keepdims=True)
  expected_BLD = x_BLD / np.sqrt(mean_BL1 + 1e-5) * scale_D
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
  x_BLD = jnp.asarray(normal(0, 2, 3, 512) * 100, jnp.bfloat16)
  params = {"params": {"scale": np.ones(512, np.float32)}}
  y_BLD = layers.RMSNorm(1e-5).apply(params, x_BLD)
  assert y_BLD.dtype == jnp.bfloat16
  whole_BLD = layers.RMSNorm(1e-5).apply(params, x_BLD.astype(jnp.float32))
  np.testing.assert_array_equal(y_BLD, whole_BLD.astype(jnp.bfloat16))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("num_in", [1, 2])
def test_project_contracts_the_last_dims_with_the_first(
  platform, num_in, monkeypatch
):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  x, kernel = normal(0, 2, 3, 4, 8), normal(1, 4, 8, 5)
  kernel = kernel[0] if num_in == 1 else kernel
  y = layers.project(x, kernel, num_in)
  expected = np.tensordot(x, kernel, num_in)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
