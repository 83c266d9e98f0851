"""Scaling-law studies: plan runs at equal compute, run, fit, plot.

  # show the plan; nothing is written
  python -m aunet_jax.scaling plan --models=byte,aunet2,aunet3 \\
      --budgets=1e19,2e19,4e19

  # plan a study of your text, three seeds per size, into a directory
  python -m aunet_jax.scaling plan runs/study --models=byte,aunet2,stride@4 \\
      --budgets=1e13,3e13,1e14 --ratio=0.5 --seeds=0,1,2 --row_bytes=1024 \\
      --data=books/train --heldout=books/heldout --set=model.dtype=float32

  # an IsoFLOP grid: at each budget, models of several sizes
  python -m aunet_jax.scaling plan runs/grid --models=aunet2 \\
      --budgets=1e18,1e19 --sizes=0.5,0.7,1,1.4,2 --data=books/train

  # a sweep of batch and learning rate at one budget, for laws of your own
  python -m aunet_jax.scaling plan runs/sweep --models=aunet2 --budgets=1e14 \\
      --batch_bytes=8e3,16e3 --learning_rates=0.002,0.004,0.008 --data=books

  # run or continue it, two cells at a time; or print a command for each cell
  python -m aunet_jax.scaling run runs/study --jobs=2
  python -m aunet_jax.scaling run runs/study --print

  # fit scaling laws to the results, with intervals and warnings
  python -m aunet_jax.scaling fit runs/study

  # figures and a one-file report; reads anything that fit reads
  python -m aunet_jax.scaling plot runs/study --out=runs/study/report

  # sweep any setting of one config: plans, runs and draws it
  python -m aunet_jax.scaling hp --config=configs/quickstart.py \\
      --set=optimizer.learning_rate=3e-3,6e-3,12e-3 --seeds=3 --study=runs/lr

  # do activations keep their size when a model gets wider?
  python -m aunet_jax.scaling coords --widths=64,128,256 --output=coords.svg

`run` continues an interrupted run from its checkpoint and never repeats a
finished cell. docs/scaling.md explains what is compared, and how.
"""

import argparse
import importlib.metadata
import os
import platform
import shlex
import sys

import jax

from aunet_jax import config as config_lib
from aunet_jax import terminal
from aunet_jax.data import sources
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.scaling import (
  analysis,
  arguments,
  collect,
  coords,
  report,
  study,
  summary,
  sweep,
)
from aunet_jax.scaling import plan as plan_lib
from aunet_jax.scaling import run as run_lib
from aunet_jax.scaling.sample import Sample
from aunet_jax.train import step

# ----- plan -----------------------------------------------------------------


def _check_positive(args: argparse.Namespace, *names: str) -> None:
  for name in names:
    value = getattr(args, name)
    if value is not None and not 0 < value < float("inf"):
      raise ValueError(f"--{name}={value} must be above 0.")


