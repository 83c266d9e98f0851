"""The Transformer block: RMSNorm, RoPE, attention, SwiGLU.

As the official code's block (arXiv 2506.14761 Section 2 builds on lingua's):
pre-norm, no biases, no norm after the last block of a stack. RoPE rotates the
two halves of a head instead of neighbouring pairs; the same function up to a
fixed permutation of each head's query and key rows, and faster on
accelerators (`lingua.py` permutes).

Letters: B batch, L positions, D width, H query heads, G key/value heads, K head
dim, F feed-forward.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax.aunet.attention import attention
from aunet_jax.aunet.cache import Write, put, take
from aunet_jax.aunet.quantize import matmul
from aunet_jax.aunet.segments import piece_positions
from aunet_jax.config import ModelConfig, StageConfig

# Collection of what decoding continues from; `decode.prefill` makes it mutable.
DECODE_CACHE = "decode_cache"


def fan_in_init(fan_in: int, names: tuple[str, ...]):
  """Truncated normal, std fan_in^-0.5, cut at 3 std; dims named for sharding.

  The official code's `reset_parameters` with `init_std_factor: disabled`.
  """
  normal = nn.initializers.truncated_normal(fan_in**-0.5, lower=-3, upper=3)
  return nn.with_logical_partitioning(normal, names)


def project(
  x: jax.Array, kernel: jax.Array, num_in: int = 1, dtype=None
) -> jax.Array:
  """Contracts the last `num_in` dims of x with the first of the kernel.

  The result has x's dtype, or `dtype`, in which the sum is then kept too.

  One matrix product with every other dim merged: XLA on CPU runs the weight
  gradient of an unmerged einsum several times slower.
  """
  lead, inner = x.shape[:-num_in], kernel.shape[:num_in]
  width = math.prod(inner)
  y = jnp.matmul(
    x.reshape(-1, width),
    kernel.reshape(width, -1),
    preferred_element_type=dtype,
  )
  return y.reshape(*lead, *kernel.shape[num_in:])


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale, in float32 whatever the input."""

  eps: float
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("activation",))
    scale_D = self.param("scale", init, (x_BLD.shape[-1],), self.param_dtype)
    y_BLD = x_BLD.astype(jnp.float32)
    y_BLD *= jax.lax.rsqrt(
      jnp.square(y_BLD).mean(axis=-1, keepdims=True) + self.eps
    )
    scale_11D = scale_D.astype(jnp.float32)[None, None]
    return (y_BLD * scale_11D).astype(x_BLD.dtype)


def rope_tables(
  position_BL: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """cos and sin (B, L, head_dim / 2), float32, of position * theta^(-2i/K)."""
  exponent_J = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency_J = 1.0 / jnp.float32(theta) ** exponent_J
  angle_BLJ = (
    position_BL.astype(jnp.float32)[:, :, None] * frequency_J[None, None]
  )
  return jnp.cos(angle_BLJ), jnp.sin(angle_BLJ)


def apply_rope(x_BLHK: jax.Array, cos_BLJ, sin_BLJ) -> jax.Array:
  """Rotates component j of each head with component j + K/2."""
  first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_BLJ[:, :, None, :], sin_BLJ[:, :, None, :]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x_BLHK.dtype)


class Attention(nn.Module):
  stage: StageConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BLD, cos_BLJ, sin_BLJ, documents_BL):
    D, H, G, K = (
      self.stage.dim,
      self.stage.num_heads,
      self.stage.kv_heads,
      self.stage.head_dim,
    )

    def kernel(name, fan_in, shape, names):
      init = fan_in_init(fan_in, names)
      return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

    q_DHK = kernel("query", D, (D, H, K), ("embed", "heads", "head_dim"))
    k_DGK = kernel("key", D, (D, G, K), ("embed", "kv_heads", "head_dim"))
    v_DGK = kernel("value", D, (D, G, K), ("embed", "kv_heads", "head_dim"))
    o_HKD = kernel("out", D, (H, K, D), ("heads", "head_dim", "embed"))

    q_BLHK = project(x_BLD, q_DHK)
    k_BLGK = project(x_BLD, k_DGK)
    v_BLGK = project(x_BLD, v_DGK)
    q_BLHK = apply_rope(q_BLHK, cos_BLJ, sin_BLJ)
    k_BLGK = apply_rope(k_BLGK, cos_BLJ, sin_BLJ)
    self.sow(DECODE_CACHE, "keys", k_BLGK)  # kept only where asked for
    self.sow(DECODE_CACHE, "values", v_BLGK)
    q_BLHK = nn.with_logical_constraint(
      q_BLHK, ("batch", "length", "heads", "head_dim")
    )
    y_BLHK = attention(
      q_BLHK,
      k_BLGK,
      v_BLGK,
      documents_BL,
      self.stage.window,
      self.stage.attention,
    )
    return project(y_BLHK, o_HKD, num_in=2)


