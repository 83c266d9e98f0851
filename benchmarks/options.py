"""What each option brings to one small model, at equal compute and equal time.

  python -m benchmarks.options --train=novels/train --heldout=novels/heldout \\
      --output=runs/options

The model is AU-Net 2 at one size of benchmarks.recipes, with Muon, and each of
OPTIONS alone. First the steps of all are timed, a step of each in turn, so that
whatever else the machine does is shared. Then every option trains --seeds times
for the useful FLOPs that the plain model spends in --steps steps, and, where
its step takes TOLERANCE longer or shorter, again for the seconds that these
take. Gains are differences to the plain model of the same seed (which reads the
same text in the same order), with 95% intervals of their mean by Student's t.

A run that is done is only read: the command goes on where it was cut off. The
last line is JSON; table.md is beside it.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from aunet_jax import config as config_lib
from aunet_jax.aunet import counts
from aunet_jax.config import Config
from aunet_jax.files import write_whole
from aunet_jax.workdir import layout
from benchmarks import compare_models, recipes

MODEL, RATE = "aunet2/1", 0.016  # Muon's rate without n-grams
PLAIN = "none"
OPTIONS = {
  PLAIN: (),
  "ngrams": ("model.ngram_rows=4096",),
  "conv": ("model.stages[0].conv=4",),
  "qk_norm": ("model.stages[0].qk_norm=True", "model.stages[1].qk_norm=True"),
  "logit_cap": ("model.logit_cap=30.0",),
  "tied": ("model.tie_embeddings=True",),
  "zero_head": ("model.zero_head=True",),
  "average": ("optimizer.average=0.99",),
  "heads": ("model.heads=4",),
}
ROUNDS = 60  # of steps in turn, after one that warms up
TOLERANCE = 0.03  # of a step's time


class Cost(NamedTuple):
  """Of a step, over the plain model's."""

  flops: float
  seconds: float


def settings(option: str) -> list[str]:
  return [
    "--config.optimizer.name=muon",
    f"--config.optimizer.learning_rate={RATE}",
    *(f"--config.{setting}" for setting in OPTIONS[option]),
  ]


def configs(names: list[str]) -> dict[str, Config]:
  return {
    name: config_lib.parse_flags(
      [f"--config={recipes.__file__}:{MODEL}", *settings(name)]
    )
    for name in names
  }


def flops(config: Config) -> float:
  """Useful FLOPs of a step whose rows are full."""
  model, rows = config.model, config.train.batch_size
  return counts.useful_train_flops(model, model.capacities) * rows


def time_steps(named: dict[str, Config]) -> dict[str, float]:
  """Median over rounds of a step's time over the plain model's, by option."""
  import jax

  from aunet_jax.aunet import sharding
  from aunet_jax.train import optimizer, state
  from aunet_jax.train.step import compile_step
  from benchmarks.train import random_batch

  mesh = sharding.make_mesh(config_lib.MeshConfig(data=1), jax.devices()[:1])
  running = {}
  for name, config in named.items():
    tx = optimizer.make_optimizer(config)
    abstract, shardings = state.abstract_state(config.model, tx, mesh)
    batch = jax.device_put(
      random_batch(config.model, config.train.batch_size),
      sharding.batch_sharding(mesh),
    )
    step = compile_step(config, tx, mesh, shardings, abstract, batch)
    first = state.create_state(config.model, tx, mesh, 0)
    running[name] = [step, first, batch]
    print(f"{name}: compiled", flush=True)
  ratios = {name: [] for name in named}
  for number in range(ROUNDS + 1):
    taken = {}
    for name, one in running.items():
      step, before, batch = one
      began = time.perf_counter()
      one[1], _ = jax.block_until_ready(step(before, batch))
      taken[name] = time.perf_counter() - began
    for name in named:
      if number:
        ratios[name].append(taken[name] / taken[PLAIN])
  return {name: statistics.median(found) for name, found in ratios.items()}


def costs(output: Path, names: list[str]) -> dict[str, Cost]:
  """Measured once: all runs of a folder have the steps of one measurement."""
  path = output / "costs.json"
  found = json.loads(path.read_text()) if path.exists() else {}
  if not set(names) <= set(found):
    named = configs(names)
    measured = time_steps(named)
    found = {
      name: [flops(config) / flops(named[PLAIN]), measured[name]]
      for name, config in named.items()
    }
    write_whole(path, json.dumps(found))
  return {name: Cost(*found[name]) for name in names}


