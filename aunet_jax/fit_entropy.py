"""Makes the table of the rule `entropy@FILE` from a trained model.

  python -m aunet_jax.fit_entropy --workdir=runs/small --data='books/*.txt' \\
      --output=entropy.npz --bytes_per_segment=5
  python -m aunet_jax.split --rule=entropy@entropy.npz FILE

Cuts at a byte after which the model's entropy of the next one is above a
threshold (--mode=threshold), or above the one before by a threshold
(--mode=rise); the threshold is the one that gives --bytes_per_segment on the
text. Prints one JSON object. What is lost by keeping a table in place of the
model (see `entropy`) is in it: `share_of_model_cuts_made`, of the cuts that
the model itself would make at the same rate.
"""

import argparse
import json
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax import checkpoint, packing, sources
from aunet_jax.config import BOS
from aunet_jax.entropy import MODES, STEPS_PER_BIT, Entropy


def contexts(
  bytes_BL: np.ndarray, documents_BL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The last three text bytes at every position, and where they are known.

  Returns: int32 (B, L), 0 for what stands before the text; bool (B, L), text
    positions, but for the first two of a document's rest that continues from
    the row before.
  """
  is_bos_BL = bytes_BL == BOS
  text_BL = np.where(is_bos_BL, 0, bytes_BL).astype(np.int32)
  result_BL = text_BL.copy()
  known_BL = (documents_BL > 0) & ~is_bos_BL
  from_bos_BL = is_bos_BL.copy()  # BOS is here or `back` positions before
  for back in (1, 2):
    same_BL = np.zeros_like(known_BL)
    same_BL[:, back:] = documents_BL[:, back:] == documents_BL[:, :-back]
    earlier_BL = np.roll(text_BL, back, axis=1)
    result_BL |= np.where(same_BL, earlier_BL, 0) << 8 * back
    from_bos_BL |= same_BL & np.roll(is_bos_BL, back, axis=1)
    known_BL &= same_BL | from_bos_BL
  return result_BL, known_BL


def fit(
  context_N: np.ndarray,
  bits_N: np.ndarray,
  bytes_per_segment: float,
  mode: str = "threshold",
) -> Entropy:
  """The table of mean entropies, and the threshold that cuts so often.

  Args: context_N: int (n,), three bytes at each position of a text, in
    order. bits_N: float (n,), the model's entropy of the byte after it.
  """
  table = np.full(1, bits_N.mean())
  for num_bytes in (1, 2, 3):
    size = 256**num_bytes
    seen, where = np.unique(context_N % size, return_inverse=True)
    mean = np.bincount(where, bits_N) / np.bincount(where)
    # What was not seen has the entropy after one byte less.
    table = np.tile(table, 256)
    table[seen] = mean
  steps = np.clip(np.rint(table * STEPS_PER_BIT), 0, 255).astype(np.uint8)
  numbers: dict[bytes, int] = {}  # of each different block of 256
  index = [
    numbers.setdefault(block.tobytes(), len(numbers))
    for block in steps.reshape(-1, 256)
  ]
  blocks = np.frombuffer(b"".join(numbers), np.uint8).reshape(-1, 256)
  value_N = _values(steps[context_N].astype(int), mode)
  return Entropy(
    np.array(index), blocks, mode, _threshold(value_N, bytes_per_segment)
  )


def _values(entropy_N: np.ndarray, mode: str) -> np.ndarray:
  """What is compared with the threshold."""
  return entropy_N if mode == "threshold" else np.diff(entropy_N, prepend=255)


def _threshold(value_N: np.ndarray, bytes_per_segment: float) -> int:
  """The integer that as close to 1 in so many values are above."""
  candidates = np.unique(value_N)
  above = 1 - np.searchsorted(np.sort(value_N), candidates, side="right") / len(
    value_N
  )
  return int(candidates[np.abs(above - 1 / bytes_per_segment).argmin()])


def model_entropies(
  loaded, documents: Iterable[bytes], rows_at_once: int = 8
) -> tuple[np.ndarray, np.ndarray]:
  """(contexts, bits) at the text bytes of documents, packed into rows.

  Args: loaded: as `aunet_jax.load` gives it.
  """
  rows = packing.pack_documents(
    documents, loaded.splitter, loaded.config.model.capacities
  )

  @jax.jit
  def entropies(params, row_BL):
    logits_BLV = loaded.model.apply(
      {"params": params},
      row_BL["bytes"],
      row_BL["levels"],
      row_BL["documents"],
    )
    logp_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32))
    return -(jnp.exp(logp_BLV) * logp_BLV).sum(axis=-1) / jnp.log(2.0)

  context_parts, bits_parts = [], []
  for start in range(0, len(rows), rows_at_once):
    some = rows[start : start + rows_at_once]
    padding = rows_at_once - len(some)
    batch = {
      name: np.stack([row[name] for row in some + [some[0]] * padding])
      for name in some[0]
    }
    bits_BL = np.asarray(entropies(loaded.params, batch))[: len(some)]
    batch = {name: value[: len(some)] for name, value in batch.items()}
    context_BL, known_BL = contexts(batch["bytes"], batch["documents"])
    context_parts.append(context_BL[known_BL])
    bits_parts.append(bits_BL[known_BL])
  if not sum(map(len, bits_parts)):
    raise ValueError("there is no text to learn entropies from.")
  return np.concatenate(context_parts), np.concatenate(bits_parts)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.fit_entropy",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--workdir", required=True, help="a trained model, best a small one")
  add("--data", required=True, help="text, as data.train")
  add("--output", required=True, help="file to write, FILE of entropy@FILE")
  add("--bytes_per_segment", type=float, default=5.0)
  add("--mode", choices=MODES, default="threshold")
  add("--max_bytes", type=int, default=4_000_000, help="text to read")
  args = parser.parse_args(argv)
  try:
    if args.bytes_per_segment <= 1:
      raise ValueError(
        f"--bytes_per_segment={args.bytes_per_segment} must be above 1."
      )
    documents, total = [], 0
    for source in sources.list_sources(args.data)[0]:
      for record in sources.read_source(source, "text"):
        if isinstance(record, sources.Document) and total < args.max_bytes:
          documents.append(record.text[: args.max_bytes - total])
          total += len(documents[-1])
    loaded = checkpoint.load(args.workdir)
    if loaded.tokenizer is not None:
      raise ValueError(
        f"{args.workdir} holds a model of tokens; entropies need one of bytes."
      )
    context_N, bits_N = model_entropies(loaded, documents)
    table = fit(context_N, bits_N, args.bytes_per_segment, args.mode)
    table.save(args.output)
  except (ValueError, OSError, checkpoint.CheckpointError) as error:
    print(f"entropy: {error}", file=sys.stderr)
    return 2
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
  return 0


if __name__ == "__main__":
  sys.exit(main())
