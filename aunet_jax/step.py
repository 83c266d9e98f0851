"""One position through the network, on plain arrays and with ring caches.

The mathematics of `layers.py` and `aunet.py` for a single new position per row,
so that a loop can call each part when its turn comes (`decode.py`). The tests
pin it to the model.

Letters: B rows of the batch, C rows of the block computed here, W slots of a
ring, D width, E width of the next stage, H query heads, G key/value heads, R
query heads per key/value head, K head dim, F feed-forward, V vocabulary, O
offsets. rows_C holds the batch row of each block row; B means none.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aunet_jax import pooling
from aunet_jax.config import ModelConfig
from aunet_jax.layers import apply_rope, rope_tables
from aunet_jax.quantize import matmul, quantize

# ----- weights --------------------------------------------------------------


def stack_names(config: ModelConfig) -> dict[str, int]:
  """Every stack of blocks with the index of its stage."""
  names = {}
  for i in range(config.num_stages - 1):
    names[f"contract_{i + 1}"] = i
    names[f"expand_{i + 1}"] = i
  names["deepest"] = config.num_stages - 1
  return names


def make_weights(params: dict, config: ModelConfig, int8: bool = False) -> dict:
  """Parameters as the loop wants them: in compute dtype, a list of layers.

  Layers are separate arrays because slicing a stacked one copies it on every
  step. Kernels become matrices; the O offset matrices lie side by side.
  """
  dtype = jnp.dtype(config.dtype)

  def cast(x):
    return x.astype(dtype)

  def matrix(w_DE):
    return quantize(w_DE) if int8 else cast(w_DE)

  def layer(blocks, number):
    blocks = jax.tree.map(lambda x: x[number], blocks)
    attention, ffn = blocks["attention"], blocks["ffn"]
    D, H, K = attention["query"].shape
    G = attention["key"].shape[1]
    qkv_DGMK = jnp.concatenate(
      [
        attention["query"].reshape(D, G, H // G, K),
        attention["key"][:, :, None],
        attention["value"][:, :, None],
      ],
      axis=2,
    )
    gate_up_DF2 = jnp.stack([ffn["gate"], ffn["up"]], axis=-1)
    return {
      "attention_norm": blocks["attention_norm"]["scale"],
      "qkv": matrix(qkv_DGMK.reshape(D, -1)),
      "out": matrix(attention["out"].reshape(-1, D)),
      "ffn_norm": blocks["ffn_norm"]["scale"],
      "gate_up": matrix(gate_up_DF2.reshape(D, -1)),
      "down": matrix(ffn["down"]),
    }

  weights = {
    "embed": cast(params["embed"]),
    "head": matrix(params["head"]),
    "norm": params["norm"]["scale"] if config.final_norm else None,
  }
  if config.level_loss_weight > 0:
    weights["level_norm"] = params["level_norm"]["scale"]
    weights["level_head"] = cast(params["level_head"])
  for name, i in stack_names(config).items():
    blocks = params[name]["blocks"]
    layers = range(config.stages[i].num_layers)
    weights[name] = [layer(blocks, number) for number in layers]
  for i in range(1, config.num_stages):
    D = config.stages[i - 1].dim
    if config.parametric:
      pool = params[f"pool_{i}"]
      weights[f"pool_{i}"] = {
        "norm": pool["norm"]["scale"],
        "kernel": matrix(pool["kernel"]),
      }
    weights[f"upsample_{i}"] = _upsample_weights(
      params.get(f"upsample_{i}", {}), config, D, cast, matrix
    )
  return weights


def _upsample_weights(upsample, config, width, cast, matrix):
  weights = {}
  if config.parametric:
    weights["norm"] = upsample["norm"]["scale"]
    weights["kernel"] = matrix(upsample["kernel"])
  if config.upsampling == "repeat":
    offsets_OE = cast(upsample["offsets"])
    if config.parametric:
      weights["offsets"] = matmul(offsets_OE, weights["kernel"])
    else:
      weights["offsets"] = pooling.non_parametric_upsample(
        offsets_OE[None], width
      )[0]
  if config.upsampling == "multi_linear":
    E = upsample["offsets"].shape[1]
    weights["offsets"] = matrix(
      upsample["offsets"].transpose(1, 0, 2).reshape(E, -1)
    )
    if not config.parametric:
      weights["offsets_norm"] = upsample["offsets_norm"]["scale"]
  return weights


# ----- one position ---------------------------------------------------------


def _rms_norm(x_CD, scale_D, eps):
  y_CD = x_CD.astype(jnp.float32)
  mean_C1 = jnp.square(y_CD).mean(axis=-1, keepdims=True)
  y_CD *= jax.lax.rsqrt(mean_C1 + eps)
  return (y_CD * scale_D.astype(jnp.float32)[None]).astype(x_CD.dtype)


def take(x_B, rows_C):
  """Rows of a block; where the block is the batch, the array itself."""
  return (
    x_B if x_B.shape[0] == rows_C.shape[0] else x_B.at[rows_C].get(mode="clip")
  )


def put(x_B, rows_C, value_C):
  """Writes rows of a block; row number B writes nothing."""
  B = x_B.shape[0]
  if B == rows_C.shape[0]:
    active_B = (rows_C < B).reshape(B, *(1,) * (x_B.ndim - 1))
    return jnp.where(active_B, value_C.astype(x_B.dtype), x_B)
  return x_B.at[rows_C].set(value_C.astype(x_B.dtype), mode="drop")


def put_slot(ring_BGWK, rows_C, slot_C, value_CGK):
  """ring[rows, :, slot] = value, in place inside the loop."""
  B, _, W, _ = ring_BGWK.shape
  if B == rows_C.shape[0]:
    # One scatter per row, batched: stays local where rows are sharded.
    slot_C = jnp.where(rows_C < B, slot_C, W)
    return jax.vmap(lambda r, s, v: r.at[:, s].set(v, mode="drop"))(
      ring_BGWK, slot_C, value_CGK
    )
  return ring_BGWK.at[rows_C, :, slot_C].set(value_CGK, mode="drop")


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


class Write(NamedTuple):
  """What one position adds to the rings of a stack."""

  rows_C: jax.Array
  slot_C: jax.Array
  keys: list  # over layers, (C, G, K)
  values: list


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
    h_CD = _rms_norm(x_CD, layer["attention_norm"], config.norm_eps)
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
    h_CD = _rms_norm(x_CD, layer["ffn_norm"], config.norm_eps)
    gate_up_CF2 = matmul(h_CD, layer["gate_up"]).reshape(C, -1, 2)
    h_CF = nn.silu(gate_up_CF2[..., 0]) * gate_up_CF2[..., 1]
    x_CD += matmul(h_CF, layer["down"])
  return x_CD, write


def pool(weights, config, i, x_CD):
  """Transition i (1-based): a boundary vector widened to stage i + 1."""
  if not config.parametric:
    width = config.stages[i].dim
    return pooling.non_parametric_pool(x_CD[:, None], width)[:, 0]
  pool = weights[f"pool_{i}"]
  return matmul(_rms_norm(x_CD, pool["norm"], config.norm_eps), pool["kernel"])


def upsample(weights, config, i, x_CE):
  """Transition i: what each offset of a segment will get, (C, O, D).

  A segment is several bytes long, and one product with the O matrices side by
  side reads them once for all its bytes. `simple` has two entries: the
  boundary and all the others.
  """
  C, D = x_CE.shape[0], config.stages[i - 1].dim
  upsample = weights[f"upsample_{i}"]
  if config.parametric:
    x_CE = _rms_norm(x_CE, upsample["norm"], config.norm_eps)
    y_CD = matmul(x_CE, upsample["kernel"])
  else:
    y_CD = pooling.non_parametric_upsample(x_CE[:, None], D)[:, 0]
  if config.upsampling == "simple":
    return jnp.stack([y_CD, jnp.zeros_like(y_CD)], axis=1)
  if config.upsampling == "repeat":
    return y_CD[:, None] + upsample["offsets"][None]
  if not config.parametric:
    x_CE = _rms_norm(x_CE, upsample["offsets_norm"], config.norm_eps)
  y_COD = matmul(x_CE, upsample["offsets"]).reshape(C, -1, D)
  return y_CD[:, None] + y_COD


def at_offset(config, up_COD, offset_C):
  O = up_COD.shape[1]
  if config.upsampling == "simple":
    index_C = jnp.minimum(offset_C, O - 1)
  else:
    index_C = offset_C % O
  return jnp.take_along_axis(up_COD, index_C[:, None, None], axis=1)[:, 0]


def logits(weights, config, h_CD):
  if config.final_norm:
    h_CD = _rms_norm(h_CD, weights["norm"], config.head_eps)
  return matmul(h_CD, weights["head"], jnp.float32)


def predicted_level(weights, config, h_CD, byte_C):
  """The level head's choice for a byte, from the state that predicted it."""
  h_CD = jnp.concatenate([h_CD, weights["embed"][byte_C]], axis=-1)
  h_CD = _rms_norm(h_CD, weights["level_norm"], config.head_eps)
  level_logits_CP = matmul(h_CD, weights["level_head"], jnp.float32)
  return jnp.argmax(level_logits_CP, axis=-1).astype(jnp.int32)
