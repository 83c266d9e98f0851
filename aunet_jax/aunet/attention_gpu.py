"""Attention for GPUs as three kernels in Pallas (Triton): FlashAttention-2
(arXiv 2307.08691) with a window, documents, and groups of query heads.

A program works on one block of queries (forward, query gradient) or of keys
(their gradients), and loops over the blocks that the window lets it meet; no
scores are stored. The sizes of blocks (`TILES`) are those common for the
hardware; `trial` picks among them on the device itself.

Letters: B batch, L positions, H query heads, G key/value heads, R query heads
per key/value head, K head dim, C queries of a block, M keys of a block.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from aunet_jax.aunet.layers import SAVED


class Tiles(NamedTuple):
  """Queries and keys of a block; L is padded to the largest. Powers of two."""

  queries: int
  keys: int
  backward_queries: int
  backward_keys: int


# The kernel's name as a stage's `attention` -> its tiles. Large ones read keys
# less often, small ones leave more programs room on a multiprocessor.
TILES = {
  "triton": Tiles(128, 64, 64, 64),
  "triton_64": Tiles(64, 64, 64, 64),
  "triton_32": Tiles(64, 32, 32, 32),
}

# At 128 a float32 block of the largest tiles takes 214 kB of the 232 kB of
# shared memory of an H100 (counted by XLA, ahead of time), at 256 it would
# take 328 kB.
MAX_HEAD_DIM = 128

# Finite: a block may hold nothing a query sees, and inf - inf is no number.
_UNSEEN = -1e30


def flash_attention(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  documents_BL: jax.Array,
  window: int | None,
  tiles: Tiles = TILES["triton"],
  interpret: bool = False,
) -> jax.Array:
  """See `attention.attention`; of one device. `interpret`: on a CPU."""
  B, L, H, K = q_BLHK.shape
  extra, wider = -L % max(tiles), _padded_width(K) - K

  def pad(x_BLHK):
    return jnp.pad(x_BLHK, ((0, 0), (0, extra), (0, 0), (0, wider)))

  documents_BL = jnp.pad(documents_BL, ((0, 0), (0, extra)), constant_values=-1)
  window = L if window is None else window
  options = _Options(window, K**-0.5, tiles, interpret)
  o_BLHK = _flash(options, pad(q_BLHK), pad(k_BLGK), pad(v_BLGK), documents_BL)
  return o_BLHK[:, :L, :, :K]


def _padded_width(head_dim: int) -> int:
  """Triton's tiles have powers of two as sides, a product at least 16."""
  return max(16, 1 << (head_dim - 1).bit_length())


class _Options(NamedTuple):
  window: int
  scale: float  # of the scores
  tiles: Tiles
  interpret: bool


def _scores(q_CK, k_MK, scale, first_query, first_key, window, documents):
  """Scores in base 2 (C, M), _UNSEEN where the query does not see the key."""
  C, M = q_CK.shape[0], k_MK.shape[0]
  query_C1 = first_query + jax.lax.broadcasted_iota(jnp.int32, (C, M), 0)
  key_1M = first_key + jax.lax.broadcasted_iota(jnp.int32, (C, M), 1)
  distance_CM = query_C1 - key_1M
  documents_C, documents_M = documents
  seen_CM = (distance_CM >= 0) & (distance_CM < window)
  seen_CM &= documents_C[:, None] == documents_M[None, :]
  score_CM = triton.dot(q_CK, k_MK, trans_b=True) * (scale * math.log2(math.e))
  return jnp.where(seen_CM, score_CM, _UNSEEN)


def _key_blocks(first_query, num_queries, window, block):
  """Numbers of the first key block a query block meets, and past the last."""
  first = jnp.maximum(first_query - window + 1, 0)
  last = first_query + num_queries + block - 1
  return jax.lax.div(first, block), jax.lax.div(last, block)


# ----- forward --------------------------------------------------------------


def _forward_kernel(
  q_ref, k_ref, v_ref, documents_ref, o_ref, sum_ref, *, options
):
  window, scale, M = options.window, options.scale, options.tiles.keys
  C, K = q_ref.shape
  first_query = pl.program_id(0) * C
  q_CK = q_ref[...]
  documents_C = documents_ref[pl.ds(first_query, C)]

  def body(j, carry):
    o_CK, peak_C, total_C = carry
    keys = pl.ds(j * M, M)
    score_CM = _scores(
      q_CK,
      k_ref[keys, :],
      scale,
      first_query,
      j * M,
      window,
      (documents_C, documents_ref[keys]),
    )
    higher_C = jnp.maximum(peak_C, score_CM.max(axis=1))
    weight_CM = jnp.exp2(score_CM - higher_C[:, None])
    shrink_C = jnp.exp2(peak_C - higher_C)
    v_MK = v_ref[keys, :]
    o_CK = o_CK * shrink_C[:, None] + triton.dot(
      weight_CM.astype(v_MK.dtype), v_MK
    )
    return o_CK, higher_C, total_C * shrink_C + weight_CM.sum(axis=1)

  # The last block holds the query itself: what blocks without a seen key have
  # added before is shrunk to nothing.
  o_CK, peak_C, total_C = jax.lax.fori_loop(
    *_key_blocks(first_query, C, window, M),
    body,
    (
      jnp.zeros((C, K), jnp.float32),
      jnp.full((C,), _UNSEEN, jnp.float32),
      jnp.zeros((C,), jnp.float32),
    ),
  )
  o_ref[...] = (o_CK / total_C[:, None]).astype(o_ref.dtype)
  sum_ref[...] = peak_C + jnp.log2(total_C)


