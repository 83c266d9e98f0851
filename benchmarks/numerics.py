"""Loss curves in bfloat16 and float32, and the noise between two seeds.

  python -m benchmarks.numerics

A small AU-Net 2 learns the text of Python's own manual, 200 steps, from the
same initial values on the same rows: once computed in float32 and once in
bfloat16 (parameters, norms, softmax, loss and optimizer are float32 in both),
and in float32 from another seed. What two precisions differ by has to be small
beside what two seeds differ by.

The last line of the output is one JSON object with the three curves.
"""

import argparse
import dataclasses
import json
import pydoc_data.topics

import jax
import numpy as np

from aunet_jax import config as config_lib
from aunet_jax.aunet import loss, sharding
from aunet_jax.config import BOS, Config, ModelConfig, StageConfig
from aunet_jax.data import packing
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import optimizer, state
from aunet_jax.train.step import compile_step
from benchmarks import measure

L, NUM_ROWS = 256, 4
MODEL = ModelConfig(
  stages=(
    StageConfig(dim=64, num_layers=1, head_dim=32, window=64, capacity=L),
    StageConfig(
      dim=128,
      num_layers=2,
      head_dim=32,
      window=None,
      capacity=128,
      rule="word@1",
    ),
  ),
  dtype="float32",
)


def batches(num_steps: int):
  """Rows of the manual, the same for every run; each starts a document."""
  text = "\n".join(pydoc_data.topics.topics.values()).encode()
  splitter = Splitter(MODEL.rules)
  rng = np.random.default_rng(0)
  ones_BL = np.ones((NUM_ROWS, L), np.int32)
  for _ in range(num_steps):
    starts = rng.integers(0, len(text) - L, NUM_ROWS)
    pieces = [text[start : start + L] for start in starts]
    targets_BL = np.stack([np.frombuffer(p, np.uint8) for p in pieces])
    bytes_BL = np.pad(targets_BL[:, :-1].astype(np.int32), ((0, 0), (1, 0)))
    bytes_BL[:, 0] = BOS
    levels_BL = np.stack([splitter.levels(piece) for piece in pieces])
    levels_BL = np.pad(levels_BL[:, :-1].astype(np.int32), ((0, 0), (1, 0)))
    levels_BL[:, 0] = MODEL.num_stages - 1
    assert (levels_BL > 0).sum(axis=1).max() <= MODEL.stages[1].capacity
    yield dict.fromkeys(packing.field_names(), ones_BL) | {
      "bytes": bytes_BL,
      "targets": targets_BL.astype(np.int32),
      "levels": levels_BL,
    }


def curve(dtype: str, seed: int, num_steps: int) -> list[float]:
  """Bits per byte of every step's rows, before the step."""
  model = dataclasses.replace(MODEL, dtype=dtype)
  config = Config(
    model=model,
    train=config_lib.TrainConfig(num_steps=num_steps, batch_size=NUM_ROWS),
    optimizer=config_lib.OptimizerConfig(
      learning_rate=4e-3, warmup_steps=20, clip_norm=1.0
    ),
  )
  tx = optimizer.make_optimizer(config)
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=1), jax.devices()[:1])
  train_state = state.create_state(model, tx, mesh, seed)
  _, shardings = state.abstract_state(model, tx, mesh)
  step, found = None, []
  for batch in batches(num_steps):
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    if step is None:
      step = compile_step(config, tx, mesh, shardings, train_state, batch)
    train_state, step_metrics = step(train_state, batch)
    found.append(step_metrics)
  return [
    loss.bits_per_byte(float(m["nats"]), int(m["bytes"]))
    for m in jax.device_get(found)
  ]


def compare(num_steps: int) -> dict:
  """The three curves, and mean absolute differences over the last half."""
  curves = {
    "float32": curve("float32", 0, num_steps),
    "bfloat16": curve("bfloat16", 0, num_steps),
    "float32_other_seed": curve("float32", 1, num_steps),
  }

  def difference(name):
    both = np.array([curves["float32"], curves[name]])[:, num_steps // 2 :]
    return float(np.abs(both[0] - both[1]).mean())

  return {
    "steps": num_steps,
    "last_half_mean_bits_per_byte": {
      name: float(np.mean(values[num_steps // 2 :]))
      for name, values in curves.items()
    },
    "difference_bfloat16": difference("bfloat16"),
    "difference_other_seed": difference("float32_other_seed"),
    "curves": {
      name: [round(value, 4) for value in values]
      for name, values in curves.items()
    },
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=200)
  args = parser.parse_args()
  result = compare(args.steps)
  print(
    f"bits per byte: bfloat16 differs by {result['difference_bfloat16']:.4f}, "
    f"another seed by {result['difference_other_seed']:.4f}"
  )
  print(json.dumps({**measure.machine("numerics"), **result}))


if __name__ == "__main__":
  main()
