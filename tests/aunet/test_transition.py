"""Pooling and upsampling, against loops one can check by eye.

Letters: B batch, L positions, S slots, D and E widths, O offset matrices.
"""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aunet_jax.aunet import sharding, transition
from aunet_jax.config import MeshConfig
from tests.tiny_runs import tiny


def test_non_parametric_maps_are_those_of_a_loop():
  x_BSD = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  ratio, E = 3, 12
  expected_BSE = np.zeros((2, 3, E), np.float32)
  for e in range(E):
    feature, copy = divmod(e, ratio)
    share = (copy + 1) / ratio
    # The feature before the first one is the last.
    expected_BSE[:, :, e] = (
      share * x_BSD[:, :, feature] + (1 - share) * x_BSD[:, :, feature - 1]
    )
  y_BSE = transition.non_parametric_pool(x_BSD, E)
  np.testing.assert_allclose(y_BSE, expected_BSE, rtol=1e-6, atol=1e-6)
  back_BSD = transition.non_parametric_upsample(expected_BSE, 4)
  for d in range(4):
    group_BS = expected_BSE[:, :, d * ratio : (d + 1) * ratio].mean(axis=-1)
    np.testing.assert_allclose(back_BSD[:, :, d], group_BS, rtol=1e-6)


def test_equal_widths_pool_to_themselves():
  x_BSD = np.random.default_rng(0).normal(size=(1, 2, 8)).astype(np.float32)
  np.testing.assert_array_equal(transition.non_parametric_pool(x_BSD, 8), x_BSD)
  np.testing.assert_array_equal(
    transition.non_parametric_upsample(x_BSD, 8), x_BSD
  )


def test_maps_without_parameters_cost_nothing():
  model = tiny().model
  without = dataclasses.replace(model, parametric=False)
  for kind in (transition.Simple, transition.Repeat):
    assert kind.flops(model, 6, 8, 100, 10) == 2 * 6 * 8 * 10
    assert kind.flops(without, 6, 8, 100, 10) == 0


# ----- multi-linear upsampling ----------------------------------------------

B, S, E, D, O = 8, 7, 8, 6, 4
POSITIONS = 40


def offset_matmul_loop(x_BSE, slot_BL, offset_BL, kernel_OED):
  y_BLD = np.zeros((*slot_BL.shape, kernel_OED.shape[-1]))
  for b, t in np.ndindex(slot_BL.shape):
    matrix_ED = kernel_OED[offset_BL[b, t] % len(kernel_OED)]
    y_BLD[b, t] = x_BSE[b, slot_BL[b, t]].astype(np.float64) @ matrix_ED
  return y_BLD


def offset_inputs(seed, offsets):
  random = np.random.default_rng(seed)
  x_BSE = random.normal(size=(B, S, E)).astype(np.float32)
  kernel_OED = random.normal(size=(O, E, D)).astype(np.float32)
  slot_BL = random.integers(0, S, size=(B, POSITIONS), dtype=np.int32)
  offset_BL = random.choice(offsets, size=(B, POSITIONS)).astype(np.int32)
  return x_BSE, slot_BL, offset_BL, kernel_OED


@functools.partial(jax.jit, static_argnames="interpret")
def offset_matmul_and_gradients(
  x_BSE, kernel_OED, slot_BL, offset_BL, interpret
):
  """(y, dx, dkernel) for the loss sum(y^2) / 2."""

  def loss(x_BSE, kernel_OED):
    y_BLD = transition.offset_matmul(
      x_BSE, slot_BL, offset_BL, kernel_OED, interpret
    )
    return (y_BLD**2).sum() / 2, y_BLD

  grad_fn = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (_, y_BLD), grads = grad_fn(x_BSE, kernel_OED)
  return y_BLD, *grads


@pytest.mark.parametrize(
  "offsets",
  [[0], [3], [0, 1], range(4), range(50)],
  ids=["first", "last", "two", "all", "wrapping"],
)
@pytest.mark.parametrize(
  "mesh",
  [None, MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)],
  ids=["one_device", "data8", "data2_fsdp2_tensor2"],
)
@pytest.mark.parametrize("interpret", [False, True], ids=["xla", "megablox"])
def test_offset_matmul_is_that_of_a_loop(offsets, mesh, interpret):
  inputs = offset_inputs(0, list(offsets))
  x_BSE, slot_BL, offset_BL, kernel_OED = inputs
  context, put = contextlib.nullcontext(), jnp.asarray
  if mesh is not None:
    mesh = sharding.make_mesh(mesh)
    context = jax.set_mesh(mesh)
    put = functools.partial(
      jax.device_put, device=sharding.batch_sharding(mesh)
    )
  with context, nn.logical_axis_rules(sharding.RULES):
    y_BLD, grad_BSE, grad_OED = offset_matmul_and_gradients(
      put(x_BSE), kernel_OED, put(slot_BL), put(offset_BL), interpret
    )
  expected_BLD = offset_matmul_loop(*inputs)
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-5)
  # d(y^2 / 2) = y dy, one position at a time.
  expected_BSE, expected_OED = np.zeros(x_BSE.shape), np.zeros(kernel_OED.shape)
  for b, t in np.ndindex(slot_BL.shape):
    s, o, y_D = slot_BL[b, t], offset_BL[b, t] % O, expected_BLD[b, t]
    expected_BSE[b, s] += kernel_OED[o] @ y_D
    expected_OED[o] += np.outer(x_BSE[b, s], y_D)
  np.testing.assert_allclose(grad_BSE, expected_BSE, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(grad_OED, expected_OED, rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(
  seed=st.integers(0, 2**16),
  offsets=st.lists(st.integers(0, 60), min_size=1, max_size=5),
)
def test_offset_matmul_for_any_offsets(seed, offsets):
  inputs = offset_inputs(seed, offsets)
  y_BLD = OFFSET_MATMUL(*inputs)
  expected_BLD = offset_matmul_loop(*inputs)
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-5)


OFFSET_MATMUL = jax.jit(transition.offset_matmul)


def test_a_batch_that_does_not_divide_over_the_devices_still_works():
  x_BSE, slot_BL, offset_BL, kernel_OED = offset_inputs(1, [0, 1, 2])
  inputs = (x_BSE[:3], slot_BL[:3], offset_BL[:3], kernel_OED)
  mesh = sharding.make_mesh(MeshConfig(data=8))
  with jax.set_mesh(mesh):
    y_BLD = jax.jit(transition.offset_matmul)(*map(jnp.asarray, inputs))
  expected_BLD = offset_matmul_loop(*inputs)
  np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-5, atol=1e-5)
