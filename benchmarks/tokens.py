"""What reading a BPE vocabulary causally costs: `tokens@FILE` beside BPE.

  python -m benchmarks.tokens --train=books/train.txt --test=books/test.txt

Needs `pip install -e '.[bench]'`. Trains a byte-level BPE vocabulary on one
text and splits another with it in both ways. A cut of ours is at the first
byte of a segment, a token of BPE starts at its first byte; both counts and how
many are shared, per vocabulary size, and as JSON on the last line.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np

from aunet_jax.splitting.splitter import Splitter
from benchmarks import measure

tokenizers = measure.compared_with("tokenizers")


def train(text: str, size: int) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
  return tokenizer


def token_starts(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
  """Byte offsets at which the tokens of `text` start."""
  pieces = tokenizer.encode(text).tokens
  # Byte-level pieces have one character for each byte.
  lengths = np.array([len(piece) for piece in pieces])
  if lengths.sum() != len(text.encode()):
    raise ValueError("the tokens do not cover the text byte for byte.")
  return np.cumsum(lengths) - lengths


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--train", required=True, help="text the vocabulary is learned from")
  add("--test", required=True, help="text that is split")
  add("--sizes", default="1000,8000,32000", help="tokens in the vocabulary")
  args = parser.parse_args()
  train_text = pathlib.Path(args.train).read_text(encoding="utf-8")
  text = pathlib.Path(args.test).read_text(encoding="utf-8")
  data = text.encode()
  results = []
  for size in map(int, args.sizes.split(",")):
    tokenizer = train(train_text, size)
    with tempfile.TemporaryDirectory() as directory:
      path = f"{directory}/tokenizer.json"
      tokenizer.save(path)
      splitter = Splitter([f"tokens@{path}"])
    theirs = token_starts(tokenizer, text)
    splitter.levels(b"")
    seconds = []
    for _ in range(5):
      start = time.perf_counter()
      levels = splitter.levels(data)
      seconds.append(time.perf_counter() - start)
    ours = np.flatnonzero(levels)
    shared = len(np.intersect1d(ours, theirs))
    results.append(
      {
        "vocabulary": tokenizer.get_vocab_size(),
        "bpe_bytes_per_token": len(data) / len(theirs),
        "ours_bytes_per_segment": len(data) / len(ours),
        "share_of_bpe_starts_cut": shared / len(theirs),
        "share_of_cuts_that_are_bpe_starts": shared / len(ours),
        "mb_per_s": len(data) / min(seconds) / 1e6,
      }
    )
    print(
      "  ".join(f"{name}={value:.4g}" for name, value in results[-1].items())
    )
  print(json.dumps(results))


if __name__ == "__main__":
  main()
