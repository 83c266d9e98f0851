"""Prints the newest logged step and checkpoint of a workdir.

  python -m aunet_jax.progress --workdir=gs://my-bucket/runs/first

Prints one line, such as `step 1200 checkpoint 1000`; 0 means none. In a bucket
the log is uploaded once a minute, and at every save.
"""

import argparse
import sys

from aunet_jax import terminal
from aunet_jax.workdir import buckets, layout


@terminal.command
def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.progress",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--workdir", required=True, help="a directory, or gs://BUCKET/PATH"
  )
  workdir = buckets.path(parser.parse_args(argv).workdir)
  rows = layout.read_rows(workdir / layout.METRICS_FILE)
  steps = layout.steps(workdir)
  step = rows[-1]["step"] if rows else 0
  print(f"step {step} checkpoint {steps[-1] if steps else 0}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
