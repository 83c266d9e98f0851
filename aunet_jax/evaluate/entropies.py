"""A small model's entropies as a table for the rule entropy@FILE."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.config import BOS
from aunet_jax.data import packing
from aunet_jax.splitting.entropy import STEPS_PER_BIT, Entropy


def contexts(
  bytes_BL: np.ndarray, documents_BL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The last three text bytes at every position, and where they are known.

  Returns: int32 (B, L), 0 for what comes before the text; bool (B, L), text
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
  """The value that is exceeded by the share of values nearest to
  1 / bytes_per_segment."""
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
