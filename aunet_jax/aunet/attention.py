"""Causal, windowed, document-masked attention: one function, several kernels.

Position t sees key s iff 0 <= t - s < window and their documents are equal.
Every kernel computes exactly that, values and gradients; they differ in speed,
in memory and in where they run:

  xla     blocks of a part of a window in plain XLA; the reference, runs
          anywhere.
  splash  the TPU kernel that ships with JAX (Pallas); visits only the blocks
          of keys that a block of queries can see, stores no scores.
  triton  the same for NVIDIA GPUs, ours (`attention_gpu.py`); triton_64 and
          triton_32 are it with smaller tiles.

`auto` picks by the platform of the devices that will run the program: those
of the mesh in context, so that a program compiled ahead of time for TPUs on a
CPU host gets the TPU's kernel. On GPUs it is xla, unless `kernels` has put a
kernel in its place that was tried on the device. No GPU kernel that JAX ships
has windows and documents both: its cuDNN one takes documents only as a bias of
L^2 numbers, its Pallas one has no window and no groups of heads.

Letters: B batch, L positions, M attended positions, H query heads, G key/value
heads, R query heads per key/value head, K head dim, N blocks of C positions.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from aunet_jax.aunet import attention_gpu, sharding
from aunet_jax.aunet.layers import SAVED
from aunet_jax.config import StageConfig

# Kernel -> platforms it runs on; and what `auto` takes on a platform.
PLATFORMS = {
  "xla": ("cpu", "gpu", "tpu"),
  "splash": ("tpu",),
  **{name: ("gpu",) for name in attention_gpu.TILES},
}

_AUTO = {"tpu": "splash"}

# Padding of the kernels' last block: no document of a row has this id.
_NO_DOCUMENT = -1


# ----- the choice -----------------------------------------------------------


def pick(choice: str, platform: str, where: str = "attention") -> str:
  """The kernel a stage's `attention` setting means on a platform.

  Raises: ValueError where an explicit choice cannot run there.
  """
  if choice == "auto":
    return _AUTO.get(platform, "xla")
  if platform not in PLATFORMS[choice]:
    able = [repr(name) for name, on in PLATFORMS.items() if platform in on]
    raise ValueError(
      f"{where}: attention={choice!r} needs {' or '.join(PLATFORMS[choice])} "
      f"devices and these are {platform}; use 'auto' or {' or '.join(able)}."
    )
  return choice


def describe(stages: Sequence[StageConfig], platform: str) -> str:
  """One line for the log: the kernel of every stage.

  Raises: ValueError as `check`.
  """
  kernels = check(stages, platform)
  return f"attention on {platform}: " + ", ".join(
    f"stage {number} {name}" for number, name in enumerate(kernels, start=1)
  )


def check(stages: Sequence[StageConfig], platform: str) -> tuple[str, ...]:
  """The kernel of every stage, stage 1 first.

  Raises: ValueError naming the stage whose choice cannot run.
  """
  kernels = []
  for number, stage in enumerate(stages, start=1):
    kernel = pick(stage.attention, platform, f"stage {number}")
    ours = kernel in attention_gpu.TILES
    if ours and stage.head_dim > attention_gpu.MAX_HEAD_DIM:
      raise ValueError(
        f"stage {number}: attention={kernel!r} takes a head_dim of at most "
        f"{attention_gpu.MAX_HEAD_DIM} and this is {stage.head_dim}, whose "
        f"blocks do not fit a GPU's shared memory; use 'auto' or 'xla'."
      )
    kernels.append(kernel)
  return tuple(kernels)


def attention(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  documents_BL: jax.Array,
  window: int | None,
  choice: str = "auto",
) -> jax.Array:
  """Attends with the kernel `choice` means on the devices in context.

  Args: documents_BL: int >= 0. window: keys a query sees, itself included;
    None = all.
  Returns: o_BLHK, dtype of v_BLGK.
  Raises: ValueError where the choice cannot run there.
  """
  kernel = KERNELS[pick(choice, sharding.platform())]
  return kernel(q_BLHK, k_BLGK, v_BLGK, documents_BL, window)


def multiplied_pairs(kernel: str, length: int, window: int | None) -> int:
  """(query, key) pairs of a row that a kernel multiplies, masked or not."""
  window = length if window is None else min(window, length)
  if kernel == "xla":
    block, back = _block_size(length, window)
    return -(-length // block) * block * (back + 1) * block
  if kernel == "splash":
    queries = keys = _splash_block(length)
  else:
    queries, keys = attention_gpu.TILES[kernel][:2]
  pairs = 0
  for first in range(0, length, queries):
    seen_from = max(0, first - window + 1) // keys * keys
    seen_to = -(-(first + queries) // keys) * keys
    pairs += queries * (seen_to - seen_from)
  return pairs


# ----- xla ------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  documents_BL: jax.Array,
  window: int | None,
) -> jax.Array:
  """Causal attention to the last `window` positions of the same document.

  Position t sees key s iff 0 <= t - s < window and their documents are equal.
  Exact; softmax in float32. Memory O(L * window): positions are cut into N
  blocks of a quarter of a window, of a half where it is short, and a block
  sees itself and the four or two before it. The backward pass keeps no scores:
  it computes them again.

  Returns: o_BLHK, dtype of v_BLGK.
  """
  return _blockwise_forward(q_BLHK, k_BLGK, v_BLGK, documents_BL, window)[0]


def _block_size(length: int, window: int | None) -> tuple[int, int]:
  """Positions of a block, and how many blocks before its own it sees."""
  window = length if window is None else min(window, length)
  back = 4 if window >= 256 else 2  # less is masked, smaller products
  block = -(-window // back)  # `back` blocks hold the window - 1 before
  return (length, 0) if block * (back + 1) >= length else (block, back)


def _cut(x: jax.Array, block: int) -> jax.Array:
  """(B, ..., L, K) -> (B, ..., N, C, K), the last block padded."""
  axis, length = x.ndim - 2, x.shape[-2]
  N = -(-length // block)
  pads = [(0, 0)] * axis + [(0, N * block - length), (0, 0)]
  return jnp.pad(x, pads).reshape(*x.shape[:axis], N, block, x.shape[-1])


def _with_past(x_BGNCK: jax.Array, back: int) -> jax.Array:
  """-> x_BGNMK, M = (back + 1) * C: a block after the ones it sees."""
  N = x_BGNCK.shape[2]
  shifted = [
    jnp.pad(x_BGNCK[:, :, : N - j], ((0, 0), (0, 0), (j, 0), (0, 0), (0, 0)))
    for j in range(back, 0, -1)
  ]
  return jnp.concatenate([*shifted, x_BGNCK], axis=3)


def _query_blocks(x_BLHK: jax.Array, num_groups: int, block: int) -> jax.Array:
  """-> x_BGNRCK."""
  B, L, H, K = x_BLHK.shape
  x_BLGRK = x_BLHK.reshape(B, L, num_groups, H // num_groups, K)
  return _cut(x_BLGRK.transpose(0, 2, 3, 1, 4), block).swapaxes(2, 3)


def _in_blocks(q_BLHK, k_BLGK, v_BLGK, window):
  """-> q_BGNRCK, scaled; k_BGNMK, v_BGNMK."""
  block, back = _block_size(q_BLHK.shape[1], window)
  G, K = k_BLGK.shape[2:]
  k_BGNMK, v_BGNMK = (
    _with_past(_cut(x_BLGK.swapaxes(1, 2), block), back)
    for x_BLGK in (k_BLGK, v_BLGK)
  )
  return _query_blocks(q_BLHK * K**-0.5, G, block), k_BGNMK, v_BGNMK


def _scores(q_BGNRCK, k_BGNMK, documents_BL, window) -> jax.Array:
  """score_BGNRCM, float32; -inf where a query does not see a key."""
  L = documents_BL.shape[1]
  block, back = _block_size(L, window)
  N, window = -(-L // block), L if window is None else window
  query_1C1 = jnp.arange(block)[None, :, None]
  key_11M = jnp.arange((back + 1) * block)[None, None] - back * block
  distance_1CM = query_1C1 - key_11M
  first_N11 = jnp.arange(N)[:, None, None] * block
  seen_NCM = (
    (distance_1CM >= 0) & (distance_1CM < window) & (first_N11 + key_11M >= 0)
  )
  documents_B1NC1 = _cut(documents_BL[:, None, :, None], block)
  documents_B1NM1 = _with_past(documents_B1NC1, back)
  same_B1NCM = documents_B1NC1 == documents_B1NM1.swapaxes(3, 4)
  mask_B1N1CM = (same_B1NCM & seen_NCM[None, None])[:, :, :, None]
  score_BGNRCM = jnp.einsum(
    "BGNRCK,BGNMK->BGNRCM",
    q_BGNRCK,
    k_BGNMK,
    preferred_element_type=jnp.float32,
  )
  return jnp.where(mask_B1N1CM, score_BGNRCM, -jnp.inf)


def _blockwise_forward(q_BLHK, k_BLGK, v_BLGK, documents_BL, window):
  B, L, H, K = q_BLHK.shape
  q_BGNRCK, k_BGNMK, v_BGNMK = _in_blocks(q_BLHK, k_BLGK, v_BLGK, window)
  score_BGNRCM = _scores(q_BGNRCK, k_BGNMK, documents_BL, window)
  # Softmax, divided by its sum only after the sum over keys: K numbers a query
  # instead of M. A query always sees itself, so the peak is finite.
  peak_BGNRC1 = score_BGNRCM.max(axis=-1, keepdims=True)
  weight_BGNRCM = jnp.exp(score_BGNRCM - peak_BGNRC1)
  total_BGNRC1 = weight_BGNRCM.sum(axis=-1, keepdims=True)
  o_BGNRCK = jnp.einsum(
    "BGNRCM,BGNMK->BGNRCK",
    weight_BGNRCM.astype(v_BGNMK.dtype),
    v_BGNMK,
    preferred_element_type=jnp.float32,
  )
  o_BGNRCK = (o_BGNRCK / total_BGNRC1).astype(v_BGNMK.dtype)
  o_BLHK = o_BGNRCK.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, H, K)[:, :L]
  o_BLHK = checkpoint_name(o_BLHK, SAVED)
  log_total_BGNRC1 = checkpoint_name(peak_BGNRC1 + jnp.log(total_BGNRC1), SAVED)
  kept = (q_BLHK, k_BLGK, v_BLGK, documents_BL, o_BLHK, log_total_BGNRC1)
  return o_BLHK, kept


def _blockwise_backward(window, kept, do_BLHK):
  q_BLHK, k_BLGK, v_BLGK, documents_BL, o_BLHK, log_total_BGNRC1 = kept
  blocks, from_blocks = jax.vjp(
    functools.partial(_in_blocks, window=window), q_BLHK, k_BLGK, v_BLGK
  )
  q_BGNRCK, k_BGNMK, v_BGNMK = blocks
  G, C = k_BGNMK.shape[1], q_BGNRCK.shape[4]
  do_BGNRCK = _query_blocks(do_BLHK, G, C)
  # How far a query's scores together move its output (Dao et al. 2022,
  # arXiv 2205.14135, Appendix B.2).
  moved_BLH1 = (do_BLHK.astype(jnp.float32) * o_BLHK).sum(-1, keepdims=True)
  moved_BGNRC1 = _query_blocks(moved_BLH1, G, C)

  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  score_BGNRCM = _scores(q_BGNRCK, k_BGNMK, documents_BL, window)
  weight_BGNRCM = jnp.exp(score_BGNRCM - log_total_BGNRC1)
  dv_BGNMK = product(
    "BGNRCM,BGNRCK->BGNMK", weight_BGNRCM.astype(do_BLHK.dtype), do_BGNRCK
  )
  dweight_BGNRCM = product("BGNRCK,BGNMK->BGNRCM", do_BGNRCK, v_BGNMK)
  dscore_BGNRCM = weight_BGNRCM * (dweight_BGNRCM - moved_BGNRC1)
  dscore_BGNRCM = dscore_BGNRCM.astype(q_BLHK.dtype)
  dq_BGNRCK = product("BGNRCM,BGNMK->BGNRCK", dscore_BGNRCM, k_BGNMK)
  dk_BGNMK = product("BGNRCM,BGNRCK->BGNMK", dscore_BGNRCM, q_BGNRCK)
  gradients = (dq_BGNRCK, dk_BGNMK, dv_BGNMK)
  gradients = from_blocks(
    tuple(d.astype(x.dtype) for d, x in zip(gradients, blocks, strict=True))
  )
  return *gradients, None


blockwise.defvjp(_blockwise_forward, _blockwise_backward)


# ----- one device's part ----------------------------------------------------


def per_device(kernel, q_BLHK, k_BLGK, v_BLGK, documents_BL) -> jax.Array:
  """Runs a kernel on each device's own rows and heads.

  XLA cannot split a hand-written kernel over devices by itself.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return kernel(q_BLHK, k_BLGK, v_BLGK, documents_BL)
  rows = sharding.row_axes(q_BLHK.shape[0])
  heads = PartitionSpec(rows, None, sharding.axis_of("heads"), None)
  return jax.shard_map(
    kernel,
    in_specs=(heads, heads, heads, PartitionSpec(rows, None)),
    out_specs=heads,
    check_vma=False,
  )(q_BLHK, k_BLGK, v_BLGK, documents_BL)