def equal_steps(plain_steps: int, cost: Cost) -> dict[str, int]:
  """For the FLOPs and for the time of so many steps of the plain model."""
  by_flops = round(plain_steps / cost.flops)
  by_time = round(plain_steps / cost.seconds)
  if abs(by_time - by_flops) <= TOLERANCE * by_flops:
    by_time = by_flops  # one run is both
  return {"flops": by_flops, "time": by_time}


def run(args, parts, option: str, steps: int, seed: int) -> float:
  """Held-out bits per byte at the end of so many steps."""
  workdir = args.output / f"{option}-{steps}-{seed}"
  compare_models.train(
    parts, workdir,
    f"--config={recipes.__file__}:{MODEL}", *settings(option),
    f"--config.data.train={args.train}",
    f"--config.data.heldout={args.heldout}",
    f"--config.data.cache_dir={args.output}/index",
    f"--config.seed={seed}", f"--config.train.num_steps={steps}",
    f"--config.train.eval_every_steps={steps}",
    f"--config.checkpoint.every_steps={steps}",
    f"--config.optimizer.warmup_steps={steps // 20}",
  )  # fmt: skip
  rows = layout.read_rows(workdir / layout.METRICS_FILE)
  return [
    row["heldout_bits_per_byte"] for row in rows
    if "heldout_bits_per_byte" in row
  ][-1]  # fmt: skip


def measure(args: argparse.Namespace) -> dict:
  parts = compare_models.Parts(args.output)
  known = costs(args.output, args.options)
  steps = {name: equal_steps(args.steps, c) for name, c in known.items()}
  bits = {}
  for seed in range(args.seeds):
    for option in known:
      for equal in ("flops", "time"):
        of = bits.setdefault((option, equal), [])
        of.append(run(args, parts, option, steps[option][equal], seed))
  cells = []
  for option, cost in known.items():
    cell = {"option": option, "step": cost._asdict(), "steps": steps[option]}
    for equal in ("flops", "time"):
      own, plain = bits[option, equal], bits[PLAIN, equal]
      gains = [p - o for o, p in zip(own, plain, strict=True)]
      cell[f"equal_{equal}"] = {
        "bits": recipes.mean_interval(own),
        "gain": recipes.mean_interval(gains),
      }
    cells.append(cell)
  return {"model": MODEL, "rate": RATE, "seeds": args.seeds, "cells": cells}


def shown(result: dict) -> str:
  """Markdown: a row an option."""
  lines = [
    "| option | time of a step | FLOPs | bits, equal FLOPs | gain "
    "| bits, equal time | gain |",
    "|---|---|---|---|---|---|---|",
  ]
  for cell in result["cells"]:
    row = [f"{cell['step']['seconds']:.2f}", f"{cell['step']['flops']:.2f}"]
    for equal in ("equal_flops", "equal_time"):
      of = cell[equal]
      gain = recipes.with_interval(of["gain"])
      row += [f"{of['bits']['mean']:.3f}", gain]
    lines.append(f"| `{cell['option']}` | {' | '.join(row)} |")
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--train", type=lambda x: Path(x).absolute(), required=True)
  add("--heldout", type=lambda x: Path(x).absolute(), required=True)
  add("--output", type=lambda x: Path(x).absolute(), required=True)
  add("--options", type=lambda x: x.split(","), default=list(OPTIONS),
      help=f"some of {','.join(OPTIONS)}")  # fmt: skip
  add("--steps", type=int, default=440, help="of the plain model (440)")
  add("--seeds", type=int, default=3, help="default: %(default)s")
  args = parser.parse_args(argv)
  for name in args.options:
    if name not in OPTIONS:
      parser.error(f"{name!r} is none of {', '.join(OPTIONS)}")
  if args.steps < 20 or args.seeds < 1:
    parser.error("--steps from 20, --seeds from 1")
  args.options = list(dict.fromkeys([PLAIN, *args.options]))
  args.output.mkdir(parents=True, exist_ok=True)
  result = measure(args)
  given = sys.argv[1:] if argv is None else argv
  result["command"] = shlex.join(["python", "-m", "benchmarks.options", *given])
  (args.output / "table.md").write_text(shown(result) + "\n")
  print(shown(result))
  print(json.dumps(result))


if __name__ == "__main__":
  main()
