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
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax.aunet import attention, quantize, sharding, width
from aunet_jax.aunet.block import Stack
from aunet_jax.aunet.cache import HISTORY
from aunet_jax.aunet.heads import Head, Heads
from aunet_jax.aunet.layers import fan_in_init, norm_of, project, rms_norm
from aunet_jax.aunet.ngrams import NGrams
from aunet_jax.aunet.quantize import matmul
from aunet_jax.aunet.segments import piece_starts, segment
from aunet_jax.aunet.transition import Pool, upsampling_of
from aunet_jax.config import ModelConfig


class Predictions(NamedTuple):
  """What a model says of the bytes to come, all float32."""

  logits_BLV: jax.Array  # of the next byte
  level_logits_BLP: jax.Array | None  # level of the next byte
  ahead_BLV: tuple  # logits of the byte after it, and so on: model.heads - 1


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
  ) -> jax.Array | Predictions:
    """Predicts the next byte at every position.

    Args:
      bytes_BL: int, input ids 0-257 (BOS 256).
      levels_BL: int; level k keeps the position in stages 2 to k + 1. The
        first position of every piece counts as deepest whatever it says.
      documents_BL: int; equal ids that touch are one piece, which sees only
        itself; 0 is padding. None: each row is one piece.
      targets_BL: int, next bytes; of use to the level head and to the heads
        after the first.

    Returns: logits_BLV float32; with targets_BL, Predictions.
    """
    config = self.config
    attention.check(config.stages, sharding.platform())
    if not config.document_mask or documents_BL is None:
      documents_BL = jnp.ones_like(bytes_BL)
    starts_BL = piece_starts(documents_BL)
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
    if config.ngram_rows:
      x_BLD = NGrams(config, name="ngrams")(x_BLD, bytes_BL, documents_BL)
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "activation"))
    x_BLD = self._stage(0, x_BLD, levels_BL, documents_BL)

    norm = norm_of(config, config.head_eps)(name="norm")
    if config.tie_embeddings:
      head_DV = embed_VD.T
    else:
      names = ("activation", "vocab")
      head_init = fan_in_init(D, names)
      if config.zero_head:
        zeros = nn.initializers.zeros
        head_init = nn.with_logical_partitioning(zeros, names)
      head_DV = self.param("head", head_init, (D, V), param_dtype)

    def predict(x_BLD):
      h_BLD = norm(x_BLD)
      h_BLD = h_BLD if config.final_norm else x_BLD
      logits_BLV = project(h_BLD, head_DV.astype(dtype), dtype=jnp.float32)
      return finished(config, logits_BLV)

    logits_BLV = predict(x_BLD)
    # Parameters exist even when nothing is predicted.
    known_BL = jnp.zeros_like(levels_BL) if targets_BL is None else targets_BL
    level_logits_BLP, ahead_BLD = None, ()
    if config.level_loss_weight > 0:
      level_logits_BLP = self._level_head(x_BLD, embed_VD, known_BL)
    if config.heads > 1:
      ahead_BLD = Heads(config, name="heads")(x_BLD, embed_VD, known_BL)
    if targets_BL is None:
      return logits_BLV
    ahead_BLV = tuple(map(predict, ahead_BLD))
    return Predictions(logits_BLV, level_logits_BLP, ahead_BLV)

  def _stage(self, i, x_BLD, levels_BL, documents_BL):
    """Stage i + 1 and everything below it."""
    config = self.config
    stage = config.stages[i]
    if i == config.num_stages - 1:
      x_BLD = Stack(stage, config, name="deepest")(x_BLD, documents_BL)
      self.sow(HISTORY, f"encoded_{i + 1}", x_BLD)
      return x_BLD

    # Contracting path.
    x_BLD = Stack(stage, config, name=f"contract_{i + 1}")(x_BLD, documents_BL)
    skip_BLD = x_BLD
    self.sow(HISTORY, f"encoded_{i + 1}", x_BLD)

    # One vector per segment goes down. Filler slots are padding there.
    coarse = config.stages[i + 1]
    num_slots = min(coarse.capacity, x_BLD.shape[1])
    segments = segment(levels_BL > 0, num_slots)
    x_BSE = Pool(config, coarse.dim, name=f"pool_{i + 1}")(x_BLD, segments)
    x_BSE = nn.with_logical_constraint(x_BSE, ("batch", "length", "activation"))

    def take_down(values_BL):
      values_BS = jnp.take_along_axis(values_BL, segments.index_BS, axis=1)
      return jnp.where(segments.filled_BS, values_BS, 0)

    x_BSE = self._stage(
      i + 1, x_BSE, take_down(levels_BL) - 1, take_down(documents_BL)
    )

    # Expanding path.
    self.sow(HISTORY, f"coarse_{i + 2}", x_BSE)
    upsample = upsampling_of(config)(
      config, stage.dim, name=f"upsample_{i + 1}"
    )
    x_BLD = upsample(x_BSE, segments)
    # Padding before the first piece has no segment to take a vector from.
    x_BLD = jnp.where(documents_BL[:, :, None] > 0, x_BLD, 0)
    x_BLD = x_BLD + skip_BLD if stage.skip else x_BLD
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "activation"))
    return Stack(stage, config, name=f"expand_{i + 1}")(x_BLD, documents_BL)

  def _level_head(self, x_BLD, embed_VD, targets_BL):
    """Level of the next byte from the state before it and the byte itself."""
    config = self.config
    target_BLD = embed_VD.astype(x_BLD.dtype)[targets_BL]
    h_BLD = jnp.concatenate([x_BLD, target_BLD], axis=-1)
    h_BLD = norm_of(config, config.head_eps)(name="level_norm")(h_BLD)
    width, P = h_BLD.shape[-1], config.num_stages
    init = fan_in_init(width, ("activation", "vocab"))
    param_dtype = jnp.dtype(config.param_dtype)
    kernel_DP = self.param("level_head", init, (width, P), param_dtype)
    return project(h_BLD, kernel_DP.astype(h_BLD.dtype), dtype=jnp.float32)


