"""Trains a byte-level BPE tokenizer, for the token baseline.

  python -m aunet_jax.tokenizer --data='books/*.txt' --vocab_size=4096 \\
      --output=tokenizer.json

The same text gives the same file, byte for byte. To train on tokens, set
`data.tokenizer=tokenizer.json`, `model.vocab_size` to two more than the
tokenizer's (BOS and EOS follow its tokens), and use a model of one stage.

Tokenization is lossless: a document's tokens, joined, are its bytes, which
`encode` checks. BPE tokenizers read text, so bytes that are not valid UTF-8
become tokens of single bytes, which every byte-level vocabulary has, and the
valid spans between them are encoded separately. Names of special tokens in a
text are ordinary text.
"""

import argparse
import sys
from pathlib import Path

from aunet_jax import terminal
from aunet_jax.data import reading, sources
from aunet_jax.data.tokenizer import Tokenizer, train


@terminal.command
def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.tokenizer",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--data", required=True, help="text to train on, as config.data.train")
  add(
    "--vocab_size",
    type=int,
    default=4096,
    help="number of tokens (default 4096)",
  )
  add("--output", required=True, type=Path, help="the tokenizer.json to write")
  add("--text_field", default="text", help="as config.data.text_field")
  add("--separator", help="as config.data.separator")
  add(
    "--max_bytes",
    type=int,
    default=100_000_000,
    help="use at most the first N bytes of text (default 100 MB)",
  )
  args = parser.parse_args(argv)
  if args.max_bytes < 1:
    raise ValueError(f"--max_bytes={args.max_bytes} must be positive.")
  skips = reading.SkipLog(reading.log_to_stderr)
  first = b""

  def texts():
    nonlocal first
    for document in sources.documents(
      args.data, args.text_field, args.max_bytes, skips.add, args.separator
    ):
      first = first or document.text[:1_000_000]
      yield document.text

  made = train(texts(), args.vocab_size)
  skips.finish()
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text(made)
  tokenizer = Tokenizer(args.output)
  print(
    f"{args.output}: {tokenizer.size:,} tokens, hash {tokenizer.hash}, "
    f"{len(first) / len(tokenizer.encode(first)):.2f} bytes a token in the "
    f"first document; model.vocab_size={tokenizer.vocab_size}"
  )


if __name__ == "__main__":
  sys.exit(main())
