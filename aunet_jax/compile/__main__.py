"""Compiles a run's programs ahead of time, for hardware you need not have.

  python -m aunet_jax.compile --config=configs/aunet2_1b.py \\
      --topology=v5e:8x8 --config.mesh.fsdp=8

Nothing runs and no accelerator is needed: the compiler is told which chips to
compile for. Its output says whether the run fits their memory, what the chips
send each other, and whether that is what the mesh should cost.

  --topology=v5e:4x4     TPU slices: v4, v5e, v5p, v6e, tpu7x and the chips
                         along each side (needs pip install -e '.[tpu]')
  --topology=h100:8      one host of NVIDIA H100 (needs '.[cuda]')
  no --topology          the devices of this machine

--time predicts each program's time by stage, part and pass, from the TPU
compiler's estimates (for other devices from a roofline); --picture draws it.
--profile shows the times that a run on real devices recorded beside it:

  python -m aunet_jax.compile --config=runs/mine/config.json --time \\
      --profile=runs/mine

--compare shows what changed between two outputs of --time --json:

  python -m aunet_jax.compile --compare before.json after.json

Exit status: 0 compiled and fits, 1 does not fit, 2 bad input.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from aunet_jax import config as config_lib
from aunet_jax import files, terminal
from aunet_jax.aunet import kernels, sharding
from aunet_jax.compile import measured, picture, programs, step_time
from aunet_jax.compile.report import profiled, report, table
from aunet_jax.train import setup


def _versions() -> dict[str, str]:
  found = {}
  for name in ("jax", "jaxlib", "libtpu"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


@terminal.command
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.compile",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="--config=FILE and --config.a.b=VALUE choose and edit the config.",
    allow_abbrev=False,
  )
  parser.add_argument("--topology", metavar="KIND:SIZE")
  parser.add_argument(
    "--slices", type=int, default=1, help="slices of that topology"
  )
  parser.add_argument(
    "--what", choices=("train", "decode", "both"), default="train"
  )
  parser.add_argument(
    "--rows", type=int, default=8, help="rows that decode together (default 8)"
  )
  parser.add_argument(
    "--bytes",
    type=int,
    help="bytes those rows have already (default: a whole row)",
  )
  parser.add_argument(
    "--check",
    action="store_true",
    help="compare FLOPs with XLA's count, from small unrolled programs",
  )
  parser.add_argument(
    "--time", action="store_true", help="predict the time, by part"
  )
  parser.add_argument(
    "--profile",
    metavar="WORKDIR",
    help="show the measured time of a training step by part instead, from a "
    "recording of aunet_jax.train --profile (a workdir or an .xplane.pb file); "
    "with --time beside the prediction for the program that ran",
  )
  parser.add_argument(
    "--picture",
    metavar="FILE",
    help="draw the times of --time as bars (.svg, .png, .pdf)",
  )
  parser.add_argument(
    "--compare",
    nargs=2,
    metavar="FILE",
    help="two files whose last line is the JSON of --time",
  )
  parser.add_argument(
    "--json", action="store_true", help="the last line is one JSON object"
  )
  args, rest = parser.parse_known_args(argv)
  argv = sys.argv[1:] if argv is None else argv
  if args.compare is not None:
    print(step_time.compare(*args.compare))
    return 0
  for name in ("slices", "rows", "bytes"):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name}={value} must be a positive number.")
  if args.profile is not None:
    profile = files.local(args.profile, "--profile")
    if args.what != "train" or args.check or args.picture is not None:
      raise ValueError(
        "--profile is of a training step and shows its times alone: leave out "
        "--what, --check and --picture."
      )
    measured.find(profile)
  if args.picture is not None:
    if not args.time:
      raise ValueError("--picture draws what --time predicts: give both.")
    if not args.picture.endswith((".svg", ".png", ".pdf")):
      raise ValueError(
        f"--picture={args.picture} must end in .svg, .png or .pdf."
      )
    if not Path(args.picture).absolute().parent.is_dir():
      raise ValueError(
        f"--picture={args.picture}: there is no such directory; make it, or "
        f"name another."
      )
  config = config_lib.parse_flags(rest)
  if args.topology is not None:
    programs.compile_elsewhere(args.topology)
  devices = programs.topology_devices(args.topology, args.slices)
  mesh = sharding.make_mesh(config.mesh, devices)
  setup.check_batch(config, mesh)
  setup.check_width(config, mesh)
  about = {
    "command": shlex.join(["python", "-m", "aunet_jax.compile", *argv]),
    "versions": _versions(),
    "topology": args.topology,
    "slices": args.slices,
  }
  if args.topology is None:  # what training here would run
    model, _ = kernels.resolve(config.model, mesh, say=say)
    config = dataclasses.replace(config, model=model)
  if args.profile is not None:
    program = profiled(config, mesh, profile, time_parts=args.time, say=say)
    print("\n".join(measured.lines(program["measured"], program.get("time"))))
    if args.json:
      print(json.dumps({**about, "programs": {"train": program}}))
    return 0
  result = {
    **about,
    **report(
      config,
      mesh,
      what=("train", "decode") if args.what == "both" else (args.what,),
      decode_rows=args.rows,
      decode_bytes=args.bytes,
      check=args.check,
      time_parts=args.time,
      say=say,
    ),
  }
  print(table(result))
  if args.picture is not None:
    times = {
      name: program["time"]
      for name, program in result["programs"].items()
      if "time" in program
    }
    if times:
      picture.draw(times, args.picture)
      print(f"picture: {args.picture}")
  if not result["fits"]:
    print("error: does not fit; see above what to try.", file=sys.stderr)
  if args.json:
    print(json.dumps(result))
  return 0 if result["fits"] else terminal.EXIT_FAILED


if __name__ == "__main__":
  sys.exit(main())