def _show(args: argparse.Namespace, planned) -> float | None:
  """Prints cells and cost; returns the FLOPs a second of the machine."""
  speed = args.flops_per_second
  if args.calibrate:
    by_cost = sorted(planned, key=lambda one: one.run.padded_flops)
    run, config = by_cost[len(by_cost) // 2]
    print(f"measuring a step of {run.id} …", file=sys.stderr, flush=True)
    speed = step.measure_flops_per_second(config)
    print(f"measured {speed:.3g} padded FLOPs a second on {run.id}")
  print(plan_lib.show([run for run, _ in planned], speed, args.price_per_hour))
  return speed


def _about(**fields) -> study.About:
  return study.About(
    command=shlex.join(["python", "-m", "aunet_jax.scaling", *sys.argv[1:]]),
    versions={
      "python": platform.python_version(),
      "jax": jax.__version__,
      "aunet_jax": importlib.metadata.version("aunet_jax"),
    },
    **fields,
  )


def plan(args: argparse.Namespace) -> None:
  """Shows a plan; writes it where a directory is given."""
  _check_positive(args, "ratio", "flops_per_second", "price_per_hour")
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
  grid = plan_lib.Grid(
    models=args.models.split(","),
    budgets=args.budgets,
    sizes=args.sizes,
    ratio=args.ratio,
    seeds=args.seeds,
    single_seed_above=args.single_seed_above,
    batch_bytes=args.batch_bytes,
    learning_rates=args.learning_rates,
    own_laws={} if args.laws is None else plan_lib.read_laws(args.laws),
  )
  settings = plan_lib.Settings(
    data, sources.absolute(args.heldout), tuple(args.set)
  )
  planned = plan_lib.make_runs(grid, sample, settings.apply)
  speed = _show(args, planned)
  for line in plan_lib.warnings_of(grid):
    print(f"warning: {line}")
  if args.study is None:
    return
  about = _about(
    data=data,
    data_fingerprint=sample.fingerprint,
    tokenizer=None if tokenizer is None else tokenizer.path,
    ratio=args.ratio,
    flops_per_second=speed,
    cells=tuple(run.id for run, _ in planned),
  )
  plan_lib.write(args.study, planned, about)
  print(f"wrote {args.study}: python -m aunet_jax.scaling run {args.study}")


# ----- run ------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
  """Exit status: 0 all done, 1 some failed, EXIT_STOPPED some are left."""
  flags = ["--trust_rules"] if args.trust_rules else []
  if args.print:
    only = [part for part in args.only.split(",") if part]
    for one in study.read_study(args.study)[1]:
      state = study.read_state(args.study / one.run).state
      if run_lib.matches(one, only) and state != "done":
        print(shlex.join([*run_lib.command(one, args.study), *flags]))
    return 0
  return _run(args, flags)


def _run(args: argparse.Namespace, flags: list[str]) -> int:
  _check_positive(args, "minutes")
  result = run_lib.run(
    args.study,
    jobs=args.jobs,
    only=[part for part in args.only.split(",") if part],
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


# ----- one config: a sweep, a check of widths -------------------------------


def hp(args: argparse.Namespace, rest: list[str]) -> int:
  """Plans a sweep, runs what of it is left, and shows it; status as `run`."""
  _check_positive(args, "minutes", "flops_per_second", "price_per_hour")
  config = config_lib.parse_flags(rest)
  axes = sweep.parse_axes(args.set, args.case)
  cells = sweep.make_cells(config, axes, args.seeds)
  speed = _show(args, cells.planned)
  if args.study is None or args.dry_run:
    print("nothing was written; --study=DIR, without --dry-run, runs it.")
    return 0
  sweep.write(args.study, cells, _about(cells=(), flops_per_second=speed))
  status = _run(args, ["--trust_rules"] if "--trust_rules" in rest else [])
  print(sweep.report(args.study))
  return status


def check_widths(args: argparse.Namespace, rest: list[str]) -> None:
  """The coordinate check: shows it, and writes its picture."""
  if args.output is not None and args.output.suffix != ".svg":
    raise ValueError(f"--output={args.output} must end with .svg.")
  if any(arg.partition("=")[0] == "--config" for arg in rest):
    config = config_lib.parse_flags(rest)
  else:
    other = [arg for arg in rest if not arg.startswith("--config.")]
    if other:
      raise ValueError(f"unknown arguments: {' '.join(other)}")
    config = config_lib.override(
      coords.small(), [arg.removeprefix("--config.") for arg in rest]
    )

  def say(line):
    print(line, file=sys.stderr, flush=True)

  result = coords.check(config, args.widths, args.steps, args.seeds, say)
  print(coords.as_json(result) if args.json else coords.show(result))
  if args.output is not None:
    coords.write(result, args.output)
    say(f"wrote {args.output}")


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
  parser = arguments.parser(__doc__)
  args, rest = parser.parse_known_args(argv)
  of_config = {"hp": hp, "coords": check_widths}
  if args.command in of_config:
    return of_config[args.command](args, rest)
  if rest:
    parser.error(f"unrecognized arguments: {' '.join(rest)}")
  if args.command == "run":
    return run(args)
  return fit(args) if args.command in arguments.FITTING else plan(args)


if __name__ == "__main__":
  sys.exit(main())
