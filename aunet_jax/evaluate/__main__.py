"""Bits per byte of text under a trained model, over a whole corpus.

  python -m aunet_jax.evaluate --workdir=runs/quickstart --data='books/*.txt'

The figure is total nats / (ln 2 * text bytes), EOS counted in the nats (see
`loss.py`), never a mean of per-document means; for models of bytes and of
tokens alike. Documents are packed into the rows the model was trained on; one
longer than a row continues in the next as a fresh context.
"""

import argparse
import json
import sys

from aunet_jax import terminal
from aunet_jax.evaluate.bits_per_byte import __doc__, evaluate_workdir
from aunet_jax.workdir import layout


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="the last line of the output is one JSON object; eos_counted says\n"
    "that the nats of each document's EOS are in bits_per_byte.",
  )
  parser.add_argument("--workdir", required=True, help="a trained run")
  parser.add_argument(
    "--data",
    required=True,
    help="text, JSONL, Parquet, … : file, directory or glob; several joined "
    "by commas",
  )
  parser.add_argument(
    "--batch_size", type=int, default=8, help="rows at a time (default 8)"
  )
  parser.add_argument(
    "--text_field", default="text", help="field of JSONL and Parquet records"
  )
  parser.add_argument(
    "--official_scoring",
    action="store_true",
    help="score as the official evaluation does, without the final norm",
  )
  parser.add_argument(
    "--int8",
    action="store_true",
    help="with matrices rounded to int8, as generation with --int8",
  )
  terminal.add_trust_rules(parser)
  args = parser.parse_args(argv)
  if args.batch_size < 1:
    parser.error(f"--batch_size={args.batch_size} must be positive")
  try:
    result = evaluate_workdir(
      args.workdir,
      args.data,
      args.batch_size,
      args.text_field,
      args.official_scoring,
      args.int8,
      trust_rules=args.trust_rules,
    )
  except (ValueError, OSError, layout.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(
    f"{result['bits_per_byte']:.4f} bits per byte over {result['bytes']:,} "
    f"bytes of {result['documents']:,} documents"
  )
  print(json.dumps(result))
  return 0


if __name__ == "__main__":
  sys.exit(main())
