"""Blocks of the Transformer, against plain NumPy.

Letters: B batch, L positions, H query heads, G key/value heads, K head dim,
J = K / 2, D width, F feed-forward.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from aunet_jax.aunet import block, sharding
from aunet_jax.config import ModelConfig, StageConfig
from tests.aunet.test_self_attention import attention_loop, normal, rope_loop

STAGE = StageConfig(
  dim=16,
  num_layers=3,
  head_dim=4,
  window=3,
  capacity=64,
  num_kv_heads=2,
  ffn_dim=24,
)
MODEL = ModelConfig(stages=(STAGE,), dtype="float32", rope_theta=100.0)


# ----- block and stack ------------------------------------------------------


def block_loop(x_LD, p, stage, model):
  """One block on one document, in float64."""

  def norm(x_LD, scale_D):
    mean_L1 = (x_LD**2).mean(-1, keepdims=True)
    return x_LD / np.sqrt(mean_L1 + model.norm_eps) * scale_D

  length = len(x_LD)
  h_LD = norm(x_LD, p["attention_norm"]["scale"])
  weights = p["attention"]
  q_LHK = np.einsum("LD,DHK->LHK", h_LD, weights["query"])
  k_LGK = np.einsum("LD,DGK->LGK", h_LD, weights["key"])
  v_LGK = np.einsum("LD,DGK->LGK", h_LD, weights["value"])
  for x_LHK in (q_LHK, k_LGK):
    for t, h in np.ndindex(x_LHK.shape[:2]):
      x_LHK[t, h] = rope_loop(x_LHK[t, h], t, model.rope_theta)
  reach = length if stage.window is None else stage.window
  seen_LM = np.tril(np.ones((length, length))) - np.tril(
    np.ones((length, length)), -reach
  )
  o_LHK = attention_loop(q_LHK[None], k_LGK[None], v_LGK[None], seen_LM[None])[
    0
  ]
  x_LD = x_LD + np.einsum("LHK,HKD->LD", o_LHK, weights["out"])
  h_LD = norm(x_LD, p["ffn_norm"]["scale"])
  gate_LF = h_LD @ p["ffn"]["gate"]
  hidden_LF = gate_LF / (1 + np.exp(-gate_LF)) * (h_LD @ p["ffn"]["up"])
  return x_LD + hidden_LF @ p["ffn"]["down"]


def stack_params(stage, seed=0):
  x_BLD, documents_BL = np.zeros((1, 8, stage.dim)), np.ones((1, 8), int)
  stack = block.Stack(stage, MODEL)
  boxed = jax.eval_shape(stack.init, jax.random.key(0), x_BLD, documents_BL)
  shapes = sharding.unbox(boxed["params"])
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.float32(random.normal(size=x.shape) * 0.3 + 0.1), shapes
  )


@pytest.mark.parametrize("window", [3, None])
def test_a_stack_is_its_blocks_one_after_the_other(window):
  stage = dataclasses.replace(STAGE, window=window)
  params = stack_params(stage)
  x_BLD = normal(0, 2, 10, stage.dim)
  documents_BL = np.ones((2, 10), int)
  y_BLD = jax.jit(block.Stack(stage, MODEL).apply)(
    {"params": params}, x_BLD, documents_BL
  )
  for b in range(2):
    expected_LD = x_BLD[b].astype(np.float64)
    for layer in range(stage.num_layers):
      p = jax.tree.map(lambda x, n=layer: x[n], params["blocks"])
      expected_LD = block_loop(expected_LD, p, stage, MODEL)
    scale = np.abs(expected_LD).max()
    np.testing.assert_allclose(y_BLD[b], expected_LD, atol=1e-5 * scale)


def test_gradients_of_the_gated_product_are_those_of_its_formula():
  D, F = 6, 10
  arrays = normal(1, 2, 3, F), normal(2, 2, 3, F), normal(3, F, D)
  weight_BLD = normal(4, 2, 3, D)

  def formula(gate_BLF, up_BLF, down_FD):
    return (jax.nn.silu(gate_BLF) * up_BLF) @ down_FD

  def gradients(function):
    def loss(*arrays):
      return (function(*arrays) * weight_BLD).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

  found, expected = gradients(block._gated_down), gradients(formula)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_piece_far_into_a_row_keeps_its_precision():
  """Positions restart at each piece: large angles would cost digits."""
  far, size = 20_000, 8
  documents_BL = np.array([[1] * far + [2] * size])
  x_BLD = normal(0, 1, size, STAGE.dim)
  row_BLD = np.concatenate([np.zeros((1, far, STAGE.dim)), x_BLD], axis=1)
  stage = dataclasses.replace(STAGE, window=size, num_layers=1)
  apply = jax.jit(block.Stack(stage, MODEL).apply)
  params = {"params": stack_params(stage)}
  alone_BLD = apply(params, x_BLD, documents_BL[:, far:])
  packed_BLD = apply(params, row_BLD.astype(np.float32), documents_BL)
  np.testing.assert_allclose(packed_BLD[:, far:], alone_BLD, rtol=0, atol=2e-6)


@functools.cache
def stack_gradients(remat, unroll):
  """Value and gradients of a loss through a stack."""
  stage = dataclasses.replace(STAGE, remat=remat, num_layers=2)
  model = dataclasses.replace(MODEL, unroll_layers=unroll)
  x_BLD, documents_BL = normal(0, 2, 4, STAGE.dim), np.ones((2, 4), int)

  def loss(params):
    stack = block.Stack(stage, model)
    y_BLD = stack.apply({"params": params}, x_BLD, documents_BL)
    return (y_BLD**2).mean()

  return jax.jit(jax.value_and_grad(loss))(stack_params(stage))


@pytest.mark.parametrize(
  "remat,unroll",
  [("none", True), ("dots", False), ("full", False), ("full", True)],
)
def test_remat_and_unrolling_change_nothing(remat, unroll):
  value, grads = stack_gradients(remat, unroll)
  expected, expected_grads = stack_gradients("none", False)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * np.abs(b).max()
    ),
    grads,
    expected_grads,
  )


@pytest.mark.parametrize(
  "platform,unroll,loops",
  [
    ("cpu", None, True),
    ("cpu", True, False),
    ("tpu", None, False),
    ("tpu", False, True),
    ("gpu", None, False),
  ],
)
def test_layers_are_a_loop_where_asked_for_and_on_cpus(
  monkeypatch, platform, unroll, loops
):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  stage = dataclasses.replace(STAGE, num_layers=3, attention="xla")
  stack = block.Stack(stage, dataclasses.replace(MODEL, unroll_layers=unroll))
  x_BLD, documents_BL = normal(0, 2, 4, STAGE.dim), np.ones((2, 4), int)
  params = {"params": stack_params(stage)}
  text = jax.jit(stack.apply).lower(params, x_BLD, documents_BL).as_text()
  assert ("stablehlo.while" in text) == loops


def test_dots_repeats_no_product():
  def products(remat):
    stage = dataclasses.replace(STAGE, remat=remat, num_layers=1)
    stack = block.Stack(stage, MODEL)
    x_BLD, documents_BL = normal(0, 2, 4, STAGE.dim), np.ones((2, 4), int)

    def loss(params):
      return stack.apply({"params": params}, x_BLD, documents_BL).sum()

    program = jax.make_jaxpr(jax.grad(loss))(stack_params(stage))
    return str(program).count("dot_general[")

  none, dots, full = map(products, ("none", "dots", "full"))
  assert none == dots < full
