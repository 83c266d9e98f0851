"""Between two stages: which vectors go down, and which come back up.

Pure functions of levels with static shapes (AU-Net paper, Sections 2.1, 2.2).
Letters: B batch, L positions of the fine stage, S slots of the coarse stage,
D width of the fine stage, E width of the coarse stage, O offset matrices.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aunet_jax.aunet import grouped, sharding
from aunet_jax.aunet.block import RMSNorm, fan_in_init, project, rms_norm
from aunet_jax.aunet.quantize import matmul
from aunet_jax.aunet.segments import Segments, take
from aunet_jax.config import ModelConfig

_NOTHING = jax.checkpoint_policies.nothing_saveable


def non_parametric_pool(x_BSD: jax.Array, width: int) -> jax.Array:
  """Widens by linear interpolation between neighbouring features.

  The official code's `non_param`: feature j repeated r = width / D times, copy
  c (1-based) mixed as c/r of itself and 1 - c/r of the copy before it.
  """
  D = x_BSD.shape[-1]
  ratio = width // D
  repeated_BSE = jnp.repeat(x_BSD, ratio, axis=-1)
  weight_E = jnp.tile(jnp.arange(1, ratio + 1, dtype=x_BSD.dtype) / ratio, D)
  weight_11E = weight_E[None, None]
  shifted_BSE = jnp.roll(repeated_BSE, ratio, axis=-1)
  return repeated_BSE * weight_11E + shifted_BSE * (1 - weight_11E)


def non_parametric_upsample(x_BSE: jax.Array, width: int) -> jax.Array:
  """Narrows by averaging each group of E / width neighbouring features."""
  B, S, E = x_BSE.shape
  return x_BSE.reshape(B, S, width, E // width).mean(axis=-1)


def offset_matmul(
  x_BSE: jax.Array,
  slot_BL: jax.Array,
  offset_BL: jax.Array,
  kernel_OED: jax.Array,
  interpret: bool = False,
) -> jax.Array:
  """Multi-linear upsampling's second term: x[slot] @ kernel[offset mod O].

  A grouped product with one group per offset (`grouped.py`), about 1.1 times
  the work of one dense product on TPUs and 1.25 times elsewhere. Groups are
  formed from a device's own rows, never across devices.

  Args: x_BSE: float. slot_BL: int32 in [0, S). offset_BL: int32 >= 0.
    interpret: take the TPU's kernel and interpret it on a CPU, for tests.
  Returns: y_BLD, dtype of x_BSE.
  """
  on_tpu = interpret or sharding.platform() == "tpu"

  # The rows in order of their offset are gathered again in the backward pass:
  # they are L vectors of the coarse width, the largest array of a transition.
  @functools.partial(jax.checkpoint, policy=_NOTHING)
  def own_rows(x_BSE, slot_BL, offset_BL, kernel_OED):
    B, S, E = x_BSE.shape
    L = slot_BL.shape[1]
    O, _, D = kernel_OED.shape
    row_BL = slot_BL + jnp.arange(B, dtype=jnp.int32)[:, None] * S
    arrays = (
      x_BSE.reshape(B * S, E),
      row_BL.reshape(B * L),
      (offset_BL % O).reshape(B * L),
      kernel_OED,
    )
    if on_tpu:
      y_ND = grouped.by_tiles(*arrays, interpret=interpret)
    else:
      y_ND = grouped.by_blocks(*arrays)
    return y_ND.reshape(B, L, D)

  if jax.sharding.get_abstract_mesh().empty:
    return own_rows(x_BSE, slot_BL, offset_BL, kernel_OED)
  rows = sharding.row_axes(x_BSE.shape[0])
  columns = sharding.axis_of("transition")
  return jax.shard_map(
    own_rows,
    in_specs=(
      PartitionSpec(rows, None, None),
      PartitionSpec(rows, None),
      PartitionSpec(rows, None),
      PartitionSpec(None, None, columns),
    ),
    out_specs=PartitionSpec(rows, None, columns),
    check_vma=False,
  )(x_BSE, slot_BL, offset_BL, kernel_OED)


class Pool(nn.Module):
  """Keeps the boundary vectors and widens them to the next stage."""

  model: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BLD: jax.Array, segments: Segments) -> jax.Array:
    x_BSD = take(x_BLD, segments.index_BS)
    if not self.model.parametric:
      return non_parametric_pool(x_BSD, self.width)
    D, E = x_BSD.shape[-1], self.width
    param_dtype = jnp.dtype(self.model.param_dtype)
    x_BSD = RMSNorm(self.model.norm_eps, param_dtype, name="norm")(x_BSD)
    init = fan_in_init(D, ("embed", "transition"))
    kernel_DE = self.param("kernel", init, (D, E), param_dtype)
    return project(x_BSD, kernel_DE.astype(x_BSD.dtype))


class Upsample(nn.Module):
  """Gives every fine position the coarse vector of its own segment.

  multi_linear: a shared matrix plus one of O picked by the offset within the
    segment, modulo O (paper Section 2.2; O = 16 and the wrap are the code's).
  repeat: an embedding of the offset is added before the shared matrix.
  simple: only the boundary itself gets the vector, other positions zero.
  """

  model: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BSE: jax.Array, segments: Segments) -> jax.Array:
    E, D, O = x_BSE.shape[-1], self.width, self.model.num_offsets
    param_dtype = jnp.dtype(self.model.param_dtype)
    norm = functools.partial(RMSNorm, self.model.norm_eps, param_dtype)

    def kernel(name, shape, names):
      init = fan_in_init(E, names)
      return self.param(name, init, shape, param_dtype).astype(x_BSE.dtype)

    if self.model.parametric:
      x_BSE = norm(name="norm")(x_BSE)
      kernel_ED = kernel("kernel", (E, D), ("embed", "transition"))

      def narrow(x):  # (..., S, E) -> (..., S, D)
        return project(x, kernel_ED)
    else:
      narrow = functools.partial(non_parametric_upsample, width=D)

    # Narrow at the coarse stage, then copy: S matmul rows instead of L.
    y_BLD = take(narrow(x_BSE), segments.slot_BL)
    if self.model.upsampling == "simple":
      return jnp.where(segments.boundary_BL[:, :, None], y_BLD, 0)
    if self.model.upsampling == "repeat":
      table_OE = kernel("offsets", (O, E), ("offset", "embed"))
      offset_OD = narrow(table_OE[None])[0]  # linear: moves past the gather
      return y_BLD + offset_OD[segments.offset_BL % O]
    if not self.model.parametric:
      x_BSE = norm(name="offsets_norm")(x_BSE)
    kernel_OED = kernel("offsets", (O, E, D), ("offset", "embed", "transition"))
    # Gathered once here, not for every block of the grouped product.
    kernel_OED = nn.with_logical_constraint(
      kernel_OED, ("offset", "activation", "transition")
    )
    return y_BLD + offset_matmul(
      x_BSE, segments.slot_BL, segments.offset_BL, kernel_OED
    )


def upsample_weights(upsample, config, width, cast, matrix):
  weights = {}
  if config.parametric:
    weights["norm"] = upsample["norm"]["scale"]
    weights["kernel"] = matrix(upsample["kernel"])
  if config.upsampling == "repeat":
    offsets_OE = cast(upsample["offsets"])
    if config.parametric:
      weights["offsets"] = matmul(offsets_OE, weights["kernel"])
    else:
      weights["offsets"] = non_parametric_upsample(offsets_OE[None], width)[0]
  if config.upsampling == "multi_linear":
    E = upsample["offsets"].shape[1]
    weights["offsets"] = matrix(
      upsample["offsets"].transpose(1, 0, 2).reshape(E, -1)
    )
    if not config.parametric:
      weights["offsets_norm"] = upsample["offsets_norm"]["scale"]
  return weights


def pool(weights, config, i, x_CD):
  """Transition i (1-based): a boundary vector widened to stage i + 1."""
  if not config.parametric:
    width = config.stages[i].dim
    return non_parametric_pool(x_CD[:, None], width)[:, 0]
  pool = weights[f"pool_{i}"]
  return matmul(rms_norm(x_CD, pool["norm"], config.norm_eps), pool["kernel"])


def upsample(weights, config, i, x_CE):
  """Transition i: what each offset of a segment will get, (C, O, D).

  A segment is several bytes long, and one product with the O matrices side by
  side reads them once for all its bytes. `simple` has two entries: the
  boundary and all the others.
  """
  C, D = x_CE.shape[0], config.stages[i - 1].dim
  upsample = weights[f"upsample_{i}"]
  if config.parametric:
    x_CE = rms_norm(x_CE, upsample["norm"], config.norm_eps)
    y_CD = matmul(x_CE, upsample["kernel"])
  else:
    y_CD = non_parametric_upsample(x_CE[:, None], D)[:, 0]
  if config.upsampling == "simple":
    return jnp.stack([y_CD, jnp.zeros_like(y_CD)], axis=1)
  if config.upsampling == "repeat":
    return y_CD[:, None] + upsample["offsets"][None]
  if not config.parametric:
    x_CE = rms_norm(x_CE, upsample["offsets_norm"], config.norm_eps)
  y_COD = matmul(x_CE, upsample["offsets"]).reshape(C, -1, D)
  return y_CD[:, None] + y_COD


def at_offset(config, up_COD, offset_C):
  O = up_COD.shape[1]
  if config.upsampling == "simple":
    index_C = jnp.minimum(offset_C, O - 1)
  else:
    index_C = offset_C % O
  return jnp.take_along_axis(up_COD, index_C[:, None, None], axis=1)[:, 0]
