"""Training speed: steady-state bytes per second of whole steps.

  python -m benchmarks.train                    quickstart, R2 and R3 on CPU
  python -m benchmarks.train --models=R2,R3     rows of 1024, batch 4

R2 and R3 are the two models whose losses and gradients are compared with the
official code's (docs/fidelity.md), here in float32. Machines differ, so a
matmul calibration of the same run goes with every figure.

A step is forward, backward, clipping and AdamW on one device. Compile time is
apart. Row slots all hold text; every stage is filled to its capacity. The 1B
configs (`--models=aunet2_1b`, on one accelerator) take as many rows as fit, and
`useful_mfu` is over a square product in the same dtype and the same run.
`--profile` adds where a step's time goes, by part of the model.

The last line of the output is one JSON object.
"""

import argparse
import dataclasses
import functools
import json
import resource
import sys
import time

from aunet_jax import memory

if __name__ == "__main__":
  memory.use_huge_pages()  # as the trainer does

import jax
import numpy as np

from aunet_jax import config as config_lib
from aunet_jax.aunet import attention, counts, devices, sharding
from aunet_jax.config import Config, ModelConfig, StageConfig
from aunet_jax.data import packing
from aunet_jax.train import optimizer, state
from aunet_jax.train.step import compile_step
from benchmarks import measure, where_time_goes

PAPER_BYTES_PER_SECOND = {  # arXiv 2506.14761, one H100 of several
  "aunet2_1b": 225e3,
  "aunet3_1b": 180e3,
  "aunet4_1b": 155e3,
}


def models() -> dict[str, tuple[ModelConfig, int]]:
  """Name -> (model, rows of a step)."""
  byte = dict(dim=256, num_layers=3, head_dim=64, window=256, capacity=1024)
  deep = dict(dim=512, num_layers=6, head_dim=64, window=1024)
  words = dict(dim=384, num_layers=3, head_dim=64, window=512, capacity=256)
  quickstart = config_lib.parse_flags(["--config=configs/quickstart.py"])
  large = {
    name: config_lib.parse_flags([f"--config=configs/{name}.py"]).model
    for name in PAPER_BYTES_PER_SECOND
  }
  return {
    "quickstart": (quickstart.model, quickstart.train.batch_size),
    **{name: (model, 16) for name, model in large.items()},
    "R2": (
      ModelConfig(
        stages=(StageConfig(**byte), StageConfig(**deep, capacity=256)),
        dtype="float32",
      ),
      4,
    ),
    "R3": (
      ModelConfig(
        stages=(
          StageConfig(**byte),
          StageConfig(**words),
          StageConfig(**deep, capacity=160),
        ),
        dtype="float32",
      ),
      4,
    ),
  }


def random_batch(model: ModelConfig, num_rows: int) -> dict[str, np.ndarray]:
  """Full rows: every stage holds exactly its capacity."""
  rng = np.random.default_rng(0)
  L = model.capacities[0]
  levels_BL = np.zeros((num_rows, L), np.int32)
  for row in levels_BL:
    positions = np.arange(1, L)
    for level, capacity in enumerate(model.capacities[1:], start=1):
      positions = rng.choice(positions, capacity - 1, replace=False)
      row[positions] = level
    row[0] = model.num_stages - 1
  bytes_BL = rng.integers(32, 127, (num_rows, L), dtype=np.int32)
  ones_BL = np.ones((num_rows, L), np.int32)
  return dict.fromkeys(packing.field_names(), ones_BL) | {
    "bytes": bytes_BL,
    "targets": np.roll(bytes_BL, -1, axis=1),
    "levels": levels_BL,
  }


def fits(compiled, device) -> bool:
  """Whether a program's memory is there; unknown (CPU) counts as yes."""
  limit = (device.memory_stats() or {}).get("bytes_limit")
  sizes = compiled.memory_analysis()
  total = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
  total += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return limit is None or total <= limit


def prepare(model: ModelConfig, num_rows: int):
  """The compiled step, its config and a batch; the state is not made yet."""
  config = Config(model=model)
  tx = optimizer.make_optimizer(config)
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=1), jax.devices()[:1])
  abstract, shardings = state.abstract_state(model, tx, mesh)
  batch = jax.device_put(
    random_batch(model, num_rows), sharding.batch_sharding(mesh)
  )
  step = compile_step(config, tx, mesh, shardings, abstract, batch)
  return step, functools.partial(state.create_state, model, tx, mesh, 0), batch


def peak_gib() -> float:
  """Most memory this process has had, models before included."""
  size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return size / 2 ** (30 if sys.platform == "darwin" else 20)


