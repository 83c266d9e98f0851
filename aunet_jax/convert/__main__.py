"""Converts official AU-Net checkpoints to a workdir, and back.

  python -m aunet_jax.convert --from-lingua=CKPT --workdir=DIR
  python -m aunet_jax.convert --to-lingua=OUT --workdir=DIR

CKPT is the official code's consolidated directory (`consolidated.pth` and
`params.json`) or one file of weights, with its `params.json` beside it or
given by --params: `.pth` (needs torch), `.npz` or `.safetensors` under the
official names. OUT is a file of one of these kinds; `params.json` is written
beside it. generate, evaluate and train read the workdir; to continue training,
give its `config.json` as --config.

Nothing in a checkpoint is ever executed: `.pth` is read by torch with
`weights_only=True`, `.npz` without pickle.
"""

import argparse
import sys

from aunet_jax import terminal
from aunet_jax.convert.checkpoint import PARAMS, from_lingua, to_lingua


@terminal.command
def main(args=None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  way = parser.add_mutually_exclusive_group(required=True)
  way.add_argument(
    "--from-lingua", metavar="CKPT", help="official weights, file or directory"
  )
  way.add_argument("--to-lingua", metavar="OUT", help="official file to write")
  parser.add_argument("--workdir", required=True)
  parser.add_argument(
    "--params",
    metavar="JSON",
    help="official params.json (default: beside the weights)",
  )
  parser.add_argument(
    "--rules", help="splitting rules of stages 2, 3, …, joined by commas"
  )
  parser.add_argument(
    "--official_rows",
    action="store_true",
    help="no document mask: documents in a row see each other",
  )
  terminal.add_trust_rules(parser)
  flags = parser.parse_args(args)
  if flags.from_lingua:
    config = from_lingua(
      flags.from_lingua,
      flags.workdir,
      flags.params,
      tuple(flags.rules.split(",")) if flags.rules else None,
      not flags.official_rows,
    )
    print(f"wrote {flags.workdir}: rules {', '.join(config.model.rules)}")
  else:
    to_lingua(flags.workdir, flags.to_lingua, flags.trust_rules)
    print(f"wrote {flags.to_lingua} and {PARAMS}")


if __name__ == "__main__":
  sys.exit(main())
