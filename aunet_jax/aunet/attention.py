"""Causal, windowed, document-masked attention: one function, several kernels.

Position t sees key s iff 0 <= t - s < window and their documents are equal.
Every kernel computes exactly that, values and gradients; they differ in speed,
in memory and in where they run:

  xla     blocks of half a window in plain XLA; the reference, runs anywhere.
  splash  the TPU kernel that ships with JAX (Pallas); visits only the blocks
          of keys that a block of queries can see, stores no scores.
  triton  the same for NVIDIA GPUs, ours (`attention_gpu.py`).

`auto` picks by the platform of the devices that will run the program: those
of the mesh in context, so that a program compiled ahead of time for TPUs on a
CPU host gets the TPU's kernel. No GPU kernel that JAX ships has windows and
documents both: its cuDNN one takes documents only as a bias of L^2 numbers,
its Pallas one has no window and no groups of heads.

Letters: B batch, L positions, M attended positions, H query heads, G key/value
heads, R query heads per key/value head, K head dim, N blocks of C positions.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec

from aunet_jax.aunet import attention_gpu, sharding
from aunet_jax.config import StageConfig

# Kernel -> platforms it runs on; and what `auto` takes on a platform.
PLATFORMS = {
  "xla": ("cpu", "gpu", "tpu"),
  "splash": ("tpu",),
  "triton": ("gpu",),
}

# On GPUs, xla until triton has run on one: interpreted, it is exact.
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
  """One line for the log: the kernel of every stage, and why.

  Raises: ValueError as `check`.
  """
  kernels = check(stages, platform)
  line = f"attention on {platform}: " + ", ".join(
    f"stage {number} {name}" for number, name in enumerate(kernels, start=1)
  )
  if platform == "gpu" and "auto" in [stage.attention for stage in stages]:
    line += (
      " (auto: triton, faster and smaller, has not run on a GPU yet; "
      "--config.model.stages[0].attention=triton tries it)"
    )
  return line


def check(stages: Sequence[StageConfig], platform: str) -> tuple[str, ...]:
  """The kernel of every stage, stage 1 first.

  Raises: ValueError naming the stage whose choice cannot run.
  """
  kernels = []
  for number, stage in enumerate(stages, start=1):
    kernel = pick(stage.attention, platform, f"stage {number}")
    if kernel == "triton" and stage.head_dim > attention_gpu.MAX_HEAD_DIM:
      raise ValueError(
        f"stage {number}: attention='triton' takes a head_dim of at most "
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
  kernel = _KERNELS[pick(choice, sharding.platform())]
  return kernel(q_BLHK, k_BLGK, v_BLGK, documents_BL, window)


def multiplied_pairs(kernel: str, length: int, window: int | None) -> int:
  """(query, key) pairs of a row that a kernel multiplies, masked or not."""
  window = length if window is None else min(window, length)
  if kernel == "xla":
    block = -(-window // 2)
    if 3 * block >= length:
      return length * length
    return -(-length // block) * block * 3 * block
  if kernel == "splash":
    queries = keys = _splash_block(length)
  else:
    queries, keys = attention_gpu.BLOCK_C, attention_gpu.BLOCK_M
  pairs = 0
  for first in range(0, length, queries):
    seen_from = max(0, first - window + 1) // keys * keys
    seen_to = -(-(first + queries) // keys) * keys
    pairs += queries * (seen_to - seen_from)
  return pairs


# ----- xla ------------------------------------------------------------------


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
  blocks of half a window, and a block sees itself and the two before it.

  Returns: o_BLHK, dtype of v_BLGK.
  """
  B, L, H, K = q_BLHK.shape
  G = k_BLGK.shape[2]
  window = L if window is None else min(window, L)
  block, back = -(-window // 2), 2  # `back` blocks hold the window - 1 before
  if block * (back + 1) >= L:
    block, back = L, 0
  N = -(-L // block)

  def blocks(x):  # (B, ..., L, K) -> (B, ..., N, C, K)
    axis = x.ndim - 2
    x = jnp.pad(
      x, [(0, N * block - L) if i == axis else (0, 0) for i in range(x.ndim)]
    )
    return x.reshape(*x.shape[:axis], N, block, x.shape[-1])

  def with_past(x_BGNCK):  # -> x_BGNMK, M = (back + 1) * C
    shifted = [
      jnp.pad(x_BGNCK[:, :, : N - j], ((0, 0), (0, 0), (j, 0), (0, 0), (0, 0)))
      for j in range(back, 0, -1)
    ]
    return jnp.concatenate([*shifted, x_BGNCK], axis=3)

  q_BGRLK = q_BLHK.reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4)
  q_BGNRCK = blocks(q_BGRLK * K**-0.5).swapaxes(2, 3)
  k_BGNMK = with_past(blocks(k_BLGK.swapaxes(1, 2)))
  v_BGNMK = with_past(blocks(v_BLGK.swapaxes(1, 2)))

  query_1C1 = jnp.arange(block)[None, :, None]
  key_11M = jnp.arange((back + 1) * block)[None, None] - back * block
  distance_1CM = query_1C1 - key_11M
  first_N11 = jnp.arange(N)[:, None, None] * block
  seen_NCM = (
    (distance_1CM >= 0) & (distance_1CM < window) & (first_N11 + key_11M >= 0)
  )
  documents_B1NC1 = blocks(documents_BL[:, None, :, None])
  documents_B1NM1 = with_past(documents_B1NC1)
  same_B1NCM = documents_B1NC1 == documents_B1NM1.swapaxes(3, 4)
  mask_B1N1CM = (same_B1NCM & seen_NCM[None, None])[:, :, :, None]

  score_BGNRCM = jnp.einsum(
    "BGNRCK,BGNMK->BGNRCM",
    q_BGNRCK,
    k_BGNMK,
    preferred_element_type=jnp.float32,
  )
  score_BGNRCM = jnp.where(mask_B1N1CM, score_BGNRCM, -jnp.inf)
  # Softmax, divided by its sum only after the sum over keys: K numbers a query
  # instead of M. A query always sees itself, so the peak is finite.
  peak_BGNRC1 = jax.lax.stop_gradient(score_BGNRCM.max(axis=-1, keepdims=True))
  weight_BGNRCM = jnp.exp(score_BGNRCM - peak_BGNRC1)
  total_BGNRC1 = weight_BGNRCM.sum(axis=-1, keepdims=True)
  o_BGNRCK = jnp.einsum(
    "BGNRCM,BGNMK->BGNRCK",
    weight_BGNRCM.astype(v_BGNMK.dtype),
    v_BGNMK,
    preferred_element_type=jnp.float32,
  )
  o_BGNRCK = (o_BGNRCK / total_BGNRC1).astype(v_BGNMK.dtype)
  o_BLHK = o_BGNRCK.transpose(0, 2, 4, 1, 3, 5).reshape(B, N * block, H, K)
  return o_BLHK[:, :L]


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
  L, H, K = q_BLHK.shape[1:]
  block = _splash_block(L)
  extra = -L % block
  padded = L + extra

  def by_head(x_BLGK):  # -> (B, G, padded L, K)
    x_BLGK = jnp.pad(x_BLGK, ((0, 0), (0, extra), (0, 0), (0, 0)))
    return x_BLGK.swapaxes(1, 2)

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
  interpret: bool = False,
) -> jax.Array:
  """`attention` by our GPU kernel. `interpret`: on a CPU, for tests."""
  kernel = functools.partial(
    attention_gpu.flash_attention, window=window, interpret=interpret
  )
  return per_device(kernel, q_BLHK, k_BLGK, v_BLGK, documents_BL)


_KERNELS = {"xla": blockwise, "splash": splash, "triton": flash}