class SwiGLU(nn.Module):
  """(silu(x W_gate) * x W_up) W_down."""

  stage: StageConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BLD):
    D, F = self.stage.dim, self.stage.ffn

    def kernel(name, fan_in, shape, names):
      init = fan_in_init(fan_in, names)
      return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

    gate_DF = kernel("gate", D, (D, F), ("embed", "mlp"))
    up_DF = kernel("up", D, (D, F), ("embed", "mlp"))
    down_FD = kernel("down", F, (F, D), ("mlp", "embed"))
    gate_BLF = project(x_BLD, gate_DF)
    up_BLF = project(x_BLD, up_DF)
    hidden_BLF = nn.silu(gate_BLF) * up_BLF
    hidden_BLF = nn.with_logical_constraint(
      hidden_BLF, ("batch", "length", "mlp")
    )
    return project(hidden_BLF, down_FD)


class Block(nn.Module):
  """x + attention(norm(x)), then x + swiglu(norm(x))."""

  stage: StageConfig
  model: ModelConfig

  @nn.compact
  def __call__(self, x_BLD, cos_BLJ, sin_BLJ, documents_BL):
    dtype = jnp.dtype(self.model.dtype)
    param_dtype = jnp.dtype(self.model.param_dtype)
    norm = functools.partial(RMSNorm, self.model.norm_eps, param_dtype)
    attend = Attention(self.stage, dtype, param_dtype, name="attention")
    feed_forward = SwiGLU(self.stage, dtype, param_dtype, name="ffn")
    x_BLD += attend(
      norm(name="attention_norm")(x_BLD), cos_BLJ, sin_BLJ, documents_BL
    )
    x_BLD += feed_forward(norm(name="ffn_norm")(x_BLD))
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "activation"))
    return x_BLD, None


_REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nn.Module):
  """The blocks of one path of one stage, scanned: one compiled body."""

  stage: StageConfig
  model: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, documents_BL: jax.Array) -> jax.Array:
    cos_BLJ, sin_BLJ = rope_tables(
      piece_positions(documents_BL), self.stage.head_dim, self.model.rope_theta
    )
    block = Block
    if self.stage.remat != "none":
      block = nn.remat(
        Block,
        prevent_cse=self.model.unroll_layers,  # a loop cannot be merged anyway
        policy=_REMAT_POLICIES[self.stage.remat],
      )
    num_layers = self.stage.num_layers
    scanned = nn.scan(
      block,
      variable_axes={"params": 0, DECODE_CACHE: 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
      length=num_layers,
      unroll=num_layers if self.model.unroll_layers else 1,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x_BLD, _ = scanned(self.stage, self.model, name="blocks")(
      x_BLD, cos_BLJ, sin_BLJ, documents_BL
    )
    return x_BLD


# ----- one position ---------------------------------------------------------


def rms_norm(x_CD, scale_D, eps):
  y_CD = x_CD.astype(jnp.float32)
  mean_C1 = jnp.square(y_CD).mean(axis=-1, keepdims=True)
  y_CD *= jax.lax.rsqrt(mean_C1 + eps)
  return (y_CD * scale_D.astype(jnp.float32)[None]).astype(x_CD.dtype)


def _attend(q_CHK, k_CGK, v_CGK, keys_CGWK, values_CGWK, position_C):
  """The newest position's attention to itself and to its ring.

  The ring does not hold the position yet; the slot it will take holds the one
  that leaves the window. Before the ring is full, later slots are empty.
  """
  C, H, K = q_CHK.shape
  _, G, W, _ = keys_CGWK.shape
  slot_1W = jnp.arange(W)[None]
  position_C1 = position_C[:, None]
  seen_CW = (slot_1W < position_C1) & (slot_1W != position_C1 % W)
  q_CGRK = (q_CHK * K**-0.5).reshape(C, G, H // G, K)
  score_CGRW = jnp.einsum(
    "CGRK,CGWK->CGRW", q_CGRK, keys_CGWK, preferred_element_type=jnp.float32
  )
  score_CGRW = jnp.where(seen_CW[:, None, None], score_CGRW, -jnp.inf)
  own_CGR = jnp.einsum(
    "CGRK,CGK->CGR", q_CGRK, k_CGK, preferred_element_type=jnp.float32
  )
  weight_CGRM = jax.nn.softmax(
    jnp.concatenate([score_CGRW, own_CGR[..., None]], axis=-1), axis=-1
  ).astype(values_CGWK.dtype)
  y_CGRK = jnp.einsum("CGRW,CGWK->CGRK", weight_CGRM[..., :W], values_CGWK)
  y_CGRK += weight_CGRM[..., W:] * v_CGK[:, :, None]
  return y_CGRK.reshape(C, H * K)


def _attend_block(queries, keys_BGWK, values_BGWK, rows_C):
  """`_attend` for a block of the batch's rows: (C, D).

  Taking a block's rings copies them. Where the block is half the batch or
  more, reading all rings once is less work.
  """
  B, C = keys_BGWK.shape[0], rows_C.shape[0]
  if 2 * C < B:
    keys_CGWK, values_CGWK = take(keys_BGWK, rows_C), take(values_BGWK, rows_C)
    *qkv, position_C = queries
    return _attend(*qkv, keys_CGWK, values_CGWK, position_C)
  queries = [
    put(jnp.zeros((B, *x.shape[1:]), x.dtype), rows_C, x) for x in queries
  ]
  *qkv, position_B = queries
  return take(_attend(*qkv, keys_BGWK, values_BGWK, position_B), rows_C)


def stack_step(layers, stage, config, keys, values, x_CD, position_C, rows_C):
  """The blocks of one path at one position of each row.

  Reads the rings and leaves them as they are: a ring that is changed inside a
  branch is copied on every turn of the loop, so all writes wait till after it.

  Returns: x_CD, and the Write that stores the position.
  """
  C = x_CD.shape[0]
  H, G, K = stage.num_heads, stage.kv_heads, stage.head_dim
  cos, sin = rope_tables(position_C[:, None], K, config.rope_theta)
  slot_C = position_C % keys[0].shape[2]
  write = Write(rows_C, slot_C, [], [])
  for layer, keys_BGWK, values_BGWK in zip(layers, keys, values, strict=True):
    h_CD = rms_norm(x_CD, layer["attention_norm"], config.norm_eps)
    qkv_CGMK = matmul(h_CD, layer["qkv"]).reshape(C, G, -1, K)
    q_CHK, k_CGK = qkv_CGMK[:, :, :-2].reshape(C, H, K), qkv_CGMK[:, :, -2]
    v_CGK = qkv_CGMK[:, :, -1]
    q_CHK = apply_rope(q_CHK[:, None], cos, sin)[:, 0]
    k_CGK = apply_rope(k_CGK[:, None], cos, sin)[:, 0]
    write.keys.append(k_CGK)
    write.values.append(v_CGK)
    y_CD = _attend_block(
      (q_CHK, k_CGK, v_CGK, position_C), keys_BGWK, values_BGWK, rows_C
    )
    x_CD += matmul(y_CD, layer["out"])
    h_CD = rms_norm(x_CD, layer["ffn_norm"], config.norm_eps)
    gate_up_CF2 = matmul(h_CD, layer["gate_up"]).reshape(C, -1, 2)
    h_CF = nn.silu(gate_up_CF2[..., 0]) * gate_up_CF2[..., 1]
    x_CD += matmul(h_CF, layer["down"])
  return x_CD, write
