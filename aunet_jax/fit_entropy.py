"""Makes the file of the rule `entropy@FILE` from a trained model.

  python -m aunet_jax.fit_entropy --workdir=runs/quickstart \\
      --data='books/*.txt' --output=entropy.npz --bytes_per_segment=5
  python -m aunet_jax.split --rule=entropy@entropy.npz FILE

The rule cuts at a byte if the model's entropy of the next byte is above a
threshold (--mode=threshold), or has risen by more than a threshold
(--mode=rise). The threshold is chosen to give --bytes_per_segment on the text.
Prints one JSON object. A table replaces the model (see `entropy`);
`share_of_model_cuts_made` is the share of the model's own cuts, at the same
rate, that the table keeps.
"""

import argparse
import json
import sys

import numpy as np

from aunet_jax import terminal
from aunet_jax.data import reading, sources
from aunet_jax.evaluate.entropies import (
  _threshold,
  _values,
  fit,
  model_entropies,
)
from aunet_jax.splitting.entropy import MODES, STEPS_PER_BIT
from aunet_jax.workdir import load


@terminal.command
def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.fit_entropy",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--workdir",
    required=True,
    help="workdir of a trained model, preferably a small one",
  )
  add("--data", required=True, help="text to read, as config.data.train")
  add("--output", required=True, help="file to write: the FILE of entropy@FILE")
  add("--bytes_per_segment", type=float, default=5.0)
  add("--mode", choices=MODES, default="threshold")
  add(
    "--max_bytes",
    type=int,
    default=4_000_000,
    help="bytes of text to read at most",
  )
  terminal.add_trust_rules(parser)
  add("--text_field", default="text", help="as config.data.text_field")
  add("--separator", help="as config.data.separator")
  args = parser.parse_args(argv)
  if args.bytes_per_segment <= 1:
    raise ValueError(
      f"--bytes_per_segment={args.bytes_per_segment} must be above 1."
    )
  if args.max_bytes < 1:
    raise ValueError(f"--max_bytes={args.max_bytes} must be positive.")
  skips = reading.SkipLog(reading.log_to_stderr)
  documents = [
    document.text
    for document in sources.documents(
      args.data, args.text_field, args.max_bytes, skips.add, args.separator
    )
  ]
  skips.finish()
  loaded = load.load(args.workdir, trust_rules=args.trust_rules)
  if loaded.tokenizer is not None:
    raise ValueError(
      f"{args.workdir} holds a model of tokens; entropies need one of bytes."
    )
  context_N, bits_N = model_entropies(loaded, documents)
  table = fit(context_N, bits_N, args.bytes_per_segment, args.mode)
  table.save(args.output)
  of_model = _values(np.rint(bits_N * STEPS_PER_BIT).astype(int), args.mode)
  wanted_N = of_model > _threshold(of_model, args.bytes_per_segment)
  entropy_N = table.blocks[table.index[context_N >> 8], context_N & 0xFF]
  made_N = _values(entropy_N.astype(int), args.mode) > table.threshold
  result = {
    "bytes": len(bits_N),
    "model_bits_per_byte_entropy": float(bits_N.mean()),
    "threshold_bits": table.threshold / STEPS_PER_BIT,
    "bytes_per_segment": float(1 / max(made_N.mean(), 1e-9)),
    "share_of_model_cuts_made": float((wanted_N & made_N).sum())
    / max(int(wanted_N.sum()), 1),
    "rule": f"entropy@{args.output}",
  }
  print(json.dumps(result))


if __name__ == "__main__":
  sys.exit(main())
