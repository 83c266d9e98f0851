"""What the commands of `scaling` can be given, and what they say of it."""

import argparse
from pathlib import Path

from aunet_jax import terminal
from aunet_jax.scaling import analysis, laws
from aunet_jax.scaling import plan as plan_lib


def _numbers(text: str) -> list[float]:
  try:
    values = [float(part) for part in text.split(",")]
  except ValueError:
    values = []
  if not values or not all(0 < value < float("inf") for value in values):
    raise argparse.ArgumentTypeError(
      f"{text!r} must be numbers above 0, joined by commas"
    )
  return values


def _seeds(text: str) -> list[int]:
  parts = text.split(",")
  if not all(part.isascii() and part.isdigit() for part in parts):
    raise argparse.ArgumentTypeError(
      f"{text!r} must be whole numbers from 0, joined by commas"
    )
  return [int(part) for part in parts]


def _positive(text: str) -> int:
  if not (text.isascii() and text.isdigit() and int(text)):
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
  return int(text)


def _add_plan(parser) -> None:
  add = parser.add_argument
  add(
    "study",
    type=Path,
    nargs="?",
    help="directory to write; left out: only show the plan",
  )
  add("--models", required=True, help=plan_lib.MODELS + ", joined by commas")
  add(
    "--budgets",
    required=True,
    type=_numbers,
    help="training FLOPs without the output head, joined by commas",
  )
  add(
    "--ratio",
    type=float,
    default=laws.SCALING_RATIO,
    help="data-to-model ratio that sets sizes (default: the paper's 10)",
  )
  add("--seeds", type=_seeds, default=[0], help="joined by commas (default 0)")
  add(
    "--single_seed_above",
    type=float,
    default=float("inf"),
    metavar="FLOPS",
    help="budgets above it have only the first seed",
  )
  add("--data", help="text to train on, as config.data.train")
  add("--heldout", help="held-out text, as config.data.heldout")
  add("--tokenizer", help="tokenizer.json for bpe models")
  add(
    "--row_bytes",
    type=_positive,
    default=laws.CAPACITIES[0],
    help="bytes in a row, the same for all models (default 8192)",
  )
  for name, text in (
    ("--batch_bytes", "bytes of a step"),
    ("--learning_rates", "the peak of its schedule"),
  ):
    text += ", one or several to sweep (default: the paper's law)"
    add(name, type=_numbers, default=[None], help=text)
  add(
    "--sizes",
    type=_numbers,
    default=[1.0],
    help="IsoFLOP grid: factors of the FLOPs per byte that the ratio asks for",
  )
  add(
    "--laws",
    metavar="FILE",
    help="JSON of your own laws by model; docs/scaling.md shows one",
  )
  add(
    "--set",
    action="append",
    default=[],
    metavar="A.B=VALUE",
    help="a setting of every config; may be given again",
  )
  _add_cost(parser)


def _add_cost(parser) -> None:
  add = parser.add_argument
  add(
    "--flops_per_second",
    type=float,
    help="padded FLOPs per second of your machine, to estimate time",
  )
  add(
    "--calibrate",
    action="store_true",
    help="measure that here, on the middle cell",
  )
  add("--price_per_hour", type=float, help="of that machine, to estimate cost")


def _add_run(parser) -> None:
  add = parser.add_argument
  add("--jobs", type=_positive, default=1, help="cells at a time (default 1)")
  add(
    "--only",
    default="",
    metavar="PART,…",
    help="only cells whose id contains this",
  )
  add("--retry", action="store_true", help="also run failed cells again")
  add(
    "--minutes",
    type=float,
    help="stop after this time; the next run continues",
  )


def _add_run_command(parser) -> None:
  parser.add_argument(
    "study", type=Path, help="a directory that plan has written"
  )
  _add_run(parser)
  parser.add_argument(
    "--print",
    action="store_true",
    help="only print the training command of every cell that is not done",
  )
  terminal.add_trust_rules(parser)


_SWEEP = """Sweeps settings of one config and draws what came of it.

  # three rates, two optimizers, three seeds: what that is, and what it costs
  python -m aunet_jax.scaling hp --config=configs/quickstart.py \\
      --set=optimizer.learning_rate=3e-3,6e-3,12e-3 \\
      --set=optimizer.name=adamw,muon --seeds=3 \\
      --config.train.num_steps=400 --dry-run

  # run it; the same command again goes on after any interruption
  … --study=runs/lr

  # more values or seeds later: finished cells stay
  … --set=optimizer.learning_rate=1.5e-3,3e-3,6e-3,12e-3 --seeds=5 …

  # settings that go together, here with names
  python -m aunet_jax.scaling hp --config=configs/quickstart.py \\
      --set=optimizer.learning_rate=3e-3,6e-3 --study=runs/widths \\
      --case='narrow: model.stages[0].dim=64 model.stages[1].dim=128' \\
      --case='wide: model.stages[0].dim=128 model.stages[1].dim=256'

A cell is a training run: one value of every --set, one --case, one seed. The
directory then holds numbers.jsonl, a line a run, and sweep.svg: held-out bits
per byte by the first --set, a line for each combination of the others, with 95%
intervals of the mean over seeds. What diverged or failed is listed with its
reason, and is in no mean. Exit status: as of `run`."""