def finished(config: ModelConfig, logits: jax.Array) -> jax.Array:
  """With a tied head's scale, then c tanh(logits / c): within -c to c."""
  scale, cap = width.head_scale(config), config.logit_cap
  logits = logits if scale == 1 else logits * scale
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def init_params(config: ModelConfig, key: jax.Array):
  """Parameters with their logical dims (boxed), for one PRNG key."""
  # Parameters depend neither on the row, where a short one is cheap, nor on
  # the kernel, whose devices may not be the ones at hand.
  config = config.with_attention("xla")
  tokens_BL = jnp.zeros((1, 4), jnp.int32)
  params = AUNet(config).init(key, tokens_BL, tokens_BL)["params"]
  return width.scale_init(params, config)


@functools.cache  # the network is traced for it
def abstract_params(config: ModelConfig):
  """Shapes and logical dims of the parameters; do not change the tree."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


# ----- one position ---------------------------------------------------------


def stack_names(config: ModelConfig) -> dict[str, int]:
  """Every stack of blocks with the index of its stage."""
  names = {}
  for i in range(config.num_stages - 1):
    names[f"contract_{i + 1}"] = i
    names[f"expand_{i + 1}"] = i
  names["deepest"] = config.num_stages - 1
  return names


def make_weights(params: dict, config: ModelConfig, int8: bool = False) -> dict:
  """Parameters as the decoding loop wants them, in compute dtype or int8.

  Kernels become matrices, those that read the same vector one matrix.
  """
  dtype = jnp.dtype(config.dtype)

  def matrix(w_DE):
    return quantize.quantize(w_DE) if int8 else w_DE.astype(dtype)

  embed_VD = params["embed"]
  head = matrix(embed_VD.T if config.tie_embeddings else params["head"])
  if config.tie_embeddings and int8:  # one table, so rounded as one
    embed_VD = (head.value_DE * head.scale_E[None]).T
  weights = {
    "embed": embed_VD.astype(dtype),
    "head": head,
    "norm": params["norm"]["scale"] if config.final_norm else None,
  }
  if config.ngram_rows:
    weights["ngrams"] = params["ngrams"]["table"].astype(dtype)
  if config.level_loss_weight > 0:
    weights["level_norm"] = params["level_norm"]["scale"]
    weights["level_head"] = params["level_head"].astype(dtype)
  if config.heads > 1:
    weights["heads"] = [
      Head.weights(params["heads"][f"ahead_{k}"], matrix)
      for k in range(2, config.heads + 1)
    ]
  for name, i in stack_names(config).items():
    weights[name] = Stack.weights(params[name], config.stages[i], matrix)
  for i in range(1, config.num_stages):
    pool, upsample = f"pool_{i}", f"upsample_{i}"
    weights[pool] = Pool.weights(params.get(pool, {}), matrix)
    weights[upsample] = upsampling_of(config).weights(
      params.get(upsample, {}), config, config.stages[i - 1].dim, matrix
    )
  return weights


def round_params(params: dict, config: ModelConfig) -> dict:
  """Parameters with the values that `make_weights` keeps with int8."""
  head = {"embed": (1,)} if config.tie_embeddings else {"head": (0,)}
  contracted = head | Head.CONTRACTED | Pool.CONTRACTED
  contracted |= upsampling_of(config).CONTRACTED
  for stage in config.stages:
    contracted |= Stack.contracted(stage)
  return quantize.round_params(params, contracted)


def embed(weights, config, byte_C, recent_CM):
  """A byte's vector, and the newest bytes, which n-grams need, with it."""
  x_CD = weights["embed"][byte_C]
  if not config.ngram_rows:
    return x_CD, recent_CM
  return NGrams.step(weights["ngrams"], config, x_CD, byte_C, recent_CM)


