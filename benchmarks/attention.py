"""Attention kernels beside each other: time, memory, and whether they agree.

  python -m benchmarks.attention                     the shapes of R2
  python -m benchmarks.attention --shapes=aunet2_1b  in bfloat16, on a GPU

Every kernel that can run on the devices here, values and gradients, on rows
of several documents; `dense` is JAX's own attention with neither window nor
documents, the least one could compute without a fused kernel. Errors are
against `xla` in float32, over the largest entry, both at the highest precision;
times are at the default one, which for float32 on a GPU is TF32. Exit status 1
where an error is above its bound: this is the check of a kernel on new
hardware.

The last line of the output is one JSON object.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet import attention
from benchmarks import measure

# (rows, positions, query heads, key/value heads, head dim, window)
SHAPES = {
  "R2": {
    "stage 1": (4, 1024, 4, 4, 64, 256),
    "stage 2": (4, 256, 8, 8, 64, None),
  },
  "aunet2_1b": {
    "stage 1": (4, 8192, 8, 8, 64, 512),
    "stage 2": (4, 1664, 16, 16, 128, None),
  },
  "aunet3_1b": {
    "stage 1": (4, 8192, 8, 8, 64, 512),
    "stage 2": (4, 1664, 16, 16, 128, None),
    "stage 3": (4, 1144, 24, 24, 128, None),
  },
}
# Of the largest entry: float32 sums in another order; bfloat16 has 8 bits. At
# these shapes a CPU finds up to 2.0e-2 for xla, which rounds the probabilities
# before their gradient, and 4.4e-3 for triton; splash has not been measured.
BOUNDS = {
  "float32": {"xla": 1e-5, "splash": 1e-5, "triton": 1e-5},
  "bfloat16": {"xla": 4e-2, "splash": 2e-2, "triton": 1e-2},
}


def inputs(shape, dtype):
  B, L, H, G, K, _ = shape
  keys = jax.random.split(jax.random.key(0), 4)
  qkv = [
    jax.random.normal(key, (B, L, heads, K), jnp.dtype(dtype))
    for key, heads in zip(keys, (H, G, G), strict=False)
  ]
  # About eight documents a row, and padding at the end.
  rng = np.random.default_rng(0)
  cuts = np.sort(rng.integers(1, L, (B, 8)), axis=1)
  documents_BL = (np.arange(L) >= cuts[:, :, None]).sum(axis=1) + 1
  documents_BL[:, -L // 50 :] = 0
  return qkv, jnp.asarray(documents_BL, jnp.int32)


def dense(q_BLHK, k_BLGK, v_BLGK, documents_BL, window):
  return jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, is_causal=True)


def with_gradients(kernel, window):
  """(q, k, v, documents) -> (o, dq, dk, dv) of sum(o^2) / 2."""

  def loss(q_BLHK, k_BLGK, v_BLGK, documents_BL):
    o_BLHK = kernel(q_BLHK, k_BLGK, v_BLGK, documents_BL, window)
    return jnp.square(o_BLHK.astype(jnp.float32)).sum() / 2, o_BLHK

  grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

  def run(*arrays):
    (_, o_BLHK), grads = grad(*arrays)
    return o_BLHK, *grads

  return run


def error(found, expected) -> float:
  """Largest over value and gradients, each over its largest entry; or NaN."""
  errors = [
    float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max())
    for x, y in zip(found, expected, strict=True)
  ]
  return float(np.max(errors))  # unlike max, it does not lose a NaN


def compare(shape, dtype, kernels, repeats) -> dict:
  qkv, documents_BL = inputs(shape, dtype)
  window = shape[-1]
  with jax.default_matmul_precision("highest"):
    exact = [x.astype(jnp.float32) for x in qkv]
    reference = with_gradients(attention.blockwise, window)
    expected = jax.jit(reference)(*exact, documents_BL)
  result = {}
  for name, kernel in kernels.items():
    forward = jax.jit(kernel, static_argnums=4)
    both = jax.jit(with_gradients(kernel, window))
    compiled = both.lower(*qkv, documents_BL).compile()
    row = {
      "forward_ms": 1e3
      * measure.seconds(
        lambda *x, f=forward: f(*x, window), *qkv, documents_BL, repeats=repeats
      ),
      "forward_backward_ms": 1e3
      * measure.seconds(compiled, *qkv, documents_BL, repeats=repeats),
      "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    if name != "dense":
      with jax.default_matmul_precision("highest"):
        found = jax.jit(with_gradients(kernel, window))(*qkv, documents_BL)
      row["error"] = error(found, expected)
      row["error_bound"] = BOUNDS[dtype][name]
    result[name] = row
  for row in result.values():
    row["speed_of_xla"] = (
      result["xla"]["forward_backward_ms"] / row["forward_backward_ms"]
    )
  return result


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shapes", default="R2", choices=SHAPES)
  parser.add_argument("--dtype", choices=BOUNDS, help="default: by platform")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  backend = jax.default_backend()
  dtype = args.dtype or ("float32" if backend == "cpu" else "bfloat16")
  able = {
    "xla": attention.blockwise,
    "splash": attention.splash,
    "triton": attention.flash,
  }
  kernels = {n: k for n, k in able.items() if backend in attention.PLATFORMS[n]}
  kernels["dense"] = dense
  stages = {}
  for name, shape in SHAPES[args.shapes].items():
    stages[name] = compare(shape, dtype, kernels, args.repeats)
    for kernel, row in stages[name].items():
      print(
        f"{name} {kernel:6}  forward {row['forward_ms']:8.2f} ms, with "
        f"gradients {row['forward_backward_ms']:8.2f} ms, "
        f"{row['speed_of_xla']:.2f}x xla, {row['temporary_mib']:7.0f} MiB, "
        "error " + (f"{row['error']:.1e}" if "error" in row else "-"),
        flush=True,
      )
  wrong = [
    f"{name} {kernel}"
    for name, rows in stages.items()
    for kernel, row in rows.items()
    if "error" in row and not row["error"] <= row["error_bound"]
  ]
  if wrong:
    print(f"error above its bound: {', '.join(wrong)}", file=sys.stderr)
  result = {**measure.machine("attention"), "dtype": dtype, "wrong": wrong}
  print(json.dumps({**result, "shapes": args.shapes, "stages": stages}))
  return 1 if wrong else 0


if __name__ == "__main__":
  sys.exit(main())
