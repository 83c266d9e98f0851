"""Every attention kernel against a plain loop and one dense reference.

The kernels for accelerators run here in Pallas' interpreter: the same program
block by block, on a CPU.

Letters: B batch, L positions, M attended positions, H query heads, G key/value
heads, R query heads per key/value head, K head dim.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aunet_jax.aunet import attention, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import (
  ATTENTIONS,
  MeshConfig,
  ModelConfig,
  StageConfig,
)
from tests.aunet.test_self_attention import attention_loop, normal

KERNELS = {
  "xla": attention.blockwise,
  "splash": functools.partial(attention.splash, interpret=True),
  "triton": functools.partial(attention.flash, interpret=True),
}


def mask(documents_BL, window):
  """1 where a position (second dim) sees a key (third dim), by a loop."""
  B, L = documents_BL.shape
  seen_BLM = np.zeros((B, L, L), int)
  for b, t, s in np.ndindex(B, L, L):
    close = 0 <= t - s < (L if window is None else window)
    seen_BLM[b, t, s] = close and documents_BL[b, t] == documents_BL[b, s]
  return seen_BLM


def dense(q_BLHK, k_BLGK, v_BLGK, seen_BLM):
  """All scores at once, in float32; differentiable."""
  B, L, H, K = q_BLHK.shape
  q_BLGRK = q_BLHK.reshape(B, L, k_BLGK.shape[2], -1, K).astype(jnp.float32)
  score_BGRLM = jnp.einsum("BLGRK,BMGK->BGRLM", q_BLGRK, k_BLGK) * K**-0.5
  seen_B11LM = seen_BLM[:, None, None] == 1
  weight_BGRLM = jax.nn.softmax(jnp.where(seen_B11LM, score_BGRLM, -jnp.inf))
  o_BLGRK = jnp.einsum("BGRLM,BMGK->BLGRK", weight_BGRLM, v_BLGK)
  return o_BLGRK.reshape(B, L, H, K)


def value_and_gradients(function, q_BLHK, k_BLGK, v_BLGK):
  """(o, dq, dk, dv) for the loss sum(sin(o) * o)."""

  def loss(*qkv):
    o_BLHK = function(*qkv)
    o32_BLHK = o_BLHK.astype(jnp.float32)
    return (jnp.sin(o32_BLHK) * o32_BLHK).sum(), o_BLHK

  grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (_, o_BLHK), grads = jax.jit(grad)(q_BLHK, k_BLGK, v_BLGK)
  return o_BLHK, *grads


# ----- masks ----------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_attention_sees_exactly_these_keys(name):
  documents_BL = np.array([[5, 5, 5, 5, 9, 9, 9, 0]])
  seen_BLM = np.array(
    [
      [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
      ]
    ]
  )
  np.testing.assert_array_equal(mask(documents_BL, 3), seen_BLM)
  q_BLHK, k_BLGK, v_BLGK = normal(0, 1, 8, 4, 4), *normal(1, 2, 1, 8, 2, 4)
  expected_BLHK = attention_loop(q_BLHK, k_BLGK, v_BLGK, seen_BLM)
  o_BLHK = dense(q_BLHK, k_BLGK, v_BLGK, seen_BLM)
  np.testing.assert_allclose(o_BLHK, expected_BLHK, rtol=1e-5, atol=1e-5)
  o_BLHK = KERNELS[name](q_BLHK, k_BLGK, v_BLGK, documents_BL, 3)
  np.testing.assert_allclose(o_BLHK, expected_BLHK, rtol=1e-5, atol=1e-5)


def pieces(*rows):
  """Rows of (document, length) pieces as ids (B, L)."""
  return np.stack(
    [np.concatenate([np.full(n, d) for d, n in row]) for row in rows]
  )


# name -> (document ids, window, query heads, key/value heads, head dim)
CASES = {
  "one document, no window, odd length": (
    pieces([(1, 133)], [(7, 133)]),
    None,
    2,
    2,
    8,
  ),
  "documents, window, padding, GQA": (
    pieces(
      [(1, 90), (2, 3), (3, 150), (0, 57)],
      [(4, 1), (5, 128), (6, 128), (0, 43)],
    ),
    70,
    4,
    2,
    8,
  ),
  "an id again, padding first, head dim of no power of two": (
    pieces([(0, 9), (3, 40), (1, 61), (0, 2), (3, 29)]),
    33,
    3,
    1,
    12,
  ),
  "window of one": (pieces([(1, 20), (2, 13)]), 1, 2, 1, 8),
  "window of four blocks": (pieces([(1, 361), (2, 9)]), 257, 2, 1, 8),
  "window past the row, whole blocks": (
    pieces([(1, 100), (2, 156)]),
    1000,
    2,
    2,
    8,
  ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_values_and_gradients_are_those_of_the_dense_reference(name, case):
  documents_BL, window, H, G, K = CASES[case]
  B, L = documents_BL.shape
  qkv = normal(0, B, L, H, K), normal(1, B, L, G, K), normal(2, B, L, G, K)
  seen_BLM = mask(documents_BL, window)
  expected = value_and_gradients(
    functools.partial(dense, seen_BLM=seen_BLM), *qkv
  )
  found = value_and_gradients(
    lambda q, k, v: KERNELS[name](q, k, v, documents_BL, window), *qkv
  )
  for x, y in zip(found, expected, strict=True):
    # Of the largest entry; a window of one has no gradient for the scores.
    tolerance = 1e-5 * max(np.abs(y).max(), 1)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_stays_within_its_rounding(name):
  documents_BL, window, H, G, K = CASES["documents, window, padding, GQA"]
  B, L = documents_BL.shape
  qkv = [
    jnp.asarray(x, jnp.bfloat16)
    for x in (
      normal(0, B, L, H, K),
      normal(1, B, L, G, K),
      normal(2, B, L, G, K),
    )
  ]
  seen_BLM = mask(documents_BL, window)
  expected = value_and_gradients(
    functools.partial(dense, seen_BLM=seen_BLM),
    *(x.astype(jnp.float32) for x in qkv),
  )
  found = value_and_gradients(
    lambda q, k, v: KERNELS[name](q, k, v, documents_BL, window), *qkv
  )
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == jnp.bfloat16
    # Eight bits of mantissa, 2^-8 = 0.4%, at each of a few roundings.
    error = np.abs(np.asarray(x, np.float32) - y).max()
    assert error <= 0.02 * np.abs(y).max()


L = 33


@settings(deadline=None, max_examples=8)
@given(
  lengths=st.lists(st.integers(1, 12), min_size=6, max_size=6),
  seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, L, 100])
def test_attention_is_that_of_a_loop(window, lengths, seed):
  documents = np.repeat(np.arange(1, 7), lengths)[:L]
  documents = np.pad(documents, (0, L - len(documents)))
  documents_BL = np.stack([documents, np.roll(documents, 3)])
  # A row may not use an id twice with another between; rolling may.
  documents_BL[1, :3] += 100
  q_BLHK, k_BLGK = normal(seed, 2, L, 4, 4), normal(seed + 1, 2, L, 2, 4)
  v_BLGK = normal(seed + 2, 2, L, 2, 4)
  o_BLHK = BLOCKWISE(q_BLHK, k_BLGK, v_BLGK, documents_BL, window)
  expected_BLHK = attention_loop(
    q_BLHK, k_BLGK, v_BLGK, mask(documents_BL, window)
  )
  np.testing.assert_allclose(o_BLHK, expected_BLHK, rtol=1e-4, atol=1e-5)


BLOCKWISE = jax.jit(attention.blockwise, static_argnums=4)


@pytest.mark.parametrize("name", KERNELS)
def test_attention_stays_finite_for_large_scores(name):
  q_BLHK, k_BLGK = normal(0, 1, L, 4, 4) * 1e3, normal(1, 1, L, 2, 4) * 1e3
  v_BLGK, documents_BL = normal(2, 1, L, 2, 4), np.ones((1, L), int)
  found = value_and_gradients(
    lambda q, k, v: KERNELS[name](q, k, v, documents_BL, 5),
    q_BLHK,
    k_BLGK,
    v_BLGK,
  )
  assert all(np.isfinite(x).all() for x in found)


# ----- devices --------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 3], ids=["divides", "does_not_divide"])
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "xla"])
def test_a_kernel_over_a_mesh_is_the_kernel(name, rows):
  documents_BL = np.tile(pieces([(1, 50), (2, 61), (0, 22)]), (rows, 1))
  qkv = [normal(i, rows, 133, G, 8) for i, G in enumerate((4, 2, 2))]

  def run(q, k, v):
    return KERNELS[name](q, k, v, documents_BL, 40)

  expected = value_and_gradients(run, *qkv)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    found = value_and_gradients(run, *map(jnp.asarray, qkv))
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


# ----- the choice -----------------------------------------------------------


def test_auto_and_explicit_choices_by_platform():
  assert set(attention.PLATFORMS) == set(ATTENTIONS) - {"auto"}
  assert attention.pick("auto", "tpu") == "splash"
  assert attention.pick("auto", "cpu") == "xla"
  for name, platforms in attention.PLATFORMS.items():
    for platform in platforms:
      assert attention.pick(name, platform) == name


def test_the_log_names_every_stage():
  stage = StageConfig(dim=16, num_layers=1, head_dim=8, window=4, capacity=16)
  stages = (stage, dataclasses.replace(stage, attention="xla"))
  line = attention.describe(stages, "tpu")
  assert line == "attention on tpu: stage 1 splash, stage 2 xla"
  stages = (stage, dataclasses.replace(stage, attention="triton_64"))
  line = attention.describe(stages, "gpu")
  assert line == "attention on gpu: stage 1 xla, stage 2 triton_64"


@pytest.mark.parametrize("kernel", ["splash", "triton", "triton_32"])
def test_multiplied_pairs_are_those_of_whole_blocks(kernel):
  blocks = {"splash": (128, 128), "triton": (128, 64), "triton_32": (64, 32)}
  queries, keys = blocks[kernel]
  L, window = 300, 100
  padded = -(-L // queries) * queries
  seen_LM = mask(np.ones((1, padded), int), window)[0]
  blocks = seen_LM.reshape(padded // queries, queries, padded // keys, keys)
  met = blocks.any(axis=(1, 3)).sum()
  pairs = attention.multiplied_pairs(kernel, L, window)
  assert pairs == met * queries * keys


def test_xla_multiplies_blocks_of_a_part_of_a_window():
  pairs = functools.partial(attention.multiplied_pairs, "xla")
  assert pairs(1000, 256) == 16 * 64 * (5 * 64)
  assert pairs(1000, 100) == 20 * 50 * (3 * 50)
  assert pairs(300, 256) == pairs(300, None) == 300 * 300


def test_a_choice_that_cannot_run_names_stage_choice_and_remedy():
  fine = StageConfig(dim=16, num_layers=1, head_dim=8, window=4, capacity=16)
  model = ModelConfig(stages=(fine,), dtype="float32")
  model = model.with_attention("splash")
  match = "stage 1: attention='splash' needs tpu .* are cpu; use 'auto' or 'xla"
  tokens_BL = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(ValueError, match=match):
    AUNet(model).init(jax.random.key(0), tokens_BL, tokens_BL)


def test_the_platform_is_that_of_the_mesh_in_context():
  assert sharding.platform() == "cpu"
  device = jax.sharding.AbstractDevice(
    device_kind="TPU v5 lite", num_cores=1, platform="tpu"
  )
  mesh = jax.sharding.AbstractMesh(
    (1, 1, 1), sharding.AXES, abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    assert sharding.platform() == "tpu"
  assert sharding.platform(sharding.make_mesh(MeshConfig())) == "cpu"
