"""The paper's recipe and a modern one, over a ladder of four sizes.

  python -m benchmarks.recipes --train=novels/train --heldout=novels/heldout \\
      --tokenizer=tokenizer.json --output=runs/recipes

For AU-Net 2 and 3, flat bytes and BPE: four sizes, each with its own compute
(BUDGETS, useful FLOPs, the same for all four), and three recipes (RECIPES):
the paper's AdamW and cosine, Muon, and Muon with n-gram embeddings (bytes
only). The learning rate of each is the best of RATES at the second size, by its
first seed; all sizes use it.

It says how many of the paper's bytes a recipe needs for the paper's last
held-out figure: the step at which an evaluation is as low, over all steps. The
rate is then still high, so that a run which ends there would be lower: the
share is an upper bound. Intervals are 95% of the mean over seeds, by Student's
t. Every run is a process of its own and stays under --output: run again, the
command goes on. The last line is JSON; table.md and ladder.svg are beside it.
"""

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import ml_collections
from scipy import stats

from aunet_jax import config
from aunet_jax.aunet import counts
from aunet_jax.files import write_whole
from aunet_jax.scaling import draw
from aunet_jax.workdir import layout
from benchmarks import compare_models

ROW_BYTES, ROWS = 512, 4
BUDGETS = (1.25e11, 4.5e11, 1.25e12, 3e12)
SIZES = range(len(BUDGETS))
SWEPT_SIZE = 1
RATES = {
  "adamw": (4e-3, 8e-3, 16e-3, 32e-3),
  "muon": (4e-3, 8e-3, 16e-3, 32e-3),
}
RECIPES = {
  "paper": ("adamw", ()),
  "muon": ("muon", ()),
  "muon+ngrams": ("muon", ("model.ngram_rows=4096",)),
}
EVALUATIONS = 10
# Of English novels: what a word is with what follows it, and a token of 2,048.
WORD_BYTES, TOKEN_BYTES = 5.6, 2.85


# ----- the models -----------------------------------------------------------

# (dim, layers) of each stage, by size: about 0.5, 1, 1.6 and 2.4 MFLOPs a byte.
LADDERS = {
  "aunet2": (
    ((32, 1), (64, 1)), ((48, 1), (96, 2)),
    ((64, 1), (128, 2)), ((80, 1), (160, 3)),
  ),
  "aunet3": (
    ((32, 1), (48, 1), (64, 1)), ((48, 1), (64, 1), (96, 2)),
    ((64, 1), (96, 1), (128, 2)), ((80, 1), (112, 1), (160, 3)),
  ),
  "bytes": (((32, 2),), ((48, 3),), ((64, 3),), ((96, 3),)),
  "bpe": (((48, 2),), ((64, 4),), ((96, 4),), ((128, 3),)),
}  # fmt: skip