def logits(weights, config, h_CD):
  if config.final_norm:
    h_CD = rms_norm(h_CD, weights["norm"], config.head_eps)
  return finished(config, matmul(h_CD, weights["head"], jnp.float32))


def ahead(weights, config, k, h_CD, byte_C):
  """What predicts the byte k ahead (k >= 2), of what predicts the one before it
  and that byte."""
  e_CD = weights["embed"][byte_C]
  return Head.step(weights["heads"][k - 2], config, h_CD, e_CD)


def predicted_level(weights, config, h_CD, byte_C):
  """The level head's choice for a byte, from the state that predicted it."""
  h_CD = jnp.concatenate([h_CD, weights["embed"][byte_C]], axis=-1)
  h_CD = rms_norm(h_CD, weights["level_norm"], config.head_eps)
  level_logits_CP = matmul(h_CD, weights["level_head"], jnp.float32)
  return jnp.argmax(level_logits_CP, axis=-1).astype(jnp.int32)


def pool(weights, config, i, x_CD):
  """Transition i (1-based): a boundary's vector, widened to stage i + 1."""
  width = config.stages[i].dim
  return Pool.step(weights[f"pool_{i}"], config, width, x_CD)


def upsample(weights, config, i, x_CE):
  """Transition i: what every offset of a segment will get, (C, O, D)."""
  width = config.stages[i - 1].dim
  return upsampling_of(config).step(
    weights[f"upsample_{i}"], config, width, x_CE
  )


def at_offset(config, up_COD, offset_C):
  """The column of `upsample` that positions at these offsets get, (C, D)."""
  index_C = upsampling_of(config).column(offset_C, up_COD.shape[1])
  return jnp.take_along_axis(up_COD, index_C[:, None, None], axis=1)[:, 0]
