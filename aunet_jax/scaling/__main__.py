"""Scaling-law studies: plan runs at equal compute, run them, fit, draw.

  # what would be run; nothing is written
  python -m aunet_jax.scaling plan --models=byte,aunet2,aunet3 \\
      --budgets=1e19,2e19,4e19

  # a study of files of text, three seeds a cell, written to a directory
  python -m aunet_jax.scaling plan runs/study --models=byte,aunet2,stride@4 \\
      --budgets=1e13,3e13,1e14 --ratio=0.5 --seeds=0,1,2 --row_bytes=1024 \\
      --data=books/train --heldout=books/heldout --set=model.dtype=float32

  # an IsoFLOP grid: at each budget, models of several sizes
  python -m aunet_jax.scaling plan runs/grid --models=aunet2 \\
      --budgets=1e18,1e19 --sizes=0.5,0.7,1,1.4,2 --data=books/train

  # batch and learning rate swept at one budget, to fit laws of one's own
  python -m aunet_jax.scaling hp runs/sweep --models=aunet2 --budgets=1e14 \\
      --batch_bytes=8e3,16e3 --learning_rates=0.002,0.004,0.008 --data=books

  # run or continue it, two cells at a time; or print a command for each cell
  python -m aunet_jax.scaling run runs/study --jobs=2
  python -m aunet_jax.scaling run runs/study --print

  # the laws behind what the runs reached, with intervals and warnings
  python -m aunet_jax.scaling fit runs/study

  # figures and a report of one file; anything that fit reads can be drawn
  python -m aunet_jax.scaling plot runs/study --out=runs/study/report

A run is continued from its checkpoint however it ended, and a cell that is done
is never run again. docs/scaling.md says what is compared, and how.
"""

import argparse
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import jax

from aunet_jax import terminal
from aunet_jax.data import sources
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.scaling import analysis, collect, laws, report, study, summary
from aunet_jax.scaling import plan as plan_lib
from aunet_jax.scaling import run as run_lib
from aunet_jax.scaling.sample import Sample
from aunet_jax.train import step


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


