"""What a splitting rule makes of a corpus, and the capacities that suit it.

The deepest stage costs most, so rows should close because it is full. Given
the bytes of a row, `recommend` packs a sample with ever larger deep stages
and keeps the largest that still fills up; the stages between get what almost
all of those rows use.
"""

import dataclasses
import heapq
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from aunet_jax.data import packing

_PLAN_ROWS = 500  # rows of text that capacities are recommended from

TARGET_FILL = 0.99  # of the deepest slots on the sample; other text has less


MIN_ROWS = 8  # text a sample needs, in rows


_QUANTILE = 0.995  # of rows whose need a stage between meets
_BLOCK = 1 << 22  # bytes split at a time


def level_blocks(splitter, text: bytes) -> Iterator[np.ndarray]:
  """Levels of a document's bytes, a block at a time.

  So that a document of gigabytes takes no multiple of its size.
  """
  state = splitter.start
  view = memoryview(text)
  for at in range(0, len(text), _BLOCK):
    levels, state = splitter.scan(
      np.frombuffer(view[at : at + _BLOCK], np.uint8), state
    )
    yield levels


class SegmentCounter:
  """Lengths of segments per stage, from the levels of documents.

  A segment of a stage is a boundary and the positions up to the next one; the
  first of a document starts at BOS. Its length is counted in positions, which
  are the bytes it reads.
  """

  _SIZE = 1 << 12  # lengths from here on share a bin; the maximum is exact

  def __init__(self, num_levels: int):
    self._counts = np.zeros((num_levels, self._SIZE + 1), np.int64)
    self._longest = np.zeros(num_levels, np.int64)
    self._open = np.zeros(num_levels, np.int64)  # length of the last segment
    self._positions = 0

  def add(self, blocks: Iterable[np.ndarray]) -> None:
    """Takes the levels of one document's bytes; see `level_blocks`."""
    self._positions += 1
    self._open[:] = 1  # BOS
    for levels in blocks:
      self._positions += len(levels)
      for row in range(len(self._counts)):
        starts = np.flatnonzero(levels > row)
        if not len(starts):
          self._open[row] += len(levels)
          continue
        lengths = np.diff(starts, prepend=-self._open[row])
        self._count(row, lengths)
        self._open[row] = len(levels) - starts[-1]
    for row, length in enumerate(self._open):
      self._count(row, np.array([length]))

  def _count(self, row: int, lengths: np.ndarray) -> None:
    self._longest[row] = max(self._longest[row], lengths.max())
    self._counts[row] += np.bincount(
      np.minimum(lengths, self._SIZE), minlength=self._SIZE + 1
    )

  def summary(self, rules: Sequence[str]) -> list[dict]:
    """One dict per stage below the bytes, in JSON types."""
    stages = []
    for number, (rule, counts) in enumerate(
      zip(rules, self._counts, strict=True), start=2
    ):
      segments = int(counts.sum())
      stages.append(
        {
          "stage": number,
          "rule": rule,
          "segments": segments,
          "mean_bytes": self._positions / max(segments, 1),
          "longest_bytes": int(self._longest[number - 2]),
          "share_longer_than_16": float(counts[17:].sum() / max(segments, 1)),
        }
      )
    return stages


@dataclasses.dataclass(frozen=True)
class Plan:
  """Capacities and what they do to the sample."""

  capacities: tuple[int, ...]
  fill: tuple[float, ...]  # share of slots that are real, per stage
  num_cuts: int
  num_rows: int
  num_bytes: int


def pack_usage(
  documents: Iterable[bytes], splitter, capacities: Sequence[int]
) -> tuple[np.ndarray, int]:
  """Slots that every row uses, int64 (rows, stages), and how many cuts."""
  packer = packing.Packer(splitter, capacities)
  usage, before, pieces = [], packer.used_S.copy(), 0

  def take(rows):
    nonlocal before, pieces
    for row in rows:
      usage.append(packer.used_S - before)
      before = packer.used_S.copy()
      pieces += len(row)

  number = 0
  for number, text in enumerate(documents, start=1):
    take(packer.add(number, text))
  take(packer.finish())
  return np.array(usage), pieces - number


def _deepest_fill(usage_RS: np.ndarray, capacity: int) -> float:
  whole = usage_RS[:-1] if len(usage_RS) > 1 else usage_RS  # the last is a rest
  return float(whole[:, -1].sum() / (capacity * len(whole)))


