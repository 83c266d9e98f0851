"""Causal self-attention with RoPE: how the positions of a stage see each other.

A *mixer* is one class that holds all that is known of it, as this one:

  __call__             a row at once
  tables               what all layers of a stack share, of positions
  weights, step        one position of each row, for decoding
  cache_slots, fill, blank, write
                       the cache between positions: sized, made, changed
  CONTRACTED           which dims int8 shares a scale over
  num_weights, num_small, flops, paper_flops, saved_bytes, cache_bytes
                       counts of one block

`block.mixer_of` names the mixer of a stage; nothing else knows which it is.

RoPE rotates the two halves of a head instead of neighbouring pairs; the same
function up to a fixed permutation of each head's query and key rows, and faster
on accelerators (`convert/lingua.py` permutes).

Letters: B rows of the batch, C rows of a block, L positions, S positions of a
history, W slots of a ring, D width, H query heads, G key/value heads, R query
heads per key/value head, K head dim, J = K / 2, M attended positions, Q
successive positions of a row, U those of them that are attended to.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax.aunet import attention, cache, sharding
from aunet_jax.aunet.cache import put, put_slot, take
from aunet_jax.aunet.layers import RMSNorm, kernel, project, rms_norm
from aunet_jax.aunet.quantize import matmul
from aunet_jax.config import ModelConfig, StageConfig


def rope_tables(
  position_BL: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """cos and sin (B, L, K), float32, of position * theta^(-2j/K).

  As `apply_rope` multiplies them: component j < K/2 again at j + K/2, and the
  first K/2 sines negated.
  """
  exponent_J = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency_J = 1.0 / jnp.float32(theta) ** exponent_J
  angle_BLJ = (
    position_BL.astype(jnp.float32)[:, :, None] * frequency_J[None, None]
  )
  cos_BLJ, sin_BLJ = jnp.cos(angle_BLJ), jnp.sin(angle_BLJ)
  return (
    jnp.concatenate([cos_BLJ, cos_BLJ], axis=-1),
    jnp.concatenate([-sin_BLJ, sin_BLJ], axis=-1),
  )


def apply_rope(x_BLHK: jax.Array, cos_BLK, sin_BLK) -> jax.Array:
  """Rotates component j of each head with component j + K/2."""
  K = x_BLHK.shape[-1]
  J = K // 2
  whole_BLHK = x_BLHK.astype(jnp.float32)
  if sharding.platform() == "tpu":
    # A product with ones and zeros exchanges the halves, exactly: cutting and
    # joining them along lanes costs TPUs several passes over memory.
    swap_KK = jnp.roll(jnp.eye(K, dtype=x_BLHK.dtype), J, axis=1)
    precision = "highest" if x_BLHK.dtype == jnp.float32 else None
    swapped_BLHK = jnp.tensordot(x_BLHK, swap_KK, 1, precision=precision)
    y_BLHK = whole_BLHK * cos_BLK[:, :, None]
    y_BLHK += swapped_BLHK.astype(jnp.float32) * sin_BLK[:, :, None]
    return y_BLHK.astype(x_BLHK.dtype)
  first, second = jnp.split(whole_BLHK, 2, axis=-1)
  cos, sin = cos_BLK[:, :, None, :J], sin_BLK[:, :, None, J:]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x_BLHK.dtype)


QK_EPS = 1e-6  # of the RMSNorm of queries and keys


class Rings(NamedTuple):
  """Keys and values of the last W positions of each row, at position mod W."""

  keys_BGWK: jax.Array
  values_BGWK: jax.Array


def ring(history_BSGK: jax.Array, count_B: jax.Array, num_slots: int):
  """The last positions of each row at their slots, (B, G, W, K)."""
  last_B1 = count_B[:, None] - 1
  slot_1W = jnp.arange(num_slots)[None]
  position_BW = last_B1 - (last_B1 - slot_1W) % num_slots  # < 0: empty slot
  ring_BWGK = jnp.take_along_axis(
    history_BSGK, jnp.maximum(position_BW, 0)[:, :, None, None], axis=1
  )
  return ring_BWGK.transpose(0, 2, 1, 3)


def _attend(q_CHK, k_CGK, v_CGK, position_C, rings: Rings):
  """The newest position's attention to itself and to its ring.

  The ring does not hold the position yet; the slot it will take holds the one
  that leaves the window. Before the ring is full, later slots are empty.
  """
  keys_CGWK, values_CGWK = rings
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


def _attend_rows(queries, rings: Rings, rows_C):
  """`_attend` for a block of the batch's rows: (C, H * K).

  Taking a block's rings copies them. Where the block is half the batch or
  more, reading all rings once is less work.
  """
  B, C = rings.keys_BGWK.shape[0], rows_C.shape[0]
  if 2 * C < B:
    return _attend(*queries, Rings(*(take(x, rows_C) for x in rings)))
  queries = [
    put(jnp.zeros((B, *x.shape[1:]), x.dtype), rows_C, x) for x in queries
  ]
  return take(_attend(*queries, rings), rows_C)


def _attend_ahead(q_CHK, k_CGK, v_CGK, position_C, rings: Rings, rows_C, Q):
  """Attention of Q successive positions of each row, side by side in C.

  Each attends to the ring, which holds none of them yet, and to those before
  it. Returns: as `_attend`.
  """
  rings = Rings(*(take(x, rows_C[::Q]) for x in rings))
  _, H, K = q_CHK.shape
  C, G, W, _ = rings.keys_BGWK.shape
  q_CQGRK = (q_CHK * K**-0.5).reshape(C, Q, G, H // G, K)
  k_CUGK, v_CUGK = (x.reshape(C, Q, G, K) for x in (k_CGK, v_CGK))
  first_C1 = position_C[::Q, None]
  slot_1W = jnp.arange(W)[None]
  held_CW = first_C1 - 1 - (first_C1 - 1 - slot_1W) % W  # < 0: empty slot
  begin_CQ = position_C.reshape(C, Q) - W + 1
  seen_CQW = (held_CW >= 0)[:, None] & (held_CW[:, None] >= begin_CQ[..., None])
  back_QU = jnp.arange(Q)[:, None] - jnp.arange(Q)[None]
  seen_QU = (back_QU >= 0) & (back_QU < W)
  score_CQGRW = jnp.einsum(
    "CQGRK,CGWK->CQGRW",
    q_CQGRK,
    rings.keys_BGWK,
    preferred_element_type=jnp.float32,
  )
  own_CQGRU = jnp.einsum(
    "CQGRK,CUGK->CQGRU", q_CQGRK, k_CUGK, preferred_element_type=jnp.float32
  )
  score_CQGRW = jnp.where(seen_CQW[:, :, None, None], score_CQGRW, -jnp.inf)
  own_CQGRU = jnp.where(seen_QU[None, :, None, None], own_CQGRU, -jnp.inf)
  weight_CQGRM = jax.nn.softmax(
    jnp.concatenate([score_CQGRW, own_CQGRU], axis=-1), axis=-1
  ).astype(v_CGK.dtype)
  y_CQGRK = jnp.einsum(
    "CQGRW,CGWK->CQGRK", weight_CQGRM[..., :W], rings.values_BGWK
  )
  y_CQGRK += jnp.einsum("CQGRU,CUGK->CQGRK", weight_CQGRM[..., W:], v_CUGK)
  return y_CQGRK.reshape(C * Q, H * K)


class SelfAttention(nn.Module):
  """The mixer of every stage, under the name "attention"."""

  NAME = "attention"
  CONTRACTED = {"query": (0,), "key": (0,), "value": (0,), "out": (0, 1)}

  stage: StageConfig
  model: ModelConfig

  @staticmethod
  def tables(stage: StageConfig, model: ModelConfig, position_BL: jax.Array):
    return rope_tables(position_BL, stage.head_dim, model.rope_theta)

  @nn.compact
  def __call__(self, x_BLD, tables, documents_BL):
    stage = self.stage
    D, H, G, K = stage.dim, stage.num_heads, stage.kv_heads, stage.head_dim
    into_queries = (D, (D, H, K), ("embed", "heads", "head_dim"))
    into_keys = (D, (D, G, K), ("embed", "kv_heads", "head_dim"))
    q_DHK = kernel(self, "query", *into_queries)
    k_DGK = kernel(self, "key", *into_keys)
    v_DGK = kernel(self, "value", *into_keys)
    o_HKD = kernel(self, "out", D, (H, K, D), ("heads", "head_dim", "embed"))

    def rotated(x_BLD, kernel, name):
      x_BLHK = project(x_BLD, kernel)
      if stage.qk_norm:
        param_dtype = jnp.dtype(self.model.param_dtype)
        x_BLHK = RMSNorm(QK_EPS, param_dtype, name=name)(x_BLHK)
      return apply_rope(x_BLHK, *tables)

    q_BLHK = rotated(x_BLD, q_DHK, "query_norm")
    k_BLGK = rotated(x_BLD, k_DGK, "key_norm")
    v_BLGK = project(x_BLD, v_DGK)
    self.sow(cache.HISTORY, "keys", k_BLGK)  # kept only where asked for
    self.sow(cache.HISTORY, "values", v_BLGK)
    q_BLHK = nn.with_logical_constraint(
      q_BLHK, ("batch", "length", "heads", "head_dim")
    )
    y_BLHK = attention.attention(
      q_BLHK, k_BLGK, v_BLGK, documents_BL, stage.window, stage.attention
    )
    return project(y_BLHK, o_HKD, num_in=2)

  # ----- one position -------------------------------------------------------

  @staticmethod
  def weights(params: dict, matrix) -> dict:
    """Of one layer: query, key and value of a head group side by side."""
    D, H, K = params["query"].shape
    G = params["key"].shape[1]
    qkv_DGMK = jnp.concatenate(
      [
        params["query"].reshape(D, G, H // G, K),
        params["key"][:, :, None],
        params["value"][:, :, None],
      ],
      axis=2,
    )
    norms = {
      name: params[name]["scale"]
      for name in ("query_norm", "key_norm")
      if name in params
    }
    return norms | {
      "qkv": matrix(qkv_DGMK.reshape(D, -1)),
      "out": matrix(params["out"].reshape(-1, D)),
    }

  @staticmethod
  def step(
    weights, stage, rings: Rings, x_CD, tables, position_C, rows_C, ahead=1
  ):
    """Returns: y_CD, and the keys and values (C, G, K) to write.

    Args: ahead: successive positions of a row that lie side by side.
    """
    C = x_CD.shape[0]
    H, G, K = stage.num_heads, stage.kv_heads, stage.head_dim
    qkv_CGMK = matmul(x_CD, weights["qkv"]).reshape(C, G, -1, K)
    q_CHK, k_CGK = qkv_CGMK[:, :, :-2].reshape(C, H, K), qkv_CGMK[:, :, -2]
    v_CGK = qkv_CGMK[:, :, -1]
    if stage.qk_norm:
      q_CHK = rms_norm(q_CHK, weights["query_norm"], QK_EPS)
      k_CGK = rms_norm(k_CGK, weights["key_norm"], QK_EPS)
    q_CHK = apply_rope(q_CHK[:, None], *tables)[:, 0]
    k_CGK = apply_rope(k_CGK[:, None], *tables)[:, 0]
    new = (q_CHK, k_CGK, v_CGK, position_C)
    with jax.named_scope("with_cache"):
      if ahead > 1:
        y_CD = _attend_ahead(*new, rings, rows_C, ahead)
      else:
        y_CD = _attend_rows(new, rings, rows_C)
    return matmul(y_CD, weights["out"]), (k_CGK, v_CGK)

  @staticmethod
  def cache_slots(stage: StageConfig, num_positions: int) -> int:
    """Slots of a ring that must serve `num_positions`."""
    if stage.window is None:
      return num_positions
    return min(stage.window, num_positions)

  @staticmethod
  def fill(stage, history: dict, count_B: jax.Array, num_slots: int) -> Rings:
    """One layer's rings after a row of each text, of what `__call__` sowed."""
    del stage
    (keys_BSGK,), (values_BSGK,) = history["keys"], history["values"]
    return Rings(
      ring(keys_BSGK, count_B, num_slots), ring(values_BSGK, count_B, num_slots)
    )

  @staticmethod
  def blank(rings: Rings, num_rows: int):
    """What `step` gives to write, of as many rows, all zero."""
    _, G, _, K = rings.keys_BGWK.shape
    nothing_CGK = jnp.zeros((num_rows, G, K), rings.keys_BGWK.dtype)
    return nothing_CGK, nothing_CGK

  @staticmethod
  def write(rings: Rings, rows_C, position_C, entry) -> Rings:
    slot_C = position_C % rings.keys_BGWK.shape[2]
    return Rings(
      *(
        put_slot(ring_BGWK, rows_C, slot_C, x_CGK)
        for ring_BGWK, x_CGK in zip(rings, entry, strict=True)
      )
    )

  # ----- counts of one block ------------------------------------------------

  @staticmethod
  def num_weights(stage: StageConfig) -> int:
    """Of its matrices, each used once a position."""
    return stage.dim * stage.head_dim * 2 * (stage.num_heads + stage.kv_heads)

  @staticmethod
  def num_small(stage: StageConfig) -> dict[str, int]:
    """Parameters beside the matrices, by kind."""
    return {"norms": 2 * stage.head_dim * stage.qk_norm}

  @staticmethod
  def flops(stage: StageConfig, positions: float, platform: str | None = None):
    """Forward FLOPs beside the matrices', of scores and weighted values.

    platform: what its kernel multiplies for one row, masked or not; None: what
    `positions` need, each with the keys that causality and the window leave it
    on average in a row that is one piece.
    """
    L = stage.capacity
    if platform is not None:
      chosen = attention.pick(stage.attention, platform)
      pairs = attention.multiplied_pairs(chosen, L, stage.window)
    else:
      window = L if stage.window is None else min(stage.window, L)
      pairs = positions * (window * L - window * (window - 1) // 2) / L
    return 4 * pairs * stage.dim

  @staticmethod
  def paper_flops(stage: StageConfig, num_layers: int) -> float:
    """Training FLOPs of a position beside the matrices': 6 d L (w (2S - w) / S)
    (Appendix A, which calls the stage's capacity S)."""
    S = stage.capacity
    w = S if stage.window is None else min(stage.window, S)
    return 6 * stage.dim * num_layers * w * (2 * S - w) / S

  @staticmethod
  def saved_bytes(stage: StageConfig, itemsize: int) -> int:
    """Rough bytes of one row that the backward pass needs, by remat policy."""
    if stage.remat == "full":
      return 0
    qkv = (stage.num_heads + 2 * stage.kv_heads) * stage.head_dim
    rotated = qkv if stage.remat == "none" else 0
    numbers = 2 * stage.dim + qkv + rotated  # in and out of the kernel
    return stage.capacity * (numbers * itemsize + 4 * stage.num_heads)

  @staticmethod
  def cache_bytes(stage: StageConfig, itemsize: int) -> int:
    """Of one row at its full length."""
    slots = SelfAttention.cache_slots(stage, stage.capacity)
    return 2 * stage.kv_heads * stage.head_dim * slots * itemsize