def time_steps(
  model: ModelConfig, num_rows: int, repeats: int, profiled: bool
) -> dict:
  """Times whole steps; halves the rows until the step's memory is there."""
  while True:
    began = time.perf_counter()
    step, create, batch = prepare(model, num_rows)
    compile_seconds = time.perf_counter() - began
    if fits(step, jax.devices()[0]):
      break
    if num_rows == 1:
      raise SystemExit("error: one row does not fit in the device's memory.")
    num_rows //= 2
  train_state = create()
  times = []
  for _ in range(repeats + 1):  # the first one warms up
    began = time.perf_counter()
    train_state, step_metrics = step(train_state, batch)
    jax.block_until_ready((train_state, step_metrics))
    times.append(time.perf_counter() - began)
  median = float(np.median(times[1:]))
  num_bytes = num_rows * model.capacities[0]
  platform = jax.default_backend()
  useful = num_rows * counts.useful_train_flops(model, model.capacities)
  padded = num_rows * counts.train_flops_per_row(model, num_rows, platform)
  result = {
    "parameters": sum(x.size for x in jax.tree.leaves(train_state.params)),
    "param_dtype": model.param_dtype,
    "dtype": model.dtype,
    "attention": attention.check(model.stages, platform),
    "rows": num_rows,
    "capacities": model.capacities,
    "compile_seconds": compile_seconds,
    "step_seconds_median": median,
    "step_seconds_best": min(times[1:]),
    "steps": len(times),
    "steps_not_finite": int(train_state.nonfinite_total),
    "bytes_per_second": num_bytes / median,
    "useful_flops_per_second": useful / median,
    "padded_flops_per_second": padded / median,
    "process_peak_gib": peak_gib(),
    "program_gib": step.memory_analysis().temp_size_in_bytes / 2**30,
  }
  if profiled:

    def run():
      state_now = train_state
      for _ in range(2):
        state_now, step_metrics = step(state_now, batch)
      jax.block_until_ready((state_now, step_metrics))

    result["where_time_goes"] = where_time_goes.profile(step, run)
  return result


def with_kernels(model: ModelConfig, args) -> ModelConfig:
  """The model as the flags ask."""
  if args.attention is not None:
    model = model.with_attention(args.attention)
  if args.remat is not None:
    stages = [dataclasses.replace(s, remat=args.remat) for s in model.stages]
    model = dataclasses.replace(model, stages=tuple(stages))
  # float32 parameters, gradients and two moments take 16 bytes a parameter;
  # compiled for an H100, aunet4_1b needs 19.4 for a step of one row.
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf)
  if 20 * counts.num_parameters(model) > limit:
    model = dataclasses.replace(model, param_dtype="bfloat16")
    print("parameters in bfloat16: float32 ones do not fit one device")
  return model


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", default="quickstart,R2,R3")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--rows", type=int, help="of a step; halved till it fits")
  parser.add_argument("--attention", choices=config_lib.ATTENTIONS)
  parser.add_argument("--remat", choices=config_lib.REMATS)
  parser.add_argument("--profile", action="store_true")
  args = parser.parse_args()
  known = models()
  for name in args.models.split(","):
    if name not in known:
      parser.error(f"unknown model {name!r}; known: {', '.join(known)}")
  results = {}
  for name in args.models.split(","):
    model, num_rows = known[name]
    model = with_kernels(model, args)
    ceiling = measure.matmul_flops(model.dtype)
    result = time_steps(
      model, args.rows or num_rows, args.repeats, args.profile
    )
    results[name] = result
    result["matmul_flops_per_second"] = ceiling
    result["useful_mfu"] = result["useful_flops_per_second"] / ceiling
    line = (
      f"{name}: {result['bytes_per_second']:,.0f} bytes/s in steps of "
      f"{result['rows']} rows, useful MFU {result['useful_mfu']:.1%} of the "
      f"matmul ceiling {ceiling / 1e12:.2f} TFLOP/s"
    )
    peak = devices.peak_flops(jax.devices()[0])
    if peak:
      result["useful_mfu_of_data_sheet"] = (
        result["useful_flops_per_second"] / peak
      )
    if name in PAPER_BYTES_PER_SECOND:
      ratio = result["bytes_per_second"] / PAPER_BYTES_PER_SECOND[name]
      result["ratio_to_paper_h100"] = ratio
      line += f", {ratio:.2f}x the paper's per H100"
    print(line, flush=True)
    for part, share in result.get("where_time_goes", {}).items():
      print(f"  {share:6.1%}  {part}", flush=True)
  broken = [name for name in results if results[name]["steps_not_finite"]]
  if broken:
    print(f"steps were not finite: {', '.join(broken)}", file=sys.stderr)
  print(json.dumps({**measure.machine("train"), "models": results}))
  return 1 if broken else 0


if __name__ == "__main__":
  sys.exit(main())