def recommend(
  documents: Sequence[bytes], splitter, row_bytes: int, multiple_of: int = 8
) -> Plan:
  """Capacities for rows of `row_bytes` positions.

  Args: documents: a sample, ideally a few thousand rows. multiple_of: what
    the capacities below the first are rounded to.
  Raises: ValueError where the sample is less than MIN_ROWS rows.
  """
  num_bytes = sum(map(len, documents))
  if num_bytes < MIN_ROWS * row_bytes:
    raise ValueError(
      f"a sample of {num_bytes} bytes is too small to plan rows of "
      f"{row_bytes}; give at least {MIN_ROWS * row_bytes}."
    )
  deeper = splitter.num_levels

  def pack(deepest):
    capacities = (row_bytes,) * deeper + (deepest,)
    return pack_usage(documents, splitter, capacities)[0]

  low, high = 1, row_bytes // multiple_of  # in units of multiple_of
  if deeper == 0:
    usage_RS, num_cuts = pack_usage(documents, splitter, (row_bytes,))
    capacities = (row_bytes,)
  else:
    while low < high:  # fill falls as the capacity grows
      middle = (low + high + 1) // 2
      capacity = middle * multiple_of
      if _deepest_fill(pack(capacity), capacity) >= TARGET_FILL:
        low = middle
      else:
        high = middle - 1
    deepest = low * multiple_of
    need_S = np.quantile(pack(deepest), _QUANTILE, axis=0)
    between = [
      min(row_bytes, int(-(-need // multiple_of)) * multiple_of)
      for need in need_S[1:-1]
    ]
    capacities = (row_bytes, *between, deepest)
    usage_RS, num_cuts = pack_usage(documents, splitter, capacities)
  fill_S = usage_RS.sum(axis=0) / (len(usage_RS) * np.array(capacities))
  return Plan(
    capacities, tuple(fill_S.tolist()), num_cuts, len(usage_RS), num_bytes
  )


class _Longest:
  """The longest segments of stage 2, with where they stand."""

  def __init__(self, count: int):
    self._count = count
    self._heap: list[tuple[int, str, int, bytes]] = []

  def add(
    self, name: str, text: bytes, blocks: Iterable[np.ndarray]
  ) -> Iterator[np.ndarray]:
    """Takes the levels of a document as they pass."""
    at = start = 0  # of the block; of the segment
    for levels in blocks:
      yield levels
      edges = np.concatenate(([start], np.flatnonzero(levels) + 1 + at))
      at += len(levels)
      start = int(edges[-1])
      self._offer(name, text, edges)
    self._offer(name, text, np.array([start, at]))

  def _offer(self, name: str, text: bytes, edges: np.ndarray) -> None:
    if self._count < 1:
      return
    lengths = np.diff(edges)
    for index in np.argsort(-lengths, kind="stable")[: self._count]:
      length, start = int(lengths[index]), int(edges[index])
      entry = (length, name, start, text[start : start + 60])
      if length and len(self._heap) < self._count:
        heapq.heappush(self._heap, entry)
      elif length and length > self._heap[0][0]:
        heapq.heapreplace(self._heap, entry)

  def found(self) -> list[dict]:
    return [
      {"bytes": length, "document": name, "offset": start, "text": snippet}
      for length, name, start, snippet in sorted(
        self._heap, key=lambda entry: -entry[0]
      )
    ]


def statistics(
  documents: Iterable[tuple[str, bytes]],
  splitter,
  rules: list[str],
  row_bytes: int,
  num_longest: int = 0,
) -> dict:
  """What the rules make of the documents, in JSON types.

  Returns: documents, bytes, megabytes_per_second (of splitting alone),
    `stages` as `planner.SegmentCounter.summary`, `longest` segments of stage
    2, and `capacities` with `fill` for rows of `row_bytes`, both None where
    there is too little text to say.
  """
  counter = SegmentCounter(splitter.num_levels)
  longest = _Longest(num_longest)
  sample, sample_bytes = [], 0
  num_documents = num_bytes = 0
  splitter.levels(b"")  # compiles the loop, which is not to be timed
  seconds = 0.0

  def timed(blocks):
    nonlocal seconds
    while True:
      before = time.perf_counter()
      levels = next(blocks, None)
      seconds += time.perf_counter() - before
      if levels is None:
        return
      yield levels

  for name, text in documents:
    blocks = timed(level_blocks(splitter, text))
    counter.add(longest.add(name, text, blocks))
    num_documents += 1
    num_bytes += len(text)
    room = _PLAN_ROWS * row_bytes - sample_bytes
    if room > 0 and text:
      sample.append(text[:room])
      sample_bytes += len(sample[-1])
  enough = sample_bytes >= MIN_ROWS * row_bytes
  plan = recommend(sample, splitter, row_bytes) if enough else None
  return {
    "rules": rules,
    "documents": num_documents,
    "bytes": num_bytes,
    "megabytes_per_second": num_bytes / max(seconds, 1e-9) / 1e6,
    "stages": counter.summary(rules),
    "longest": longest.found(),
    "row_bytes": row_bytes,
    "capacities": plan and list(plan.capacities),
    "fill": plan and list(plan.fill),
  }
