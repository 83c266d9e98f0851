"""Between two stages: which vectors go down, and which come back up.

AU-Net paper, Sections 2.1 and 2.2. Of every part, `__call__` computes a row at
once and `step` one position of each row. A kind of upsampling is one class with
all that is known of it; `UPSAMPLINGS` names them.

Letters: B batch, L positions of the fine stage, S slots of the coarse stage,
C rows of a block of the batch, D width of the fine stage, E width of the coarse
stage, O offset matrices.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aunet_jax.aunet import grouped, sharding
from aunet_jax.aunet.layers import kernel, norm_of, project, rms_norm
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


def _normed_matrix(params: dict, matrix) -> dict:
  """A norm and its matrix for one position; {} without projections."""
  if "kernel" not in params:
    return {}
  return {"norm": params["norm"]["scale"], "kernel": matrix(params["kernel"])}


class Pool(nn.Module):
  """Keeps the boundary vectors and widens them to the next stage."""

  CONTRACTED = {"kernel": (0,)}

  model: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BLD: jax.Array, segments: Segments) -> jax.Array:
    x_BSD = take(x_BLD, segments.index_BS)
    if not self.model.parametric:
      return non_parametric_pool(x_BSD, self.width)
    D, E = x_BSD.shape[-1], self.width
    x_BSD = norm_of(self.model)(name="norm")(x_BSD)
    kernel_DE = kernel(self, "kernel", D, (D, E), ("embed", "transition"))
    return project(x_BSD, kernel_DE)

  @staticmethod
  def weights(params: dict, matrix) -> dict:
    return _normed_matrix(params, matrix)

  @staticmethod
  def step(weights, model: ModelConfig, width: int, x_CD) -> jax.Array:
    """A boundary's vector, (C, width)."""
    if not model.parametric:
      return non_parametric_pool(x_CD[:, None], width)[:, 0]
    x_CD = rms_norm(x_CD, weights["norm"], model.norm_eps)
    return matmul(x_CD, weights["kernel"])

  @staticmethod
  def num_parameters(model: ModelConfig, D: int, E: int) -> dict[str, int]:
    used = int(model.parametric)
    return {"pool": used * D * E, "norms": used * D}


# ----- upsampling -----------------------------------------------------------


class Upsample(nn.Module):
  """Gives every fine position the coarse vector of its own segment.

  All kinds narrow the coarse vector by one matrix; a kind says what a position
  gets by its offset, the distance to its boundary.
  """

  CONTRACTED = {"kernel": (0,)}

  model: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BSE: jax.Array, segments: Segments) -> jax.Array:
    E, D = x_BSE.shape[-1], self.width
    if self.model.parametric:
      x_BSE = norm_of(self.model)(name="norm")(x_BSE)
      kernel_ED = kernel(self, "kernel", E, (E, D), ("embed", "transition"))
      narrow = functools.partial(project, kernel=kernel_ED)
    else:
      narrow = functools.partial(non_parametric_upsample, width=D)
    # Narrow at the coarse stage, then copy: S matmul rows instead of L.
    y_BLD = take(narrow(x_BSE), segments.slot_BL)
    return self.by_offset(x_BSE, y_BLD, segments, narrow)

  def by_offset(self, x_BSE, y_BLD, segments: Segments, narrow) -> jax.Array:
    """y_BLD, the narrowed vectors at every position, with the offset's part."""
    raise NotImplementedError

  # ----- one position -------------------------------------------------------

  @classmethod
  def weights(cls, params: dict, model: ModelConfig, width: int, matrix):
    return _normed_matrix(params, matrix)

  @classmethod
  def step(cls, weights, model: ModelConfig, width: int, x_CE) -> jax.Array:
    """What every offset of a segment will get, (C, O, D)."""
    if model.parametric:
      x_CE = rms_norm(x_CE, weights["norm"], model.norm_eps)
      y_CD = matmul(x_CE, weights["kernel"])
    else:
      y_CD = non_parametric_upsample(x_CE[:, None], width)[:, 0]
    return cls.all_offsets(weights, model, x_CE, y_CD)

  @staticmethod
  def column(offset_C: jax.Array, num_columns: int) -> jax.Array:
    """Which of `step`'s columns an offset reads."""
    return offset_C % num_columns

  @classmethod
  def num_parameters(cls, model: ModelConfig, D: int, E: int) -> dict[str, int]:
    used = int(model.parametric)
    return {"upsample": used * D * E, "norms": used * E}

  @classmethod
  def flops(cls, model: ModelConfig, D, E, fine, coarse, padded=None) -> float:
    """Forward FLOPs of `coarse` vectors for `fine` positions.

    padded: rows of a device and its platform, for what it multiplies; None:
    what the positions need.
    """
    return 2 * D * E * coarse if model.parametric else 0


