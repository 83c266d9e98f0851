"""The convolution before attention, against a plain loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax.aunet.cache import HISTORY
from aunet_jax.aunet.convolution import ConvolvedAttention
from aunet_jax.aunet.segments import piece_positions
from aunet_jax.aunet.self_attention import SelfAttention
from aunet_jax.config import ModelConfig, StageConfig

STAGE = StageConfig(
  dim=8, num_layers=1, head_dim=4, window=4, capacity=16, conv=3
)
MODEL = ModelConfig(stages=(STAGE,), dtype="float32")


def random(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return 0.5 * rng.normal(size=shape).astype(np.float32)


def parameters():
  H, K, D = 2, 4, 8
  attention = {
    "query": random(D, H, K, seed=1),
    "key": random(D, H, K, seed=2),
    "value": random(D, H, K, seed=3),
    "out": random(H, K, D, seed=4),
  }
  return {"taps": random(3, D, seed=5), "attention": attention}


def test_attention_reads_the_weighted_sum_of_the_last_inputs():
  x_LD, documents_L = random(9, 8), np.array([1] * 5 + [2] * 4)
  params = parameters()
  mixed_LD = x_LD.copy()
  for t in range(9):
    for back in range(3):
      if t - back >= (0 if t < 5 else 5):
        mixed_LD[t] += params["taps"][back] * x_LD[t - back]
  position_BL = piece_positions(jnp.asarray(documents_L[None]))
  tables = ConvolvedAttention.tables(STAGE, MODEL, position_BL)
  found = ConvolvedAttention(STAGE, MODEL).apply(
    {"params": params}, x_LD[None], tables, documents_L[None]
  )
  expected = SelfAttention(STAGE, MODEL).apply(
    {"params": params["attention"]},
    mixed_LD[None],
    SelfAttention.tables(STAGE, MODEL, position_BL),
    documents_L[None],
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_last_inputs_are_kept():
  x_BLD = random(2, 6, 8)
  position_BL = jnp.broadcast_to(jnp.arange(6), (2, 6))
  tables = ConvolvedAttention.tables(STAGE, MODEL, position_BL)
  _, variables = ConvolvedAttention(STAGE, MODEL).apply(
    {"params": parameters()}, x_BLD, tables, jnp.ones((2, 6), jnp.int32),
    mutable=[HISTORY],
  )  # fmt: skip
  kept = ConvolvedAttention.fill(
    STAGE, variables[HISTORY], jnp.array([1, 5]), 4
  )
  np.testing.assert_array_equal(kept.inputs_BMD[0], [np.zeros(8), x_BLD[0, 0]])
  np.testing.assert_array_equal(kept.inputs_BMD[1], x_BLD[1, 3:5])


def test_one_tap_is_refused():
  with pytest.raises(ValueError, match="conv=1 sees no other position"):
    StageConfig(dim=8, num_layers=1, head_dim=4, window=4, capacity=16, conv=1)
