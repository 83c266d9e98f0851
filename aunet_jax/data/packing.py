"""Packs documents into rows so that the most expensive stage is full.

An n-byte document has n + 1 positions: position 0 reads BOS, position p reads
byte p - 1, and position p predicts byte p or, last of all, EOS. A *piece* is
one document's span [start, stop) of positions in a row. Its first position is
kept at every stage; the others have the levels that the splitting function
gives the whole document, from its state at the piece's start.

A row closes before any stage would hold more positions than its capacity. The
official code instead cuts fixed rows of bytes, which leaves deep slots empty
or loses boundaries. A document that fits what is left of a row is never cut.
Which documents fill a row is a best-fit choice among a bounded window; one is
cut only where none fits and more than `SLACK` of every stage is still empty.
For evaluation, documents that fit a row are never cut (`keep_documents`), so
that models are compared over the same contexts.

A document of tokens is packed likewise, token for byte; it has one stage.

Shape suffixes: L positions of a row, S stages, W documents in the window.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from aunet_jax import config
from aunet_jax.compiled import compiled
from aunet_jax.data import roles

SLACK = 0.03  # a row this near to full closes rather than cut a document
WINDOW_ROWS = 64  # text the window holds at most, in rows of stage 1
# More documents than this wait only until the window holds MIN_WINDOW_ROWS:
# with fewer positions in it, tiny documents would leave rows half empty.
WINDOW_DOCUMENTS = 1024
MIN_WINDOW_ROWS = 2


class Piece(NamedTuple):
  """Positions [start, stop) of a document, and how to split them."""

  document: int
  start: int
  stop: int
  state: np.ndarray  # int32, of the splitter before byte `start`


@compiled
def _usage(levels, num_stages):
  """Positions per stage of a whole span whose bytes have `levels`."""
  count_S = np.zeros(num_stages, np.int64)  # of positions of just that level
  for level in levels:
    count_S[min(level, num_stages - 1)] += 1
  return np.cumsum(count_S[::-1])[::-1] + 1


def slots(text: bytes, splitter, num_stages: int) -> np.ndarray:
  """Positions of every stage that a document takes in one piece, int64 (S,)."""
  return _usage(splitter.levels(text), num_stages)


@compiled
def _longest(levels, room_S):
  """The most positions of a span that fit, and what they use per stage.

  The first position costs one slot of every stage; position j > 0 has level
  levels[j - 1].
  """
  num_stages = len(room_S)
  usage_S = np.zeros(num_stages, np.int64)
  if room_S.min() < 1:
    return 0, usage_S
  usage_S[:] = 1
  count = min(len(levels) + 1, room_S[0])
  for position in range(1, count):
    level = levels[position - 1]
    if level == 0:  # most are: only the number of bytes bounds them
      continue
    deepest = min(level, num_stages - 1)
    for stage in range(1, deepest + 1):
      if usage_S[stage] == room_S[stage]:
        usage_S[0] = position
        return position, usage_S
    for stage in range(1, deepest + 1):
      usage_S[stage] += 1
  usage_S[0] = count
  return count, usage_S


def _best_fit(usage_WS, room_S):
  """Fills the room: the oldest document first, then the largest that fits.

  Room only shrinks, so one that does not fit when its turn comes never will.

  Returns: the chosen indices into the window, in order; `room_S` is updated.
  """
  order_W = np.argsort(-usage_WS[:, -1], kind="stable")
  oldest_first_W = np.concatenate([[0], order_W[order_W != 0]])
  return _first_fit(usage_WS, oldest_first_W, room_S)


@compiled
def _first_fit(usage_WS, order_W, room_S):
  """Takes documents in order, each that still fits."""
  chosen = np.empty(len(order_W), np.int64)
  count = 0
  for i in order_W:
    if room_S[0] < 1:
      break
    fits = True
    for stage in range(len(room_S) - 1, -1, -1):
      if usage_WS[i, stage] > room_S[stage]:
        fits = False
        break
    if fits:
      chosen[count] = i
      count += 1
      for stage in range(len(room_S)):
        room_S[stage] -= usage_WS[i, stage]
  return chosen[:count]


def check_capacities(capacities: Sequence[int], splitter) -> None:
  """Raises ValueError unless there is one capacity >= 1 for every stage."""
  if len(capacities) != splitter.num_levels + 1:
    raise ValueError(
      f"{len(capacities)} capacities {tuple(capacities)} but the splitter "
      f"feeds {splitter.num_levels} stages below the bytes; give "
      f"{splitter.num_levels + 1}."
    )
  if min(capacities) < 1:
    raise ValueError(f"capacities {tuple(capacities)} must all be >= 1.")


@dataclasses.dataclass
class _Pending:
  """What is left of a document that waits in the window."""

  document: int
  text: np.ndarray  # uint8, all of the document; or its tokens
  start: int  # first position not yet in a row
  state: np.ndarray
  levels: np.ndarray  # int8, of bytes `start` on; no more than a row can hold


class Packer:
  """Turns a stream of documents into rows, each a list of pieces.

  The rows depend on the documents, their order, the splitter, the capacities
  and `keep_documents` alone.
  """

  def __init__(
    self, splitter, capacities: Sequence[int], keep_documents: bool = False
  ):
    """Args: keep_documents: leave room in a row rather than cut a document
    that fits a row of its own; a longer one starts a row.
    """
    check_capacities(capacities, splitter)
    self._splitter = splitter
    self._capacity_S = np.array(capacities, np.int64)
    self._keep_documents = keep_documents
    self._window: list[_Pending] = []  # oldest first
    self._usage_WS = np.zeros(
      (WINDOW_DOCUMENTS + 1, len(capacities)), np.int64
    )  # of each in the window; see _measure
    self._num_positions = 0
    self.used_S = np.zeros(len(capacities), np.int64)  # slots of all rows

  def _measure(self, pending: _Pending) -> np.ndarray:
    """Splits what a row can hold of a document; returns its size per stage.

    A document longer than any row is not split to its end: its number of
    bytes alone says that it does not fit.
    """
    length = len(pending.text) + 1 - pending.start
    row_length = int(self._capacity_S[0])
    stop = pending.start + min(length, row_length) - 1
    if len(self._capacity_S) == 1:  # one stage: there is nothing to split
      pending.levels = np.zeros(stop - pending.start, np.int8)
    else:
      pending.levels, _ = self._splitter.scan(
        pending.text[pending.start : stop], pending.state
      )
    usage_S = _usage(pending.levels, len(self._capacity_S))
    usage_S[0] = length
    return usage_S

  def add(
    self, document: int, text: bytes | np.ndarray
  ) -> Iterator[list[Piece]]:
    """Takes a document; yields the rows that are then complete.

    Args: text: its bytes; of a model of one stage, or its tokens.
    """
    pending = _Pending(
      document=document,
      text=np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text,
      start=0,
      state=self._splitter.start,
      levels=np.zeros(0, np.int8),
    )
    if len(self._window) == len(self._usage_WS):
      self._usage_WS = np.concatenate([self._usage_WS] * 2)
    self._usage_WS[len(self._window)] = self._measure(pending)
    self._window.append(pending)
    self._num_positions += len(text) + 1
    while self._is_full():
      yield self._close_row()

  def _is_full(self) -> bool:
    rows = self._num_positions / int(self._capacity_S[0])
    many = len(self._window) > WINDOW_DOCUMENTS
    return rows > (MIN_WINDOW_ROWS if many else WINDOW_ROWS)

  def finish(self) -> Iterator[list[Piece]]:
    """Yields the rows of the documents that still wait."""
    while self._window:
      yield self._close_row()

  def _close_row(self) -> list[Piece]:
    room_S = self._capacity_S.copy()
    if (self._usage_WS[0] > room_S).any():  # longer than any row
      pieces = [self._cut(0, room_S)]
    else:
      pieces = self._take(
        _best_fit(self._usage_WS[: len(self._window)], room_S)
      )
      slack_S = SLACK * self._capacity_S
      cuts = not self._keep_documents and (room_S > slack_S).all()
      if self._window and cuts:
        size_WS = self._usage_WS[: len(self._window)] / self._capacity_S
        size_W = size_WS.max(axis=1)
        # One that must be cut anyway, the oldest such; else the largest.
        must_W = size_W > 1
        index = np.argmax(must_W) if must_W.any() else np.argmax(size_W)
        pieces.append(self._cut(int(index), room_S))
    self.used_S += self._capacity_S - room_S
    return pieces

  def _take(self, chosen: np.ndarray) -> list[Piece]:
    """Moves what is left of the chosen documents from the window to a row."""
    pieces = []
    for i in chosen:
      pending = self._window[i]
      stop = len(pending.text) + 1
      pieces.append(Piece(pending.document, pending.start, stop, pending.state))
      self._num_positions -= stop - pending.start
    keep_W = np.ones(len(self._window), bool)
    keep_W[chosen] = False
    kept = np.flatnonzero(keep_W)
    self._usage_WS[: len(kept)] = self._usage_WS[kept]
    self._window = [self._window[i] for i in kept]
    return pieces

  def _cut(self, index: int, room_S: np.ndarray) -> Piece:
    """Puts the start of a document in the room that is left."""
    pending = self._window[index]
    count, usage_S = _longest(pending.levels, room_S)
    stop = pending.start + count
    piece = Piece(pending.document, pending.start, stop, pending.state)
    if len(self._capacity_S) > 1:
      _, pending.state = self._splitter.scan(
        pending.text[pending.start : stop], pending.state
      )
    pending.start = stop
    self._usage_WS[index] = self._measure(pending)
    self._num_positions -= count
    room_S -= usage_S
    return piece


# ----- rows and batches -----------------------------------------------------


def field_names(sizes_targets: bool = False) -> tuple[str, ...]:
  """What a batch holds, each int32 (B, L).

  `bytes`: ids read, BOS at document starts. `targets`: ids to predict, EOS at
  document ends. `levels`. `documents`: 1, 2, ... in order; 0 = padding.
  `weights`: 1 where there is a target to learn; 0 = padding. With
  `sizes_targets`, of tokens and of conversations, also `target_bytes`: how many
  bytes of text every target is.
  """
  names = ("bytes", "targets", "levels", "documents", "weights")
  return (*names, "target_bytes") if sizes_targets else names


def abstract_batch(
  num_rows: int, length: int, sizes_targets: bool, sharding=None
) -> dict[str, jax.ShapeDtypeStruct]:
  """The shape of a batch, for programs that are compiled before there is one.

  Args: sharding: a jax.sharding.Sharding of every array.
  """
  array = jax.ShapeDtypeStruct((num_rows, length), np.int32, sharding=sharding)
  return dict.fromkeys(field_names(sizes_targets), array)


def start_to_read(piece: Piece) -> int:
  """The first unit of the document that a piece needs; see `fill_row`."""
  return max(piece.start - 1, 0)


def fill_row(
  pieces: Sequence[Piece],
  units: Sequence[np.ndarray],
  splitter,
  length: int,
  bos: int = config.BOS,
  eos: int = config.EOS,
  marks: np.ndarray = roles.ALL,
) -> dict[str, np.ndarray]:
  """The arrays of one row.

  Args:
    pieces: what the row holds, in order.
    units: of every piece, the bytes of its document from `start_to_read` to
      `stop`, less what lies past the document's end, as uint8; or the tokens.
    splitter: the one the row was packed with.
    length: positions of the row, L.
    bos, eos, marks: the largest ids there are, and those of `roles.ALL`; a
      tokenizer has its own.
  Returns: integer arrays (L,), of types as small as the values allow; see
    `widen`. Padding is 0 in all of them.
  """
  id_dtype = np.int16 if max(bos, eos) < 1 << 15 else np.int32
  row = {
    "bytes": np.zeros(length, id_dtype),
    "targets": np.zeros(length, id_dtype),
    "levels": np.zeros(length, np.int8),
    "documents": np.zeros(length, np.min_scalar_type(length)),
  }
  if splitter.has_roles:
    row["weights"] = np.zeros(length, np.int8)
  at = 0
  for number, (piece, text) in enumerate(
    zip(pieces, units, strict=True), start=1
  ):
    end = at + piece.stop - piece.start
    if piece.start == 0:
      row["bytes"][at] = bos
    else:
      row["bytes"][at], text = text[0], text[1:]
    inside = text[: piece.stop - piece.start - 1]
    row["bytes"][at + 1 : end] = inside
    row["targets"][at : at + len(text)] = text
    if len(text) < piece.stop - piece.start:
      row["targets"][end - 1] = eos
    row["levels"][at] = splitter.num_levels
    if splitter.num_levels > 0:
      row["levels"][at + 1 : end], _ = splitter.scan(inside, piece.state)
    row["documents"][at:end] = number
    if splitter.has_roles:  # pieces are whole documents
      row["weights"][at:end] = roles.in_answers(row["bytes"][at:end], marks)
    at = end
  if splitter.has_roles:
    is_text_L = row["targets"] < config.FIRST_MARK
    row["target_bytes"] = row["weights"] * is_text_L
  return row


def widen(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """What the model takes, from rows as `fill_row` gives them.

  Returns: int32 arrays of the same shape; see `field_names`.
  """
  wide = {name: array.astype(np.int32) for name, array in arrays.items()}
  if "weights" not in wide:  # all of a text is learned
    wide["weights"] = (arrays["documents"] > 0).astype(np.int32)
  return wide


def pack_documents(
  documents: Iterable[bytes],
  splitter,
  capacities: Sequence[int],
  keep_documents: bool = False,
) -> list[dict[str, np.ndarray]]:
  """Rows of texts in memory, packed as a corpus is; see `widen`.

  Args: documents: each may be empty (BOS predicts EOS).
  """
  texts = list(documents)
  packer = Packer(splitter, capacities, keep_documents)
  rows = []
  for number, text in enumerate(texts):
    rows.extend(packer.add(number, text))
  rows.extend(packer.finish())

  def arrays(pieces):
    units = [
      np.frombuffer(texts[p.document][start_to_read(p) : p.stop], np.uint8)
      for p in pieces
    ]
    return widen(fill_row(pieces, units, splitter, capacities[0]))

  return [arrays(pieces) for pieces in rows]