# ----- splash (TPU) ---------------------------------------------------------


def _splash_block(length: int) -> int:
  """The largest block that pads a row by at most an eighth.

  Larger blocks keep the matrix unit busy; 128 lanes are the smallest.
  """
  for block in (512, 384, 256):
    if -length % block <= length // 8:
      return block
  return 128


def splash(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  documents_BL: jax.Array,
  window: int | None,
  interpret: bool = False,
) -> jax.Array:
  """`attention` by the splash kernel. `interpret`: on a CPU, for tests."""
  kernel = functools.partial(_splash_rows, window=window, interpret=interpret)
  return per_device(kernel, q_BLHK, k_BLGK, v_BLGK, documents_BL)


def _splash_rows(q_BLHK, k_BLGK, v_BLGK, documents_BL, *, window, interpret):
  """One device's rows, padded to whole blocks."""
  # TPUs alone need it, and half a second to import it.
  from jax.experimental.pallas.ops.tpu import splash_attention

  L, H, K = q_BLHK.shape[1:]
  block = _splash_block(L)
  extra = -L % block
  padded = L + extra

  def by_head(x_BLGK):
    """-> (B, G, padded L, K), kept: neither RoPE nor layout is done again."""
    x_BLGK = jnp.pad(x_BLGK, ((0, 0), (0, extra), (0, 0), (0, 0)))
    return checkpoint_name(x_BLGK.swapaxes(1, 2), SAVED)

  documents_BL = jnp.pad(
    documents_BL, ((0, 0), (0, extra)), constant_values=_NO_DOCUMENT
  )
  if window is None or window >= L:
    mask = splash_attention.CausalMask((padded, padded))
  else:
    mask = splash_attention.LocalMask((padded, padded), (window - 1, 0), 0)
  # One backward kernel instead of two saves two of seven products, but keeps
  # a copy of the query gradient for every block of keys.
  fused = padded // block <= 4
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * H),
    block_sizes=splash_attention.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      block_q_dq=None if fused else block,
      block_kv_dq=None if fused else block,
      use_fused_bwd_kernel=fused,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
    residual_checkpoint_name=SAVED,
  )
  o_BHLK = jax.vmap(kernel)(
    by_head(q_BLHK * K**-0.5),
    by_head(k_BLGK),
    by_head(v_BLGK),
    segment_ids=splash_attention.SegmentIds(documents_BL, documents_BL),
  )
  return o_BHLK.swapaxes(1, 2)[:, :L].astype(v_BLGK.dtype)


# ----- triton (GPU) ---------------------------------------------------------


def flash(
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  documents_BL: jax.Array,
  window: int | None,
  tiles: attention_gpu.Tiles = attention_gpu.TILES["triton"],
  interpret: bool = False,
) -> jax.Array:
  """`attention` by our GPU kernel. `interpret`: on a CPU, for tests."""
  kernel = functools.partial(
    attention_gpu.flash_attention,
    window=window,
    tiles=tiles,
    interpret=interpret,
  )
  return per_device(kernel, q_BLHK, k_BLGK, v_BLGK, documents_BL)


KERNELS = {
  "xla": blockwise,
  "splash": splash,
  **{
    name: functools.partial(flash, tiles=tiles)
    for name, tiles in attention_gpu.TILES.items()
  },
}
