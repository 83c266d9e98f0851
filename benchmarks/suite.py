"""All benchmarks of a machine, one after the other, into one JSON file.

  python -m benchmarks.suite --device=cpu    two cores, about five minutes
  python -m benchmarks.suite --device=gpu    one GPU, at most ten minutes

Each is a command of its own with a time limit; one that fails or runs out of
time is recorded as such and the rest goes on. `--device=cpu` needs
`pip install -e '.[bench]'`. On a GPU the attention kernels are checked before
anything is timed, and the 1B models train in bfloat16 with the fused kernel,
and with `xla` for comparison.

The file is `benchmarks/results/DEVICE-DATE-suite.json`; `--out` names another.
"""

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# name -> (seconds at most, arguments of `python -m benchmarks.NAME`)
PARTS = {
  "cpu": {
    "train": (150, "train --models=R2,R3 --repeats=3 --profile"),
    "attention": (40, "attention --shapes=R2"),
    "upsample": (40, "upsample --shapes=R2"),
    "decode": (60, "decode --model=R2 --batches=1 --baselines"),
    "splitting": (60, "splitting --rule=word@1"),
    "loader": (60, "loader --input=python --only=speed --workers=0"),
  },
  "gpu": {
    "attention": (60, "attention --shapes=aunet2_1b"),
    "attention_float32": (60, "attention --shapes=aunet2_1b --dtype=float32"),
    "upsample": (40, "upsample --shapes=aunet2_1b"),
    "train_aunet2": (
      110,
      "train --models=aunet2_1b --attention=triton --profile",
    ),
    "train_aunet2_xla": (70, "train --models=aunet2_1b --attention=xla"),
    "train_aunet3": (90, "train --models=aunet3_1b --attention=triton"),
    "train_aunet4": (90, "train --models=aunet4_1b --attention=triton"),
    "decode": (
      80,
      "decode --model=aunet2_1b --batches=1 --dtype=bfloat16 --repeats=1",
    ),
  },
}


def run(name: str, limit: int, arguments: str) -> dict:
  """The last line of a benchmark as a dict, or how it failed."""
  began = time.perf_counter()
  print(f"----- {name}: python -m benchmarks.{arguments}", flush=True)
  try:
    done = subprocess.run(
      [sys.executable, "-m", *shlex.split(f"benchmarks.{arguments}")],
      stdout=subprocess.PIPE,
      text=True,
      timeout=limit,
    )
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[:-1]), flush=True)
    result = json.loads(lines[-1]) if lines else {}
    if done.returncode:
      result["failed"] = f"exit status {done.returncode}"
  except subprocess.TimeoutExpired:
    result = {"failed": f"not done in {limit} s"}
  except json.JSONDecodeError:
    result = {"failed": "its last line is no JSON"}
  result["seconds"] = round(time.perf_counter() - began, 1)
  if "failed" in result:
    print(f"failed: {result['failed']}", flush=True)
  return result


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--device", required=True, choices=PARTS)
  parser.add_argument("--only", help="names of parts, joined by commas")
  parser.add_argument("--out", type=Path)
  args = parser.parse_args()
  parts = PARTS[args.device]
  names = args.only.split(",") if args.only else list(parts)
  for name in names:
    if name not in parts:
      parser.error(f"unknown part {name!r}; known: {', '.join(parts)}")
  results = {name: run(name, *parts[name]) for name in names}
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
  ).stdout.strip()
  device = next(
    (r["device"] for r in results.values() if "device" in r), args.device
  )
  today = datetime.date.today().isoformat()
  slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
  path = args.out or RESULTS / f"{slug}-{today}-suite.json"
  report = {
    "command": shlex.join(["python", "-m", "benchmarks.suite", *sys.argv[1:]]),
    "commit": commit,
    "date": today,
    "device": device,
    "results": results,
  }
  path.write_text(json.dumps(report, indent=1) + "\n")
  print(f"wrote {path}")
  return 1 if any("failed" in r for r in results.values()) else 0


if __name__ == "__main__":
  sys.exit(main())
