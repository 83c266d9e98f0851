"""Rotary positions and rings, against plain NumPy.

Letters: B batch, L positions, H heads, G key/value heads, K head dim, W slots.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax.aunet import self_attention, sharding


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rope_loop(x_K, position, theta):
  """Rotates components j and j + K/2 by position * theta^(-2j/K)."""
  K, y_K = len(x_K), np.zeros(len(x_K))
  for j in range(K // 2):
    angle = position * theta ** (-2 * j / K)
    a, b = x_K[j], x_K[j + K // 2]
    y_K[j] = a * np.cos(angle) - b * np.sin(angle)
    y_K[j + K // 2] = b * np.cos(angle) + a * np.sin(angle)
  return y_K


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_rope_is_that_of_a_loop(platform, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  position_BL = np.array([[0, 1, 2, 700], [0, 0, 1, 5]])
  x_BLHK = normal(0, 2, 4, 3, 8)
  cos_BLK, sin_BLK = self_attention.rope_tables(position_BL, 8, 10_000.0)
  assert cos_BLK.dtype == sin_BLK.dtype == jnp.float32
  y_BLHK = self_attention.apply_rope(x_BLHK, cos_BLK, sin_BLK)
  for b, t, h in np.ndindex(2, 4, 3):
    expected_K = rope_loop(x_BLHK[b, t, h], position_BL[b, t], 10_000.0)
    # float32 angles of several hundred carry an error of about 1e-5.
    np.testing.assert_allclose(y_BLHK[b, t, h], expected_K, atol=2e-4)


def attention_loop(q_BLHK, k_BLGK, v_BLGK, seen_BLM):
  """Softmax attention where a 0/1 matrix says which key a query sees."""
  B, L, H, K = q_BLHK.shape
  o_BLHK = np.zeros((B, L, H, K))
  group = H // k_BLGK.shape[2]
  for b, t, h in np.ndindex(B, L, H):
    keys = np.flatnonzero(seen_BLM[b, t])
    k_MK = k_BLGK[b, keys, h // group].astype(np.float64)
    score_M = k_MK @ q_BLHK[b, t, h] / np.sqrt(K)
    weight_M = np.exp(score_M - score_M.max())
    weight_M /= weight_M.sum()
    o_BLHK[b, t, h] = weight_M @ v_BLGK[b, keys, h // group]
  return o_BLHK


def test_a_ring_keeps_the_last_positions():
  history_BSGK = jnp.arange(2 * 9).reshape(2, 9, 1, 1)
  ring_BGWK = self_attention.ring(history_BSGK, jnp.array([9, 2]), 4)
  # Row 0 holds positions 5-8 at slots 1, 2, 3, 0; row 1 has only 0 and 1.
  assert ring_BGWK[0, 0, :, 0].tolist() == [8, 5, 6, 7]
  assert ring_BGWK[1, 0, :2, 0].tolist() == [9, 10]