def _add_plan_arguments(parser, sweeps: bool) -> None:
  add = parser.add_argument
  add(
    "study",
    type=Path,
    nargs=None if sweeps else "?",
    help="directory to write"
    + ("" if sweeps else "; left out: only show the plan"),
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
  add("--heldout", help="text to compare on, as config.data.heldout")
  add("--tokenizer", help="tokenizer.json of bpe models")
  add(
    "--row_bytes",
    type=_positive,
    default=laws.CAPACITIES[0],
    help="bytes of a row, the same for all models (default 8192)",
  )
  law = "" if sweeps else " (default: the paper's law)"
  for name, text in (
    ("--batch_bytes", "bytes of a step"),
    ("--learning_rates", "one, or several to sweep"),
  ):
    add(name, type=_numbers, required=sweeps, default=[None], help=text + law)
  if not sweeps:
    add(
      "--sizes",
      type=_numbers,
      default=[1.0],
      help="IsoFLOP grid: FLOPs per byte over what the ratio asks for",
    )
    add(
      "--laws",
      metavar="FILE",
      help="laws of your own by model, JSON; docs/scaling.md shows one",
    )
  add(
    "--set",
    action="append",
    default=[],
    metavar="A.B=VALUE",
    help="a setting of every config; may be given again",
  )
  add(
    "--flops_per_second",
    type=float,
    help="padded FLOPs a second of the machine, for the time it will take",
  )
  add(
    "--calibrate",
    action="store_true",
    help="measure that here, on the middle cell",
  )
  add("--price_per_hour", type=float, help="of that machine, for the cost")


_FITTING = {
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


def _add_fit_arguments(parser, out_required: bool) -> None:
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
    help="leave out what a published table marks in its column `outlier`",
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.scaling",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest="command", required=True)

  def add(name, text):
    return commands.add_parser(name, help=text, allow_abbrev=False)

  text = "plan models x budgets x sizes x seeds"
  _add_plan_arguments(add("plan", text), sweeps=False)
  text = "plan a sweep of batch and learning rate"
  _add_plan_arguments(add("hp", text), sweeps=True)
  run = add("run", "run the cells of a study")
  run.add_argument("study", type=Path, help="a directory that plan has written")
  run.add_argument(
    "--jobs", type=_positive, default=1, help="cells at a time (default 1)"
  )
  run.add_argument(
    "--only", default="", metavar="PART,…", help="only ids with such a part"
  )
  run.add_argument("--retry", action="store_true", help="failed cells as well")
  run.add_argument(
    "--minutes",
    type=float,
    help="stop after so long; the next run goes on from there",
  )
  run.add_argument(
    "--print",
    action="store_true",
    help="only print a training command for every cell that is not done",
  )
  terminal.add_trust_rules(run)
  for name, (text, about) in _FITTING.items():
    _add_fit_arguments(
      commands.add_parser(
        name,
        help=text,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
      ),
      out_required=name == "plot",
    )
  return parser


# ----- plan -----------------------------------------------------------------


def plan(args: argparse.Namespace) -> None:
  """Shows a plan; writes it where a directory is given."""
  for name in ("ratio", "flops_per_second", "price_per_hour"):
    value = getattr(args, name)
    if value is not None and not 0 < value < float("inf"):
      raise ValueError(f"--{name}={value} must be above 0.")
  if args.study is not None and args.data is None:
    raise ValueError("--data is missing: name the text the study trains on.")
  data = sources.absolute(args.data)
  tokenizer = None
  if args.tokenizer is not None:
    tokenizer = Tokenizer(os.path.abspath(args.tokenizer))
  set_fields = dict(item.split("=", 1) for item in args.set if "=" in item)
  sample = Sample(
    data,
    args.row_bytes,
    tokenizer,
    set_fields.get("data.text_field", "text"),
    set_fields.get("data.separator"),
  )
  path = getattr(args, "laws", None)
  grid = plan_lib.Grid(
    models=args.models.split(","),
    budgets=args.budgets,
    sizes=getattr(args, "sizes", [1.0]),
    ratio=args.ratio,
    seeds=args.seeds,
    single_seed_above=args.single_seed_above,
    batch_bytes=args.batch_bytes,
    learning_rates=args.learning_rates,
    own_laws={} if path is None else plan_lib.read_laws(path),
  )
  settings = plan_lib.Settings(
    data, sources.absolute(args.heldout), tuple(args.set)
  )
  planned = plan_lib.make_runs(grid, sample, settings.apply)
  speed = args.flops_per_second
  if args.calibrate:
    by_cost = sorted(planned, key=lambda one: one.run.padded_flops)
    run, config = by_cost[len(by_cost) // 2]
    print(f"measuring a step of {run.id} …", file=sys.stderr, flush=True)
    speed = step.measure_flops_per_second(config)
    print(f"measured {speed:.3g} padded FLOPs a second on {run.id}")
  print(plan_lib.show([run for run, _ in planned], speed, args.price_per_hour))
  for line in plan_lib.warnings_of(grid):
    print(f"warning: {line}")
  if args.study is None:
    return
  about = study.About(
    command=shlex.join(["python", "-m", "aunet_jax.scaling", *sys.argv[1:]]),
    data=data,
    data_fingerprint=sample.fingerprint,
    tokenizer=None if tokenizer is None else tokenizer.path,
    ratio=args.ratio,
    flops_per_second=speed,
    versions={
      "python": platform.python_version(),
      "jax": jax.__version__,
      "aunet_jax": importlib.metadata.version("aunet_jax"),
    },
    cells=tuple(run.id for run, _ in planned),
  )
  plan_lib.write(args.study, planned, about)
  print(f"wrote {args.study}: python -m aunet_jax.scaling run {args.study}")


# ----- run ------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
  """Exit status: 0 all done, 1 some failed, EXIT_STOPPED some are left."""
  if args.minutes is not None and not args.minutes > 0:
    raise ValueError(f"--minutes={args.minutes} must be above 0.")
  only = [part for part in args.only.split(",") if part]
  flags = ["--trust_rules"] if args.trust_rules else []
  if args.print:
    for one in study.read_study(args.study)[1]:
      state = study.read_state(args.study / one.run).state
      if run_lib.matches(one, only) and state != "done":
        print(shlex.join([*run_lib.command(one, args.study), *flags]))
    return 0
  result = run_lib.run(
    args.study,
    jobs=args.jobs,
    only=only,
    retry=args.retry,
    seconds=None if args.minutes is None else 60 * args.minutes,
    flags=flags,
  )
  counted = ", ".join(f"{len(ids)} {name}" for name, ids in result.items())
  print(counted)
  if result["failed"]:
    print("--retry runs failed cells again; log.txt in a cell says why it did.")
    return terminal.EXIT_FAILED
  return terminal.EXIT_STOPPED if result["waiting"] else 0


# ----- fit and plot ---------------------------------------------------------


def fit(args: argparse.Namespace) -> None:
  """Fits a table; shows the fits; writes them, and draws them for `plot`."""
  options = analysis.Options(
    size=args.size,
    bootstrap=args.bootstrap,
    seed=args.seed,
    drop=tuple(part for part in args.drop.split(",") if part),
    drop_highest=args.drop_highest,
    drop_flagged=args.drop_flagged,
  )
  table = collect.load(args.source)
  result = analysis.analyse(table, options)
  print(summary.summary(result))
  if args.out is None:
    return
  args.out.mkdir(parents=True, exist_ok=True)
  study.write_table(table, args.out / study.NUMBERS_FILE)
  names = [study.NUMBERS_FILE]
  if args.command == "plot":
    names += report.write(table, result, args.out)
  else:
    report.write_fits(result, args.out)
    names.append(analysis.FITS_FILE)
  print(f"wrote {', '.join(names)} to {args.out}")


@terminal.command
def main(argv: list[str] | None = None) -> int | None:
  args = _parser().parse_args(argv)
  if args.command == "run":
    return run(args)
  return fit(args) if args.command in _FITTING else plan(args)


if __name__ == "__main__":
  sys.exit(main())
