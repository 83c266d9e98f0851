"""All benchmarks of a machine, one after the other, into one JSON file.

  python -m benchmarks.suite --device=cpu    two cores, about five minutes
  python -m benchmarks.suite --device=gpu    one GPU, at most ten minutes

Each is a command of its own with a time limit; one that fails or runs out of
time is recorded as such and the rest goes on. The file is written after each.
`--device=cpu` needs `pip install -e '.[bench]'`. On a GPU the attention kernels
are checked before anything is timed, the 1B models train in bfloat16 with the
fused kernel, and with `xla` for comparison, and JAX may take 92% of the memory
unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.

The file is `benchmarks/results/DEVICE-DATE-suite.json`; `--out` names another.
"""

import argparse
import datetime
import json
import os
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
    "attention_float32": (45, "attention --shapes=aunet2_1b --dtype=float32"),
    "upsample": (35, "upsample --shapes=aunet2_1b"),
    "train_aunet2": (
      110,
      "train --models=aunet2_1b --attention=triton --profile",
    ),
    "train_aunet2_xla": (65, "train --models=aunet2_1b --attention=xla"),
    "train_aunet3": (85, "train --models=aunet3_1b --attention=triton"),
    "train_aunet4": (85, "train --models=aunet4_1b --attention=triton"),
    "decode": (
      65,
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
  except subprocess.TimeoutExpired as error:
    print((error.stdout or b"").decode("utf-8", "replace"), flush=True)
    result = {"failed": f"not done in {limit} s"}
  except json.JSONDecodeError:
    result = {"failed": "its last line is no JSON"}
  result["seconds"] = round(time.perf_counter() - began, 1)
  if "failed" in result:
    print(f"failed: {result['failed']}", flush=True)
  return result


def commit() -> str | None:
  """The checkout's, short; None where git cannot say."""
  command = ["git", "rev-parse", "--short", "HEAD"]
  try:
    done = subprocess.run(command, capture_output=True, text=True)
  except OSError:
    return None
  return done.stdout.strip() or None


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
  if args.device == "gpu":  # as the rows of docs/speed.md assume
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  report = {
    "command": shlex.join(["python", "-m", "benchmarks.suite", *sys.argv[1:]]),
    "commit": commit(),
    "date": datetime.date.today().isoformat(),
    "device": args.device,
    "results": {},
  }
  path = None
  for name in names:
    result = report["results"][name] = run(name, *parts[name])
    report["device"] = result.get("device", report["device"])
    slug = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    older, path = path, RESULTS / f"{slug}-{report['date']}-suite.json"
    path = args.out or path
    path.write_text(json.dumps(report, indent=1) + "\n")
    if older not in (None, path):  # written before the device was known
      older.unlink()
  print(f"wrote {path}")
  return 1 if any("failed" in r for r in report["results"].values()) else 0


if __name__ == "__main__":
  sys.exit(main())
