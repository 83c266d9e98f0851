"""Documents as windows of a model's rows, for evaluation.

A document of n units (bytes or tokens) has n + 1 positions: position 0 reads
BOS, position p reads unit p - 1 and predicts unit p or, last of all, EOS. A
document that fits a row is one window. A longer one is several: each starts as
a fresh context whose first position is kept at every stage, and holds as much
as a row does. Windows are disjoint, or start every `stride` positions; then a
position is scored in the first window that reaches it, so that it has context
before it. What a position's window holds depends on its document and the
model's row alone, never on other documents.

Letters: L positions of a row, S stages.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aunet_jax.config import BOS, EOS


class Window(NamedTuple):
  """Positions [start, stop) of a document; those from `scored` on count."""

  document: int
  start: int
  stop: int
  scored: int
  inputs: np.ndarray  # ids read
  targets: np.ndarray  # ids to predict
  levels: np.ndarray  # int8; the first is the deepest

  @property
  def size(self) -> int:
    return self.stop - self.start


def longest(levels: np.ndarray, capacities: Sequence[int]) -> int:
  """Positions of a window that a row can hold.

  Args: levels: of every position after the first, which takes a slot of every
    stage.
  """
  size = min(len(levels) + 1, capacities[0])
  for stage, capacity in enumerate(capacities[1:], start=1):
    kept = np.flatnonzero(levels >= stage)
    if len(kept) >= capacity:
      size = min(size, int(kept[capacity - 1]) + 1)
  return size


def windows(
  number: int,
  units: np.ndarray,
  splitter,
  capacities: Sequence[int],
  stride: int | None = None,
  ids: tuple[int, int] = (BOS, EOS),
) -> Iterator[Window]:
  """The windows of one document; see the module.

  Args: units: ids of its bytes or tokens. stride: None = disjoint. ids: of BOS
    and EOS.
  """
  read = np.concatenate([[ids[0]], units]).astype(np.int32)
  predicted = np.concatenate([units, [ids[1]]]).astype(np.int32)
  start, scored, state = 0, 0, splitter.start
  while scored < len(read):
    following = units[start : start + capacities[0] - 1]
    if len(capacities) == 1:
      levels = np.zeros(len(following), np.int8)
    else:
      levels, _ = splitter.scan(following, state)
    stop = start + longest(levels, capacities)
    levels = np.concatenate(
      [[len(capacities) - 1], levels[: stop - start - 1]]
    ).astype(np.int8)
    yield Window(
      number, start, stop, scored, read[start:stop], predicted[start:stop],
      levels,
    )  # fmt: skip
    scored = stop
    step = stop - start if stride is None else min(stride, stop - start)
    if len(capacities) > 1:
      _, state = splitter.scan(units[start : start + step], state)
    start += step


def rows(
  some: Iterable[Window], capacities: Sequence[int]
) -> Iterator[list[Window]]:
  """Windows in rows, in order; a row closes where the next has no room."""
  row: list[Window] = []
  room_S = np.array(capacities)
  for window in some:
    usage_S = [
      int((window.levels >= stage).sum()) for stage in range(len(capacities))
    ]
    if (usage_S > room_S).any():
      yield row
      row, room_S = [], np.array(capacities)
    row.append(window)
    room_S = room_S - usage_S
  if row:
    yield row


def batch(
  some: Sequence[Sequence[Window]], num_rows: int, length: int
) -> dict[str, np.ndarray]:
  """What the model takes, int32 (num_rows, length); rows past `some` are empty.

  `weights` are 1 where a target is scored, so also 0 in overlaps.
  """
  names = ("bytes", "targets", "levels", "documents", "weights")
  arrays = {name: np.zeros((num_rows, length), np.int32) for name in names}
  for b, row in enumerate(some):
    at = 0
    for number, window in enumerate(row, start=1):
      span = slice(at, at + window.size)
      arrays["bytes"][b, span] = window.inputs
      arrays["targets"][b, span] = window.targets
      arrays["levels"][b, span] = window.levels
      arrays["documents"][b, span] = number
      first = at + window.scored - window.start
      arrays["weights"][b, first : at + window.size] = 1
      at += window.size
  return arrays
