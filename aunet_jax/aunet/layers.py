"""What every part is made of: matrices, their products, RMSNorm.

Letters: B batch, L positions, C rows, D width.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax.aunet import sharding
from aunet_jax.config import ModelConfig

# Name of what the backward pass needs of an attention kernel's forward pass
# besides its inputs: cheap to keep, dear to compute again.
SAVED = "attention"


def fan_in_init(fan_in: int, names: tuple[str, ...]):
  """Truncated normal, std fan_in^-0.5, cut at 3 std; dims named for sharding.

  The official code's `reset_parameters` with `init_std_factor: disabled`.
  """
  normal = nn.initializers.truncated_normal(fan_in**-0.5, lower=-3, upper=3)
  return nn.with_logical_partitioning(normal, names)


def kernel(
  module: nn.Module,
  name: str,
  fan_in: int,
  shape: tuple[int, ...],
  names: tuple[str, ...],
) -> jax.Array:
  """A matrix among the parameters of a part, in the model's compute dtype."""
  model = module.model
  init = fan_in_init(fan_in, names)
  value = module.param(name, init, shape, jnp.dtype(model.param_dtype))
  return value.astype(jnp.dtype(model.dtype))


def project(
  x: jax.Array, kernel: jax.Array, num_in: int = 1, dtype=None
) -> jax.Array:
  """Contracts the last `num_in` dims of x with the first of the kernel.

  The result has x's dtype, or `dtype`, in which the sum is then kept too.

  One matrix product with every other dim merged: XLA on CPU runs the weight
  gradient of an unmerged einsum several times slower. On TPUs dims stay apart,
  so that a product reads and writes the layout that its neighbours want: merged
  ones are copied to another first.
  """
  if sharding.platform() == "tpu":
    return jnp.tensordot(x, kernel, num_in, preferred_element_type=dtype)
  lead, inner = x.shape[:-num_in], kernel.shape[:num_in]
  width = math.prod(inner)
  y = jnp.matmul(
    x.reshape(-1, width),
    kernel.reshape(width, -1),
    preferred_element_type=dtype,
  )
  return y.reshape(*lead, *kernel.shape[num_in:])


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale over the last dim of x (..., D).

  In float32 whatever the input; the result has x's dtype.
  """
  y = x.astype(jnp.float32)
  y *= jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + eps)
  scale = scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (y * scale).astype(x.dtype)


class RMSNorm(nn.Module):
  """`rms_norm` with a scale of its own."""

  eps: float
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("activation",))
    scale_D = self.param("scale", init, (x_BLD.shape[-1],), self.param_dtype)
    return rms_norm(x_BLD, scale_D, self.eps)


def norm_of(model: ModelConfig, eps: float | None = None):
  """Makes RMSNorm modules of this model, given a `name`."""
  eps = model.norm_eps if eps is None else eps
  return functools.partial(RMSNorm, eps, jnp.dtype(model.param_dtype))
