"""Memory and FLOPs of the training step on chips that are not there.

  python -m benchmarks.aot --config=configs/aunet2_1b.py --topology=v5e:4x4
  python -m benchmarks.aot --config=configs/aunet2_1b.py --topology=h100

The step is compiled ahead of time for the named topology, with parameters
split over its chips (`--mesh`), and the compiler's own accounting read. TPU
topologies need `pip install -e '.[tpu]'`, h100 needs `.[cuda]`; neither needs
the hardware, and nothing runs.

Rows per chip are those of `--rows`; with `--largest`, the number that memory
at two sizes predicts to fit is compiled too, and then the neighbours until one
fits and the next does not. XLA refuses a TPU program too large for its memory;
for GPUs its total is compared with the device's.

`attention` and `upsampling`: temporary memory of the function alone, values
and gradients, for the rows of one chip, by stage.

The last line of the output is one JSON object.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from aunet_jax import config as config_lib
from aunet_jax.aunet import block, counts, sharding, transition
from aunet_jax.aunet import devices as devices_lib
from aunet_jax.compile import programs
from aunet_jax.config import Config, MeshConfig

GIB = devices_lib.GIB


def memory(compiled) -> dict[str, float]:
  """GiB of a chip. `total`: arguments, outputs and temporaries together."""
  sizes = compiled.memory_analysis()
  total = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
  total += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return {
    "total": round(total / GIB, 3),
    "peak": round(sizes.peak_memory_in_bytes / GIB, 3),
    "temporary": round(sizes.temp_size_in_bytes / GIB, 3),
    "arguments": round(sizes.argument_size_in_bytes / GIB, 3),
  }


def step_memory(config: Config, mesh, rows: int) -> dict | None:
  """Of the whole step at `rows` a chip; None where it does not fit."""
  num_rows = rows * mesh.size // mesh.shape["tensor"]
  config = dataclasses.replace(
    config,
    train=dataclasses.replace(
      config.train, batch_size=num_rows, grad_accumulation=1
    ),
  )
  began = time.perf_counter()
  try:
    compiled = programs.compile_train(config, mesh)
  except programs.DoesNotFit:
    return None
  seconds = round(time.perf_counter() - began, 1)
  return {**memory(compiled), "compile_seconds": seconds}


def piece_memory(function, mesh, *shapes) -> float:
  """MiB of temporaries of values and gradients, on the first chip alone."""
  one = sharding.make_mesh(MeshConfig(), mesh.devices.flat[:1])
  where = NamedSharding(one, PartitionSpec())
  arrays = [jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes]
  floats = [
    i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)
  ]

  def run(cotangent, *arrays):
    def of_floats(*values):
      full = list(arrays)
      for i, value in zip(floats, values, strict=True):
        full[i] = value
      return function(*full)

    y, transpose = jax.vjp(of_floats, *(arrays[i] for i in floats))
    return y, transpose(cotangent)

  with jax.set_mesh(one):
    y = jax.eval_shape(function, *arrays)
    cotangent = jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=where)
    compiled = jax.jit(run).lower(cotangent, *arrays).compile()
  return round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)


def pieces(config: Config, mesh, rows: int) -> dict:
  model = config.model
  dtype = jnp.dtype(model.dtype)
  result = {"attention_mib": [], "upsampling_mib": []}
  for i, stage in enumerate(model.stages):
    L, H, G, K = stage.capacity, stage.num_heads, stage.kv_heads, stage.head_dim
    attend = functools.partial(
      block.attention, window=stage.window, choice=stage.attention
    )
    keys = ((rows, L, G, K), dtype)
    documents = ((rows, L), jnp.int32)
    result["attention_mib"].append(
      piece_memory(
        attend, mesh, ((rows, L, H, K), dtype), keys, keys, documents
      )
    )
    if i + 1 < model.num_stages:
      S, E = model.stages[i + 1].capacity, model.stages[i + 1].dim
      kernel = ((model.num_offsets, E, stage.dim), dtype)
      result["upsampling_mib"].append(
        piece_memory(
          transition.offset_matmul,
          mesh,
          ((rows, S, E), dtype),
          documents,
          documents,
          kernel,
        )
      )
  return result


def flops(config: Config, rows: int, platform: str) -> dict:
  """Of one chip's step, in TFLOP."""
  model = config.model
  padded = rows * counts.train_flops_per_row(model, rows, platform)
  useful = rows * counts.useful_train_flops(model, model.capacities)
  again = rows * counts.remat_flops_per_row(model, platform)
  return {
    "useful_tflop": round(useful / 1e12, 3),
    "padded_tflop": round(padded / 1e12, 3),
    "repeated_by_remat_tflop": round(again / 1e12, 3),
  }


def largest(config, mesh, measured: dict[int, dict], limit: float) -> dict:
  """Compiles around the prediction until one fits and the next does not."""
  low, high = sorted(r for r in measured if measured[r])[-2:]
  slope = measured[high]["total"] - measured[low]["total"]
  slope /= high - low
  start = measured[low]["total"] - slope * low
  guess = max(1, int((limit / GIB - start) / slope))

  def fits(rows):
    if rows not in measured:
      measured[rows] = step_memory(config, mesh, rows)
      print(f"{rows} rows: {measured[rows]}", flush=True)
    found = measured[rows]
    return found is not None and found["total"] * GIB <= limit

  while not fits(guess) and guess > 1:
    guess -= 1
  while fits(guess + 1):
    guess += 1
  return {"rows_per_chip": guess if fits(guess) else 0}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--topology", default="v5e:4x4")
  parser.add_argument("--rows", default="1,2", help="rows per chip")
  parser.add_argument("--largest", action="store_true")
  parser.add_argument("--no_pieces", action="store_true")
  args, rest = parser.parse_known_args()
  config = config_lib.parse_flags(rest)
  programs.compile_elsewhere(args.topology)
  devices = programs.topology_devices(args.topology)
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=None), devices)
  platform = sharding.platform(mesh)
  limit = devices_lib.memory_limit(devices[0])
  measured, result = {}, {}
  for rows in map(int, args.rows.split(",")):
    measured[rows] = step_memory(config, mesh, rows)
    print(f"{rows} rows: {measured[rows]}", flush=True)
  if args.largest:
    result["largest"] = largest(config, mesh, measured, limit)
  first = int(args.rows.split(",")[0])
  if not args.no_pieces:
    result["pieces"] = {"rows": first, **pieces(config, mesh, first)}
  print(
    json.dumps(
      {
        "command": " ".join(["python -m benchmarks.aot", *sys.argv[1:]]),
        "jax": jax.__version__,
        "device": devices[0].device_kind,
        "chips": len(devices),
        "memory_bytes": limit,
        "gib_by_rows_per_chip": measured,
        "flops_per_chip": {"rows": first, **flops(config, first, platform)},
        **result,
      }
    )
  )


if __name__ == "__main__":
  main()
