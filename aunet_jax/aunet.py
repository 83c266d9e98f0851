"""AU-Net, the autoregressive U-Net (arXiv 2506.14761, Section 2).

    bytes ─ embed ─ contract_1 ─ pool_1 ─ contract_2 ─ pool_2 ─ … deepest
                        │ skip               │ skip                 │
    logits ── head ─ expand_1 ─ upsample_1 ─ expand_2 ─ upsample_2 ─┘

Stage 1 holds bytes; a coarser stage holds one vector per segment of the one
above it, taken at the segment's first position, its boundary. A boundary at
position t has seen bytes <= t and helps predict byte t + 1 on, so nothing ever
flows backwards in time. One stage alone is a flat byte Transformer.

In the official code, contract_i, expand_i and the deepest stack are
`encoders.(i-1)`, `decoders.(i-1)` and `trunk`; its "level" is a transition.

Letters: B batch, L positions of a stage, S slots of the next coarser one, D
width of a stage, E width of the next, V vocabulary, O offset matrices, P
number of levels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax import attention, pooling, sharding
from aunet_jax.config import ModelConfig
from aunet_jax.layers import DECODE_CACHE, RMSNorm, Stack, fan_in_init, project
from aunet_jax.pooling import Segments


class Pool(nn.Module):
  """Keeps the boundary vectors and widens them to the next stage."""

  model: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BLD: jax.Array, segments: Segments) -> jax.Array:
    x_BSD = pooling.take(x_BLD, segments.index_BS)
    if not self.model.parametric:
      return pooling.non_parametric_pool(x_BSD, self.width)
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
      narrow = functools.partial(pooling.non_parametric_upsample, width=D)

    # Narrow at the coarse stage, then copy: S matmul rows instead of L.
    y_BLD = pooling.take(narrow(x_BSE), segments.slot_BL)
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
    return y_BLD + pooling.offset_matmul(
      x_BSE, segments.slot_BL, segments.offset_BL, kernel_OED
    )


class AUNet(nn.Module):
  """`apply({"params": p}, bytes_BL, levels_BL, documents_BL)` gives logits."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    bytes_BL: jax.Array,
    levels_BL: jax.Array,
    documents_BL: jax.Array | None = None,
    targets_BL: jax.Array | None = None,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Predicts the next byte at every position.

    Args:
      bytes_BL: int, input ids 0-257 (BOS 256).
      levels_BL: int; level k keeps the position in stages 2 to k + 1. The
        first position of every piece counts as deepest whatever it says.
      documents_BL: int; equal ids that touch are one piece, which sees only
        itself; 0 is padding. None: each row is one piece.
      targets_BL: int, next bytes; only with the level head.

    Returns:
      logits_BLV float32; with targets_BL, also the level head's
      level_logits_BLP float32 (level of the target byte).
    """
    config = self.config
    attention.check(config.stages, sharding.platform())
    if not config.document_mask or documents_BL is None:
      documents_BL = jnp.ones_like(bytes_BL)
    starts_BL = pooling.piece_starts(documents_BL)
    levels_BL = jnp.where(
      starts_BL, config.num_stages - 1, levels_BL.astype(jnp.int32)
    )
    levels_BL = jnp.where(documents_BL > 0, levels_BL, 0)
    # Numbers of pieces, so that an id may come again further on in the row.
    pieces_BL = jnp.cumsum(starts_BL, axis=1, dtype=jnp.int32)
    documents_BL = jnp.where(documents_BL > 0, pieces_BL, 0)
    dtype = jnp.dtype(config.dtype)
    param_dtype = jnp.dtype(config.param_dtype)
    V, D = config.vocab_size, config.stages[0].dim

    embed_init = fan_in_init(D, ("vocab", "activation"))
    embed_VD = self.param("embed", embed_init, (V, D), param_dtype)
    x_BLD = embed_VD.astype(dtype)[bytes_BL]
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "activation"))
    x_BLD = self._stage(0, x_BLD, levels_BL, documents_BL)

    h_BLD = RMSNorm(config.head_eps, param_dtype, name="norm")(x_BLD)
    h_BLD = h_BLD if config.final_norm else x_BLD
    head_DV = self.param(
      "head", fan_in_init(D, ("activation", "vocab")), (D, V), param_dtype
    )
    logits_BLV = project(h_BLD, head_DV.astype(dtype), dtype=jnp.float32)
    if config.level_loss_weight == 0:
      return logits_BLV
    level_logits_BLP = self._level_head(x_BLD, embed_VD, targets_BL)
    return logits_BLV if targets_BL is None else (logits_BLV, level_logits_BLP)

  def _stage(self, i, x_BLD, levels_BL, documents_BL):
    """Stage i + 1 and everything below it."""
    config = self.config
    stage = config.stages[i]
    if i == config.num_stages - 1:
      x_BLD = Stack(stage, config, name="deepest")(x_BLD, documents_BL)
      self.sow(DECODE_CACHE, f"encoded_{i + 1}", x_BLD)
      return x_BLD

    # Contracting path.
    x_BLD = Stack(stage, config, name=f"contract_{i + 1}")(x_BLD, documents_BL)
    skip_BLD = x_BLD
    self.sow(DECODE_CACHE, f"encoded_{i + 1}", x_BLD)

    # One vector per segment goes down. Filler slots are padding there.
    coarse = config.stages[i + 1]
    num_slots = min(coarse.capacity, x_BLD.shape[1])
    segments = pooling.segment(levels_BL > 0, num_slots)
    x_BSE = Pool(config, coarse.dim, name=f"pool_{i + 1}")(x_BLD, segments)
    x_BSE = nn.with_logical_constraint(x_BSE, ("batch", "length", "activation"))

    def take_down(values_BL):
      values_BS = jnp.take_along_axis(values_BL, segments.index_BS, axis=1)
      return jnp.where(segments.filled_BS, values_BS, 0)

    x_BSE = self._stage(
      i + 1, x_BSE, take_down(levels_BL) - 1, take_down(documents_BL)
    )

    # Expanding path.
    self.sow(DECODE_CACHE, f"coarse_{i + 2}", x_BSE)
    x_BLD = Upsample(config, stage.dim, name=f"upsample_{i + 1}")(
      x_BSE, segments
    )
    # Padding before the first piece has no segment to take a vector from.
    x_BLD = jnp.where(documents_BL[:, :, None] > 0, x_BLD, 0)
    x_BLD = x_BLD + skip_BLD if stage.skip else x_BLD
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "activation"))
    return Stack(stage, config, name=f"expand_{i + 1}")(x_BLD, documents_BL)

  def _level_head(self, x_BLD, embed_VD, targets_BL):
    """Level of the next byte from the state before it and the byte itself."""
    config = self.config
    if targets_BL is None:  # parameters exist even when nothing is predicted
      targets_BL = jnp.zeros(x_BLD.shape[:2], jnp.int32)
    target_BLD = embed_VD.astype(x_BLD.dtype)[targets_BL]
    h_BLD = jnp.concatenate([x_BLD, target_BLD], axis=-1)
    param_dtype = jnp.dtype(config.param_dtype)
    h_BLD = RMSNorm(config.head_eps, param_dtype, name="level_norm")(h_BLD)
    width, P = h_BLD.shape[-1], config.num_stages
    init = fan_in_init(width, ("activation", "vocab"))
    kernel_DP = self.param("level_head", init, (width, P), param_dtype)
    return project(h_BLD, kernel_DP.astype(h_BLD.dtype), dtype=jnp.float32)
