"""Bits per byte of text under a trained model, over a complete corpus.

  python -m aunet_jax.evaluate --workdir=runs/quickstart --data='books/*.txt'

  # a score for every document, and overlapping windows for long ones
  python -m aunet_jax.evaluate --workdir=runs/quickstart --data='books/*.txt' \\
      --per_document=scores.jsonl --stride=1024

It is total nats / (ln 2 * text bytes), with EOS in the nats (see `loss.py`),
never a mean of per-document means, for models of bytes and of tokens alike. A
document that fits a row of the model is read in one piece; a longer one
continues in the next row as a fresh context, or, with --stride, in overlapping
windows. docs/evaluation.md has every field of the result.
"""

import argparse
import contextlib
import json
import sys

from aunet_jax import terminal
from aunet_jax.evaluate.bits_per_byte import evaluate_workdir
from aunet_jax.files import written_whole


@terminal.command
def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="the last line of the output is one JSON object; eos_counted says\n"
    "that the nats of each document's EOS are in bits_per_byte.",
  )
  parser.add_argument(
    "--workdir", required=True, help="workdir of a trained run"
  )
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
    "--separator",
    help="separates the documents of a text file: line, blank_line or any "
    "string (default: a file is a document)",
  )
  parser.add_argument(
    "--official_scoring",
    action="store_true",
    help="score as the official evaluation does, without the final norm",
  )
  parser.add_argument(
    "--int8",
    action="store_true",
    help="round matrices to int8, as generate --int8 does",
  )
  parser.add_argument(
    "--stride",
    type=int,
    metavar="N",
    help="start a window every N positions of a long document, so that they "
    "overlap (default: no overlap)",
  )
  parser.add_argument(
    "--per_document",
    metavar="FILE",
    help="also write the scores of every document, one JSON object a line",
  )
  parser.add_argument(
    "--compressor_bytes",
    type=int,
    default=16 << 20,
    metavar="N",
    help="bytes of the text that gzip and xz compress for comparison, at "
    "about a second per MB (default 16 MiB; 0: none)",
  )
  parser.add_argument(
    "--answers",
    action="store_true",
    help="the data are conversations in the format the model was tuned on; "
    "score only what the assistant says",
  )
  terminal.add_trust_rules(parser)
  args = parser.parse_args(argv)
  if args.batch_size < 1:
    parser.error(f"--batch_size={args.batch_size} must be positive")
  if args.separator == "":
    parser.error('--separator="" cannot separate; give a string')
  if args.compressor_bytes < 0:
    parser.error(f"--compressor_bytes={args.compressor_bytes} is below 0")
  with contextlib.ExitStack() as stack:
    options = {}
    if args.per_document is not None:  # opened first: an hour may follow
      file = stack.enter_context(written_whole(args.per_document))
      options["on_document"] = lambda row: file.write(
        json.dumps(row).encode() + b"\n"
      )
    result = evaluate_workdir(
      args.workdir,
      args.data,
      args.batch_size,
      args.text_field,
      args.official_scoring,
      args.int8,
      trust_rules=args.trust_rules,
      stride=args.stride,
      separator=args.separator,
      compressor_bytes=args.compressor_bytes,
      answers=args.answers,
      **options,
    )
  print(
    f"{result['bits_per_byte']:.4f} bits per byte "
    f"({result['bits_per_byte_without_eos']:.4f} without EOS) over "
    f"{result['bytes']:,} bytes of {result['documents']:,} documents"
  )
  print(json.dumps(result))


if __name__ == "__main__":
  sys.exit(main())