def _params(head_dim: int, num_stages: int):
  return triton.CompilerParams(
    num_warps=4 if head_dim <= 64 else 8, num_stages=num_stages
  )


def _forward(options, q_BLHK, k_BLGK, v_BLGK, documents_BL):
  """o_BLHK, and the log2 of each query's sum of weights (B, H, L), float32."""
  B, L, H, K = q_BLHK.shape
  R, C = H // k_BLGK.shape[2], options.tiles.queries
  queries = pl.BlockSpec((None, C, None, K), lambda i, h, b: (b, i, h, 0))
  keys = pl.BlockSpec((None, L, None, K), lambda i, h, b: (b, 0, h // R, 0))
  return pl.pallas_call(
    functools.partial(_forward_kernel, options=options),
    grid=(L // C, H, B),
    in_specs=[
      queries,
      keys,
      keys,
      pl.BlockSpec((None, L), lambda i, h, b: (b, 0)),
    ],
    out_specs=[
      queries,
      pl.BlockSpec((None, None, C), lambda i, h, b: (b, h, i)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(q_BLHK.shape, v_BLGK.dtype),
      jax.ShapeDtypeStruct((B, H, L), jnp.float32),
    ],
    compiler_params=_params(K, num_stages=2),
    interpret=options.interpret,
    name="attention_forward",
  )(q_BLHK, k_BLGK, v_BLGK, documents_BL)


# ----- backward -------------------------------------------------------------


def _query_kernel(
  q_ref, k_ref, v_ref, documents_ref, do_ref, sum_ref, mean_ref, dq_ref,
  *, options,
):  # fmt: skip
  """Gradient of one block of queries."""
  window, scale = options.window, options.scale
  (C, K), M = q_ref.shape, options.tiles.backward_keys
  first_query = pl.program_id(0) * C
  q_CK, do_CK = q_ref[...], do_ref[...]
  sum_C, mean_C = sum_ref[...], mean_ref[...]
  documents_C = documents_ref[pl.ds(first_query, C)]

  def body(j, dq_CK):
    keys = pl.ds(j * M, M)
    k_MK = k_ref[keys, :]
    score_CM = _scores(
      q_CK,
      k_MK,
      scale,
      first_query,
      j * M,
      window,
      (documents_C, documents_ref[keys]),
    )
    weight_CM = jnp.exp2(score_CM - sum_C[:, None])
    dweight_CM = triton.dot(do_CK, v_ref[keys, :], trans_b=True)
    dscore_CM = weight_CM * (dweight_CM - mean_C[:, None])
    return dq_CK + triton.dot(dscore_CM.astype(k_MK.dtype), k_MK)

  dq_CK = jax.lax.fori_loop(
    *_key_blocks(first_query, C, window, M),
    body,
    jnp.zeros((C, K), jnp.float32),
  )
  dq_ref[...] = (dq_CK * scale).astype(dq_ref.dtype)


def _key_kernel(
  q_ref, k_ref, v_ref, documents_ref, do_ref, sum_ref, mean_ref, dk_ref, dv_ref,
  *, options,
):  # fmt: skip
  """Gradients of one block of keys and values, over R heads' queries."""
  window, scale = options.window, options.scale
  (M, K), (L, R, _) = k_ref.shape, q_ref.shape
  C = options.tiles.backward_queries
  first_key = pl.program_id(0) * M
  k_MK, v_MK = k_ref[...], v_ref[...]
  documents_M = documents_ref[pl.ds(first_key, M)]
  carry = jnp.zeros((M, K), jnp.float32), jnp.zeros((M, K), jnp.float32)
  # The last query that may see a key of this block is window - 1 after it.
  end = jnp.minimum(first_key + M + window - 1 + C - 1, L)

  for r in range(R):

    def body(i, carry, r=r):
      dk_MK, dv_MK = carry
      queries = pl.ds(i * C, C)
      q_CK, do_CK = q_ref[queries, r, :], do_ref[queries, r, :]
      score_CM = _scores(
        q_CK,
        k_MK,
        scale,
        i * C,
        first_key,
        window,
        (documents_ref[queries], documents_M),
      )
      weight_CM = jnp.exp2(score_CM - sum_ref[r, queries][:, None])
      dv_MK += triton.dot(weight_CM.astype(do_CK.dtype), do_CK, trans_a=True)
      dweight_CM = triton.dot(do_CK, v_MK, trans_b=True)
      dscore_CM = weight_CM * (dweight_CM - mean_ref[r, queries][:, None])
      dk_MK += triton.dot(dscore_CM.astype(q_CK.dtype), q_CK, trans_a=True)
      return dk_MK, dv_MK

    carry = jax.lax.fori_loop(
      jax.lax.div(first_key, C),
      jax.lax.div(end, C),
      body,
      carry,
    )
  dk_MK, dv_MK = carry
  dk_ref[...] = (dk_MK * scale).astype(dk_ref.dtype)
  dv_ref[...] = dv_MK.astype(dv_ref.dtype)


def _backward(options, saved, do_BLHK):
  q_BLHK, k_BLGK, v_BLGK, documents_BL, o_BLHK, sum_BHL = saved
  B, L, H, K = q_BLHK.shape
  G = k_BLGK.shape[2]
  R = H // G
  C, M = options.tiles.backward_queries, options.tiles.backward_keys
  do_BLHK = do_BLHK.astype(v_BLGK.dtype)
  # What a softmax subtracts from the gradient of its weights.
  mean_BLH = (o_BLHK.astype(jnp.float32) * do_BLHK.astype(jnp.float32)).sum(-1)
  mean_BHL = mean_BLH.swapaxes(1, 2)
  params = _params(K, num_stages=2)

  queries = pl.BlockSpec((None, C, None, K), lambda i, h, b: (b, i, h, 0))
  row = pl.BlockSpec((None, L), lambda i, h, b: (b, 0))
  of_queries = pl.BlockSpec((None, None, C), lambda i, h, b: (b, h, i))
  all_keys = pl.BlockSpec((None, L, None, K), lambda i, h, b: (b, 0, h // R, 0))
  dq_BLHK = pl.pallas_call(
    functools.partial(_query_kernel, options=options),
    grid=(L // C, H, B),
    in_specs=[
      queries, all_keys, all_keys, row, queries, of_queries, of_queries,
    ],
    out_specs=queries,
    out_shape=jax.ShapeDtypeStruct(q_BLHK.shape, q_BLHK.dtype),
    compiler_params=params,
    interpret=options.interpret,
    name="attention_query_gradient",
  )(
    q_BLHK, k_BLGK, v_BLGK, documents_BL, do_BLHK, sum_BHL, mean_BHL,
  )  # fmt: skip

  keys = pl.BlockSpec((None, M, None, K), lambda i, g, b: (b, i, g, 0))
  all_queries = pl.BlockSpec(
    (None, L, None, R, K), lambda i, g, b: (b, 0, g, 0, 0)
  )
  of_all_queries = pl.BlockSpec(
    (None, None, R, L), lambda i, g, b: (b, g, 0, 0)
  )
  by_group = (B, L, G, R, K)
  dk_BLGK, dv_BLGK = pl.pallas_call(
    functools.partial(_key_kernel, options=options),
    grid=(L // M, G, B),
    in_specs=[
      all_queries, keys, keys, row, all_queries, of_all_queries, of_all_queries,
    ],
    out_specs=[keys, keys],
    out_shape=[
      jax.ShapeDtypeStruct(k_BLGK.shape, k_BLGK.dtype),
      jax.ShapeDtypeStruct(v_BLGK.shape, v_BLGK.dtype),
    ],
    compiler_params=params,
    interpret=options.interpret,
    name="attention_key_gradient",
  )(
    q_BLHK.reshape(by_group),
    k_BLGK,
    v_BLGK,
    documents_BL,
    do_BLHK.reshape(by_group),
    sum_BHL.reshape(B, G, R, L),
    mean_BHL.reshape(B, G, R, L),
  )  # fmt: skip
  return dq_BLHK, dk_BLGK, dv_BLGK, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options, q_BLHK, k_BLGK, v_BLGK, documents_BL):
  return _forward(options, q_BLHK, k_BLGK, v_BLGK, documents_BL)[0]


def _flash_fwd(options, q_BLHK, k_BLGK, v_BLGK, documents_BL):
  o_BLHK, sum_BHL = (
    checkpoint_name(x, SAVED)
    for x in _forward(options, q_BLHK, k_BLGK, v_BLGK, documents_BL)
  )
  return o_BLHK, (q_BLHK, k_BLGK, v_BLGK, documents_BL, o_BLHK, sum_BHL)


_flash.defvjp(_flash_fwd, _backward)