class Simple(Upsample):
  """Only the boundary itself gets the vector, other positions zero."""

  def by_offset(self, x_BSE, y_BLD, segments, narrow):
    return jnp.where(segments.boundary_BL[:, :, None], y_BLD, 0)

  @classmethod
  def all_offsets(cls, weights, model, x_CE, y_CD):
    """Two columns: the boundary, and all others."""
    return jnp.stack([y_CD, jnp.zeros_like(y_CD)], axis=1)

  @staticmethod
  def column(offset_C, num_columns):
    return jnp.minimum(offset_C, num_columns - 1)


class Repeat(Upsample):
  """An embedding of the offset is added before the shared matrix."""

  def by_offset(self, x_BSE, y_BLD, segments, narrow):
    E, O = x_BSE.shape[-1], self.model.num_offsets
    table_OE = kernel(self, "offsets", E, (O, E), ("offset", "embed"))
    offset_OD = narrow(table_OE[None])[0]  # linear: moves past the gather
    return y_BLD + offset_OD[segments.offset_BL % O]

  @classmethod
  def weights(cls, params, model, width, matrix):
    """The table is already narrowed."""
    weights = super().weights(params, model, width, matrix)
    table_OE = params["offsets"].astype(jnp.dtype(model.dtype))
    if model.parametric:
      weights["offsets"] = matmul(table_OE, weights["kernel"])
    else:
      weights["offsets"] = non_parametric_upsample(table_OE[None], width)[0]
    return weights

  @classmethod
  def all_offsets(cls, weights, model, x_CE, y_CD):
    return y_CD[:, None] + weights["offsets"][None]

  @classmethod
  def num_parameters(cls, model, D, E):
    shared = super().num_parameters(model, D, E)
    return shared | {"upsample": shared["upsample"] + model.num_offsets * E}


class MultiLinear(Upsample):
  """A matrix picked by the offset is added to the shared one.

  By the offset modulo O (paper Section 2.2; O = 16 and the wrap are the
  official code's).
  """

  CONTRACTED = {"kernel": (0,), "offsets": (1,)}

  def by_offset(self, x_BSE, y_BLD, segments, narrow):
    E, D, O = x_BSE.shape[-1], self.width, self.model.num_offsets
    if not self.model.parametric:
      x_BSE = norm_of(self.model)(name="offsets_norm")(x_BSE)
    names = ("offset", "embed", "transition")
    kernel_OED = kernel(self, "offsets", E, (O, E, D), names)
    # Gathered once here, not for every block of the grouped product.
    kernel_OED = nn.with_logical_constraint(
      kernel_OED, ("offset", "activation", "transition")
    )
    return y_BLD + offset_matmul(
      x_BSE, segments.slot_BL, segments.offset_BL, kernel_OED
    )

  @classmethod
  def weights(cls, params, model, width, matrix):
    """The O matrices side by side: one product reads them once for all bytes
    of a segment."""
    weights = super().weights(params, model, width, matrix)
    E = params["offsets"].shape[1]
    weights["offsets"] = matrix(
      params["offsets"].transpose(1, 0, 2).reshape(E, -1)
    )
    if not model.parametric:
      weights["offsets_norm"] = params["offsets_norm"]["scale"]
    return weights

  @classmethod
  def all_offsets(cls, weights, model, x_CE, y_CD):
    if not model.parametric:
      x_CE = rms_norm(x_CE, weights["offsets_norm"], model.norm_eps)
    C, D = y_CD.shape
    y_COD = matmul(x_CE, weights["offsets"]).reshape(C, -1, D)
    return y_CD[:, None] + y_COD

  @classmethod
  def num_parameters(cls, model, D, E):
    shared = super().num_parameters(model, D, E)
    return {
      "upsample": shared["upsample"] + model.num_offsets * D * E,
      "norms": E,  # of the shared matrix, or its own
    }

  @classmethod
  def flops(cls, model, D, E, fine, coarse, padded=None):
    shared = super().flops(model, D, E, fine, coarse)
    if padded is not None:
      rows, platform = padded
      O = model.num_offsets
      fine = grouped.rows_multiplied(rows * fine, O, platform) / rows
    return shared + 2 * D * E * fine


# By the names of `ModelConfig.upsampling`.
UPSAMPLINGS = {"multi_linear": MultiLinear, "repeat": Repeat, "simple": Simple}


def upsampling_of(model: ModelConfig) -> type[Upsample]:
  return UPSAMPLINGS[model.upsampling]
