"""Training speed: steady-state bytes per second of whole steps.

  python -m benchmarks.train                    quickstart, R2 and R3 on CPU
  python -m benchmarks.train --models=R2,R3     rows of 1024, batch 4

R2 and R3 are the two models the official code was timed with on a 2-core CPU
(float32, batch 4, rows of 1024: 1,374 eager and 1,639 compiled bytes/s for R2,
1,142 and 1,349 for R3; `reference_*` below). Machines differ, so a matmul
calibration of the same run stands beside every figure.

A step is forward, backward, clipping and AdamW on one device. Compile time is
apart. Row slots all hold text; every stage is filled to its capacity.

The last line of the output is one JSON object.
"""

import argparse
import json
import os
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax import config as config_lib
from aunet_jax import optimizer, sharding, state, train
from aunet_jax.config import Config, ModelConfig, StageConfig

REFERENCE_BYTES_PER_SECOND = {  # official code, eager and compiled
  "R2": (1374, 1639),
  "R3": (1142, 1349),
}


def models() -> dict[str, tuple[ModelConfig, int]]:
  """Name -> (model, rows of a step)."""
  byte = dict(dim=256, num_layers=3, head_dim=64, window=256, capacity=1024)
  deep = dict(dim=512, num_layers=6, head_dim=64, window=1024)
  words = dict(dim=384, num_layers=3, head_dim=64, window=512, capacity=256)
  quickstart = config_lib.parse_flags(["--config=configs/quickstart.py"])
  return {
    "quickstart": (quickstart.model, quickstart.train.batch_size),
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
  return {
    "bytes": bytes_BL,
    "targets": np.roll(bytes_BL, -1, axis=1),
    "levels": levels_BL,
    "documents": ones_BL,
    "weights": ones_BL,
  }


def matmul_gflops(size: int = 2048, repeats: int = 5) -> float:
  """Best of several float32 square products, in GFLOP/s."""
  x = jax.random.normal(jax.random.key(0), (size, size))
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - began)
  return 2 * size**3 / min(times) / 1e9


def time_steps(model: ModelConfig, num_rows: int, repeats: int) -> dict:
  config = Config(model=model)
  tx = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=1), jax.devices()[:1])
  train_state = state.create_state(model, tx, mesh, seed=0)
  _, shardings = state.abstract_state(model, tx, mesh)
  batch = jax.device_put(
    random_batch(model, num_rows), sharding.batch_sharding(mesh)
  )
  began = time.perf_counter()
  step = train.compile_step(config, tx, mesh, shardings, train_state, batch)
  compile_seconds = time.perf_counter() - began
  times = []
  for _ in range(repeats + 1):  # the first one warms up
    began = time.perf_counter()
    train_state, step_metrics = step(train_state, batch)
    jax.block_until_ready((train_state, step_metrics))
    times.append(time.perf_counter() - began)
  num_bytes = num_rows * model.capacities[0]
  return {
    "parameters": sum(x.size for x in jax.tree.leaves(train_state.params)),
    "rows": num_rows,
    "capacities": model.capacities,
    "compile_seconds": compile_seconds,
    "step_seconds_median": float(np.median(times[1:])),
    "step_seconds_best": min(times[1:]),
    "bytes_per_second": num_bytes / float(np.median(times[1:])),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", default="quickstart,R2,R3")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  known = models()
  for name in args.models.split(","):
    if name not in known:
      parser.error(f"unknown model {name!r}; known: {', '.join(known)}")
  before = matmul_gflops()
  results = {}
  for name in args.models.split(","):
    model, num_rows = known[name]
    result = results[name] = time_steps(model, num_rows, args.repeats)
    line = f"{name}: {result['bytes_per_second']:,.0f} bytes/s"
    if name in REFERENCE_BYTES_PER_SECOND:
      eager, compiled = REFERENCE_BYTES_PER_SECOND[name]
      result["reference_eager"], result["reference_compiled"] = eager, compiled
      ratio = result["bytes_per_second"] / compiled
      result["ratio_to_reference_compiled"] = ratio
      line += f", {ratio:.2f}x the official code's compiled {compiled:,}"
    print(line, flush=True)
  print(
    json.dumps(
      {
        "command": " ".join(["python -m benchmarks.train", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "jax": jax.__version__,
        "matmul_gflops_before": before,
        "matmul_gflops_after": matmul_gflops(),
        "models": results,
      }
    )
  )


if __name__ == "__main__":
  main()