def get_config(argument: str) -> ml_collections.ConfigDict:
  """The config of MODEL/SIZE; this file is the config file of its runs."""
  name, _, size = argument.partition("/")
  # (window, capacity, rule) of every stage.
  kinds = {
    "bytes": [(128, ROW_BYTES, None)],
    "bpe": [(None, 184, None)],
  }.get(name, [(64, ROW_BYTES, None), (None, 112, "word@1"),
               (None, 64, "word@2")])  # fmt: skip
  c = config.default(
    stages=[
      config.stage(
        dim=dim, num_layers=num_layers, head_dim=16, window=window,
        capacity=capacity, rule=rule,
      )
      for (dim, num_layers), (window, capacity, rule) in zip(
        LADDERS[name][int(size)], kinds, strict=False
      )
    ]
  )  # fmt: skip
  if name == "bpe":
    c.model.vocab_size = compare_models.VOCABULARY + 2
  c.model.dtype = "float32"
  c.train.batch_size = ROWS
  c.train.num_steps = num_steps(name, int(size), c)
  c.train.eval_every_steps = max(1, c.train.num_steps // EVALUATIONS)
  c.train.sample_bytes = 0
  c.train.tensorboard = False
  c.train.log_every_steps = max(1, c.train.num_steps // 50)
  c.optimizer.warmup_steps = c.train.num_steps // 20
  c.optimizer.clip_norm = 1.0
  c.checkpoint.every_steps = c.train.num_steps
  return c


def num_steps(name: str, size: int, c: ml_collections.ConfigDict) -> int:
  """Steps that spend the budget, at the positions expected of a full row."""
  model = config.as_config(c, name).model
  units = ROW_BYTES / (TOKEN_BYTES if name == "bpe" else 1)
  words = ROW_BYTES / WORD_BYTES
  positions = [units, words, words / 2][: model.num_stages]
  step = counts.useful_train_flops(model, positions) * ROWS
  return round(BUDGETS[size] / step)


# ----- running --------------------------------------------------------------


class Outcome(NamedTuple):
  """What a run reached."""

  bits: float  # held-out bits per byte at its end
  curve: list[tuple[float, float]]  # share of the steps, held-out bits
  bytes: int  # read
  useful_flops: float


class Ladder:
  """Runs of one output folder; a run that is done is only read."""

  def __init__(self, args: argparse.Namespace):
    self.args = args
    self.parts = compare_models.Parts(args.output)

  def workdir(self, name, recipe, size, rate, seed) -> Path:
    return self.args.output / name / f"{recipe}-{size}-{rate:g}-{seed}"

  def run(self, name, recipe, size, rate, seed) -> Outcome:
    workdir = self.workdir(name, recipe, size, rate, seed)
    optimizer, settings = RECIPES[recipe]
    flags = [f"--config.{setting}" for setting in settings]
    if name == "bpe":
      flags.append(f"--config.data.tokenizer={self.args.tokenizer}")
    compare_models.train(
      self.parts, workdir,
      f"--config={__file__}:{name}/{size}",
      f"--config.data.train={self.args.train}",
      f"--config.data.heldout={self.args.heldout}",
      f"--config.data.cache_dir={self.args.output}/index",
      f"--config.optimizer.name={optimizer}",
      f"--config.optimizer.learning_rate={rate}",
      f"--config.seed={seed}", *flags,
    )  # fmt: skip
    return self.read(workdir)

  def read(self, workdir: Path) -> Outcome | None:
    """None where it has not finished."""
    if not (workdir / "finished").exists():
      return None
    rows = layout.read_rows(workdir / layout.METRICS_FILE)
    held = {
      row["step"]: row["heldout_bits_per_byte"]
      for row in rows if "heldout_bits_per_byte" in row
    }  # fmt: skip
    last = max(held)
    spent = compare_models.compute(workdir)
    curve = [(step / last, bits) for step, bits in sorted(held.items())]
    return Outcome(held[last], curve, spent["bytes"], spent["useful_flops"])

  def best_rate(self, name: str, recipe: str) -> float | None:
    """Of the sweep; None where it has not finished."""
    found = {}
    for rate in RATES[RECIPES[recipe][0]]:
      done = self.read(self.workdir(name, recipe, SWEPT_SIZE, rate, 0))
      if done is None:
        return None
      found[rate] = done.bits if math.isfinite(done.bits) else math.inf
    return min(found, key=found.get)


def arms(args: argparse.Namespace) -> list[tuple[str, str]]:
  """Every model with every recipe that it can have."""
  return [
    (name, recipe)
    for recipe, name in itertools.product(args.recipes, args.models)
    if name != "bpe" or not RECIPES[recipe][1]  # n-grams are of bytes
  ]


# ----- the table ------------------------------------------------------------


def share_needed(curve: list[tuple[float, float]], bits: float) -> float:
  """Of the steps until a curve is as low, evaluations joined by lines.

  Returns: above 1 (inf) where it never is.
  """
  before = None
  for share, value in curve:
    if value <= bits:
      if before is None:
        return share
      (s, v) = before
      return s + (share - s) * (v - bits) / (v - value)
    before = share, value
  return math.inf


def mean_interval(values: list[float]) -> dict:
  """Mean, and the half width of its 95% interval (None: one value)."""
  half = None
  if len(values) > 1 and all(map(math.isfinite, values)):
    half = float(
      stats.t.ppf(0.975, len(values) - 1)
      * statistics.stdev(values) / math.sqrt(len(values))
    )  # fmt: skip
  return {"mean": statistics.fmean(values), "half_width": half}


def collect(ladder: Ladder) -> dict:
  """Every cell that has finished; what they reached, and shares of bytes."""
  sweeps, cells = [], []
  for name, recipe in arms(ladder.args):
    for rate in RATES[RECIPES[recipe][0]]:
      done = ladder.read(ladder.workdir(name, recipe, SWEPT_SIZE, rate, 0))
      if done is not None:
        sweeps.append(
          {"model": name, "recipe": recipe, "rate": rate, "bits": done.bits}
        )
    rate = ladder.best_rate(name, recipe)
    paper_rate = ladder.best_rate(name, "paper")
    if rate is None:
      continue
    for size in SIZES:
      runs = [
        (
          ladder.read(ladder.workdir(name, recipe, size, rate, seed)),
          ladder.read(ladder.workdir(name, "paper", size, paper_rate, seed)),
        )
        for seed in range(ladder.args.seeds)
      ]
      runs = [(own, paper) for own, paper in runs if own and paper]
      if not runs:
        continue
      shares = [share_needed(own.curve, paper.bits) for own, paper in runs]
      cells.append(
        {
          "model": name, "recipe": recipe, "size": size, "rate": rate,
          "seeds": len(runs),
          "bits": mean_interval([own.bits for own, _ in runs]),
          "bytes": statistics.fmean(own.bytes for own, _ in runs),
          "useful_flops": statistics.fmean(o.useful_flops for o, _ in runs),
          "share_of_bytes": mean_interval(shares),
        }
      )  # fmt: skip
  return {"sweeps": sweeps, "cells": cells}


def with_interval(of: dict) -> str:
  half = "" if of["half_width"] is None else f" ± {of['half_width']:.3f}"
  return f"{of['mean']:.3f}{half}"


def shown(result: dict) -> str:
  """Markdown: a row a size and recipe, a column a model; then the sweep."""
  names = list(dict.fromkeys(cell["model"] for cell in result["cells"]))
  by = {
    (cell["model"], cell["recipe"], cell["size"]): cell
    for cell in result["cells"]
  }
  lines = []
  for title, key in (
    ("held-out bits per byte", "bits"),
    ("share of the paper's bytes", "share_of_bytes"),
  ):
    lines += [
      f"| {title}: useful FLOPs | recipe | {' | '.join(names)} |",
      "|---" * (len(names) + 2) + "|",
    ]
    for size, recipe in itertools.product(SIZES, RECIPES):
      if key == "share_of_bytes" and recipe == "paper":
        continue
      row = [by.get((name, recipe, size)) for name in names]
      if any(row):
        cells = [with_interval(cell[key]) if cell else "–" for cell in row]
        lines.append(
          f"| {BUDGETS[size]:.3g} | {recipe} | {' | '.join(cells)} |"
        )
    lines.append("")
  for optimizer, rates in RATES.items():
    lines += [
      f"| {optimizer}: rate | {' | '.join(f'{rate:g}' for rate in rates)} |",
      "|---" * (len(rates) + 1) + "|",
    ]
    found: dict[tuple, dict] = {}
    for one in result["sweeps"]:
      if RECIPES[one["recipe"]][0] == optimizer:
        arm = found.setdefault((one["model"], one["recipe"]), {})
        arm[one["rate"]] = one["bits"]
    for (name, recipe), arm in found.items():
      cells = [
        f"**{arm[r]:.3f}**" if arm.get(r) == min(arm.values())
        else f"{arm[r]:.3f}" if r in arm else "–" for r in rates
      ]  # fmt: skip
      lines.append(f"| {name}, {recipe} | {' | '.join(cells)} |")
    lines.append("")
  return "\n".join(lines)


def chart(result: dict) -> draw.Chart:
  """Bits by useful FLOPs: a colour a model, a dash a recipe."""
  series = []
  recipes, found = list(RECIPES), {}
  for cell in result["cells"]:
    found.setdefault((cell["model"], cell["recipe"]), []).append(cell)
  names = list(dict.fromkeys(name for name, _ in found))
  for (name, recipe), cells in found.items():
    x = [cell["useful_flops"] for cell in cells]
    y = [cell["bits"]["mean"] for cell in cells]
    half = [cell["bits"]["half_width"] or 0.0 for cell in cells]
    style, dash = names.index(name), recipes.index(recipe)
    series += [
      draw.Series(f"{name}, {recipe}", x, y, style, "line", dash=dash),
      draw.Series(
        None, x, y, style,
        low=[m - h for m, h in zip(y, half, strict=True)],
        high=[m + h for m, h in zip(y, half, strict=True)],
      ),
    ]  # fmt: skip
  return draw.Chart(
    "ladder", "Held-out bits per byte by useful FLOPs", "", "useful FLOPs",
    "held-out bits per byte", series,
  )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--train", type=lambda x: Path(x).absolute(), required=True)
  add("--heldout", type=lambda x: Path(x).absolute(), required=True)
  add("--tokenizer", type=lambda x: Path(x).absolute(), required=True)
  add("--output", type=lambda x: Path(x).absolute(), required=True)
  for flag, known in (("--models", LADDERS), ("--recipes", RECIPES)):
    add(flag, type=lambda x: x.split(","), default=list(known),
        help=f"some of {','.join(known)}")  # fmt: skip
  add("--seeds", type=int, default=3, help="default: %(default)s")
  add("--only_table", action="store_true", help="of what has finished")
  args = parser.parse_args(argv)
  for given, known in ((args.models, LADDERS), (args.recipes, RECIPES)):
    for name in given:
      if name not in known:
        parser.error(f"{name!r} is none of {', '.join(known)}")
  args.output.mkdir(parents=True, exist_ok=True)
  ladder = Ladder(args)
  if not args.only_table:
    for name, recipe in arms(args):
      for rate in RATES[RECIPES[recipe][0]]:
        ladder.run(name, recipe, SWEPT_SIZE, rate, 0)
    for seed, size in itertools.product(range(args.seeds), SIZES):
      for name, recipe in arms(args):
        rate = ladder.best_rate(name, recipe)
        ladder.run(name, recipe, size, rate, seed)
  result = collect(ladder)
  given = sys.argv[1:] if argv is None else argv
  result["command"] = shlex.join(["python", "-m", "benchmarks.recipes", *given])
  (args.output / "table.md").write_text(shown(result) + "\n")
  write_whole(args.output / "ladder.svg", draw.svg(chart(result)) + "\n")
  text = json.dumps(result)
  (args.output / "table.json").write_text(text)
  print(shown(result))
  print(text)


if __name__ == "__main__":
  main()
