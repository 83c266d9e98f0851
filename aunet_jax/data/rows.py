"""Texts as rows of the model, split on the host.

Letters: B rows, L positions, N stages, Z splitting automaton states.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aunet_jax.config import BOS


def bucket(size: int, parts: int = 8) -> int:
  """`size` rounded up to 16, 24, 32, …, 128, 144, …: few shapes, few compiles.

  Args: parts: most sizes from one power of two to the next.
  """
  power = 1 << max(4, (size - 1).bit_length() - 1)
  step = max(8, power // parts)
  return max(16, -(-size // step) * step)


class Rows(NamedTuple):
  """Texts as rows of the model: BOS, the bytes, padding."""

  bytes_BL: np.ndarray  # int32
  levels_BL: np.ndarray  # int8; BOS at the deepest level
  documents_BL: np.ndarray  # int32; 1, and 0 for padding
  counts_BN: np.ndarray  # int32: positions of every stage
  offset_BN: np.ndarray  # int32 (B, N - 1): of the last position of each stage
  splitter_BZ: np.ndarray  # int32: the automaton after the last byte

  @property
  def capacities(self) -> tuple[int, ...]:
    """Row shape that drops nothing: a bucket per stage."""
    sizes = [bucket(int(size)) for size in self.counts_BN.max(axis=0)]
    return tuple(np.minimum.accumulate(sizes).tolist())


def make_rows(
  texts: Sequence[bytes | np.ndarray],
  splitter,
  num_stages: int,
  bos: int = BOS,
) -> Rows:
  """Splits texts on the host, where nothing can be dropped unseen.

  Args: texts: bytes or, of a model of one stage, ids of tokens. bos: its id.
  """
  B = len(texts)
  L = bucket(max(len(text) for text in texts) + 1)
  bytes_BL = np.full((B, L), bos, np.int32)
  levels_BL = np.zeros((B, L), np.int8)
  levels_BL[:, 0] = num_stages - 1
  documents_BL = np.zeros((B, L), np.int32)
  counts_BN = np.zeros((B, num_stages), np.int32)
  offset_BN = np.zeros((B, num_stages - 1), np.int32)
  states = []
  for b, text in enumerate(texts):
    size = len(text) + 1
    levels, end = 0, splitter.start
    if isinstance(text, bytes):
      text = np.frombuffer(text, np.uint8)
      levels, end = splitter.scan(text, end)
    states.append(np.asarray(end, np.int32))
    bytes_BL[b, 1:size] = text
    levels_BL[b, 1:size] = levels
    documents_BL[b, :size] = 1
    levels = levels_BL[b, :size]
    for i in range(num_stages):
      counts_BN[b, i] = (levels >= i).sum()
      if i:
        # Positions of the finer stage that lie after its last boundary.
        last = np.flatnonzero(levels >= i)[-1]
        offset_BN[b, i - 1] = (levels[last + 1 :] >= i - 1).sum()
  return Rows(
    bytes_BL, levels_BL, documents_BL, counts_BN, offset_BN, np.stack(states)
  )