def _add_sweep(parser) -> None:
  add = parser.add_argument
  add(
    "--set",
    action="append",
    default=[],
    metavar="A.B=V1,V2",
    help="a setting and its values (joined by ; where a value has commas); "
    "given again: every combination",
  )
  add(
    "--case",
    action="append",
    default=[],
    metavar="'NAME: A=1 B=2'",
    help="settings that change together; each --case is one more value of a "
    "list",
  )
  add(
    "--seeds",
    type=_positive,
    default=1,
    help="seeds of every combination, from the config's on (default 1)",
  )
  add(
    "--study", type=Path, metavar="DIR", help="where to write; left out: show"
  )
  add("--dry-run", action="store_true", help="show cells and cost, run nothing")
  _add_run(parser)
  _add_cost(parser)


_COORDS = """Checks whether activations keep their size over widths.

  # AdamW, the small model that is made for it
  python -m aunet_jax.scaling coords --widths=64,128,256,512 \\
      --output=coords.svg

  # a config of yours, with Muon
  python -m aunet_jax.scaling coords --config=configs/quickstart.py \\
      --config.optimizer.name=muon --widths=96,192 --output=coords.svg

Every width of the byte stage, the other stages in proportion, trains for a
few steps on one batch, without `base_dim` and with the narrowest width as
it. Shown is mean |x| of what each part gives, and how far it has moved since
step 0; with a scaling that is right, both are flat over widths. docs/recipe.md
has results."""


def _widths(text: str) -> list[int]:
  parts = text.split(",")
  if not all(p.isascii() and p.isdigit() and int(p) for p in parts):
    raise argparse.ArgumentTypeError(
      f"{text!r} must be whole numbers from 1, joined by commas"
    )
  widths = sorted({int(part) for part in parts})
  if len(widths) < 2:
    raise argparse.ArgumentTypeError(f"{text!r}: give two widths or more")
  return widths


def _add_coords(parser) -> None:
  add = parser.add_argument
  add(
    "--widths",
    type=_widths,
    required=True,
    help="of the byte stage, joined by commas",
  )
  add("--steps", type=_positive, default=10, help="of training (default 10)")
  add("--seeds", type=_positive, default=1, help="to average (default 1)")
  add("--output", type=Path, metavar="FILE.svg", help="picture to write")
  add("--json", action="store_true", help="print all numbers as JSON")


FITTING = {
  "fit": (
    "fit scaling laws to what the runs reached",
    """Fits scaling laws to a study, with intervals, residuals and warnings.

  # a study directory; --out keeps the table (numbers.jsonl) and fits.json
  python -m aunet_jax.scaling fit runs/study --out=runs/study/report

  # the same from the table alone, wherever the runs are
  python -m aunet_jax.scaling fit runs/study/report/numbers.jsonl

  # published points; the five highest losses left out, and listed
  python -m aunet_jax.scaling fit chinchilla.csv --drop_highest=5

Per model: loss against compute where a budget has one size; where it has
several, IsoFLOP parabolas and L = E + A/N^alpha + B/D^beta, by the Huber loss
and by variable projection. A run that is unfinished, diverged, or of other
data or tokens is excluded with its reason. docs/scaling.md explains each.""",
  ),
  "plot": (
    "draw a study: figures and one HTML report",
    """Fits as `fit` does, and draws: PNG figures and report.html, one file that
needs no network and no JavaScript.

  python -m aunet_jax.scaling plot runs/study --out=runs/study/report

  # make a committed study's fits and figures again from its numbers
  python -m aunet_jax.scaling plot docs/study/numbers.jsonl --out=docs/study

The same numbers and options give the same numbers.jsonl, fits.json and
report.html, byte for byte.""",
  ),
}


def _add_fit(parser, out_required: bool) -> None:
  add = parser.add_argument
  add(
    "source",
    type=Path,
    help="a study directory, a numbers.jsonl, or a .csv of published points",
  )
  add(
    "--out",
    type=Path,
    required=out_required,
    metavar="DIR",
    help="where to write" + ("" if out_required else "; left out: only show"),
  )
  defaults = analysis.Options()
  add(
    "--size",
    choices=analysis.SIZES,
    help="what N counts (default: flops_per_byte where the table has it)",
  )
  add(
    "--bootstrap",
    type=_positive,
    default=defaults.bootstrap,
    help=f"refits behind an interval (default {defaults.bootstrap})",
  )
  add(
    "--seed",
    type=int,
    default=defaults.seed,
    help=f"of the resampling (default {defaults.seed})",
  )
  add(
    "--drop",
    default="",
    metavar="ID,…",
    help="runs to leave out of the fits; the report lists them",
  )
  add(
    "--drop_highest",
    type=int,
    default=0,
    metavar="N",
    help="leave out the N highest losses of every model, and list them",
  )
  add(
    "--drop_flagged",
    action="store_true",
    help="leave out points that a published table marks in its column "
    "`outlier`",
  )


def parser(description: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.scaling",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest="command", required=True)

  def add(name, text, about=None):
    return commands.add_parser(
      name,
      help=text,
      description=about,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  _add_plan(add("plan", "plan models x budgets x sizes x seeds"))
  _add_run_command(add("run", "run the cells of a study"))
  text = "sweep settings of one config: plan, run and draw"
  _add_sweep(add("hp", text, _SWEEP))
  text = "check that activations keep their size over widths"
  _add_coords(add("coords", text, _COORDS))
  for name, (text, about) in FITTING.items():
    _add_fit(add(name, text, about), out_required=name == "plot")
  return parser
