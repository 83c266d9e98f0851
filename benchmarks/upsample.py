"""Multi-linear upsampling beside one dense product and `ragged_dot`.

  python -m benchmarks.upsample                      the transition of R2
  python -m benchmarks.upsample --shapes=aunet2_1b --dtype=bfloat16

Time and temporary memory of the forward product, of each gradient alone and
of both as training computes them; and FLOPs over those of as many dense
products of as many rows, which is the least there is, counted in the traced
program with loops run through. For the TPU's kernel, whose program does not
say, the rows in the tiles that these offsets visit are counted, which is the
same for the forward product and each gradient.

The last line of the output is one JSON object.
"""

import argparse
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet import grouped, transition
from aunet_jax.aunet.segments import segment, take
from benchmarks import measure

# (rows, fine positions, coarse slots, fine width, coarse width)
SHAPES = {
  "R2": (4, 1024, 256, 256, 512),
  "aunet2_1b": (8, 8192, 1664, 512, 2048),
  "aunet3_1b": (8, 1664, 1144, 2048, 3072),
}
NUM_OFFSETS = 16


def make_inputs(shape, dtype):
  B, L, S, D, E = shape
  rng = np.random.default_rng(0)
  boundary_BL = np.zeros((B, L), bool)
  for row in boundary_BL:
    row[rng.choice(np.arange(1, L), S - 1, replace=False)] = True
    row[0] = True
  segments = segment(jnp.asarray(boundary_BL), S)
  x_BSE = rng.standard_normal((B, S, E), np.float32)
  kernel_OED = rng.standard_normal((NUM_OFFSETS, E, D), np.float32) / E**0.5
  return (
    jnp.asarray(x_BSE, dtype),
    segments.slot_BL,
    segments.offset_BL,
    jnp.asarray(kernel_OED, dtype),
  )


def dense(x_BSE, slot_BL, offset_BL, kernel_OED):
  return take(x_BSE, slot_BL) @ kernel_OED[0]


def ragged(x_BSE, slot_BL, offset_BL, kernel_OED):
  B, S, E = x_BSE.shape
  row_N = (slot_BL + jnp.arange(B)[:, None] * S).reshape(-1)
  group_N = (offset_BL % NUM_OFFSETS).reshape(-1)
  order_N = jnp.argsort(group_N)
  sizes = jnp.bincount(group_N, length=NUM_OFFSETS).astype(jnp.int32)
  x_NE = x_BSE.reshape(B * S, E)[row_N[order_N]]
  y_ND = jax.lax.ragged_dot(x_NE, kernel_OED, sizes)[jnp.argsort(order_N)]
  return y_ND.reshape(*slot_BL.shape, -1)


def product_flops(jaxpr) -> float:
  """FLOPs of all matrix products of a traced program, loops run through."""
  total = 0
  for equation in jaxpr.eqns:
    times = 1
    if equation.primitive.name == "scan":
      times = equation.params["length"]
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    for parameter in equation.params.values():
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        total += times * product_flops(inner)
  return total


def visited_tiles(offset_BL, tile) -> int:
  """Tiles of rows in order of offset, once for each offset in them."""
  group_N = np.asarray(offset_BL).reshape(-1) % NUM_OFFSETS
  ends = np.cumsum(np.bincount(group_N, minlength=NUM_OFFSETS))
  starts = np.concatenate([[0], ends[:-1]])
  return int((-(-ends // tile) - starts // tile)[ends > starts].sum())


def derivatives(function, inputs):
  """name -> function of (cotangent, x, kernel)."""
  x_BSE, slot_BL, offset_BL, kernel_OED = inputs
  return {
    "forward": lambda _, x, k: function(x, slot_BL, offset_BL, k),
    "dx": lambda dy, x, k: jax.vjp(
      lambda x: function(x, slot_BL, offset_BL, k), x
    )[1](dy),
    "dW": lambda dy, x, k: jax.vjp(
      lambda k: function(x, slot_BL, offset_BL, k), k
    )[1](dy),
    "both": lambda dy, x, k: jax.vjp(
      lambda x, k: function(x, slot_BL, offset_BL, k), x, k
    )[1](dy),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shapes", default="R2", choices=SHAPES)
  parser.add_argument("--dtype", help="default: by platform")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  backend = jax.default_backend()
  dtype = args.dtype or ("float32" if backend == "cpu" else "bfloat16")
  B, L, S, D, E = SHAPES[args.shapes]
  inputs = make_inputs(SHAPES[args.shapes], dtype)
  x_BSE, _, offset_BL, kernel_OED = inputs
  dy_BLD = jax.random.normal(jax.random.key(0), (B, L, D), jnp.dtype(dtype))
  ideal = 2 * B * L * D * E
  table = {}
  for name, function in (
    ("dense", dense),
    ("ours", transition.offset_matmul),
    ("ragged_dot", ragged),
  ):
    table[name] = {}
    for kind, derivative in derivatives(function, inputs).items():
      compiled = jax.jit(derivative).lower(dy_BLD, x_BSE, kernel_OED).compile()
      traced = jax.make_jaxpr(derivative)(dy_BLD, x_BSE, kernel_OED)
      row = {
        "ms": 1e3
        * measure.seconds(
          compiled, dy_BLD, x_BSE, kernel_OED, repeats=args.repeats
        ),
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
      }
      total = product_flops(traced.jaxpr) / ideal
      # What ragged_dot lowers to depends on the backend, and a gradient alone
      # leaves unused products for the compiler to drop: neither is traced.
      if name != "ragged_dot" and kind == "forward":
        forward = row["flops_over_dense"] = total
      elif name != "ragged_dot" and kind == "both":
        row["flops_over_dense"] = (total - forward) / 2
      table[name][kind] = row
      line = (
        f"{name:10} {kind:7} {row['ms']:8.2f} ms, "
        f"{row['ms'] / table['dense'][kind]['ms']:.2f}x dense, "
        f"{row['temporary_mib']:7.0f} MiB"
      )
      if "flops_over_dense" in row:
        line += f", FLOPs {row['flops_over_dense']:.3f}x"
      print(line, flush=True)
  tile = grouped.tile_rows(B * L, NUM_OFFSETS)
  on_tpu = visited_tiles(offset_BL, tile) * tile / (B * L)
  print(f"the TPU's kernel would multiply {on_tpu:.3f}x the rows")
  print(
    json.dumps(
      {
        **measure.machine("upsample"),
        "dtype": dtype,
        "shapes": args.shapes,
        "table": table,
        "tpu_rows_over_dense": on_tpu,
      }
    )
  )


if __name__ == "__main__":
  main()
