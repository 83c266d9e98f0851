"""Packing: nothing lost, no capacity exceeded, levels of the whole document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_splitter import SpaceSplitter

from aunet_jax.config import BOS, EOS
from aunet_jax.data import packing
from aunet_jax.splitting.splitter import Splitter

SPLITTER = SpaceSplitter()
# Few letters, so that spaces meet; up to many rows of the smallest capacity.
DOCUMENTS = st.lists(
  st.text("ab  ", max_size=90).map(str.encode), min_size=1, max_size=12
)


@st.composite
def _capacities(draw):
  deepest = draw(st.integers(1, 12))
  middle = draw(st.integers(deepest, 20))
  return draw(st.integers(middle, 40)), middle, deepest


def _pack(texts, capacities):
  """Pieces of every row, the documents read back from the arrays, the rows."""
  packer = packing.Packer(SPLITTER, capacities)
  pieces = []
  for number, text in enumerate(texts):
    pieces.extend(packer.add(number, text))
  pieces.extend(packer.finish())
  return pieces, packing.pack_documents(texts, SPLITTER, capacities), packer


def _size(text, start, stop):
  """Slots that positions [start, stop) take, per stage, counted naively."""
  levels = [2, *SPLITTER.levels(text)]
  levels[start] = 2
  span = levels[start:stop]
  return np.array([sum(level >= i for level in span) for i in range(3)])


def test_a_row_drawn_by_hand():
  (row,) = packing.pack_documents([b"a b c", b""], SPLITTER, (10, 6, 4))
  # reads     BOS a   _   b   _   c  | BOS | padding
  ids = [BOS, 97, 32, 98, 32, 99, BOS, 0, 0, 0]
  assert row["bytes"].tolist() == ids
  ids = [97, 32, 98, 32, 99, EOS, EOS, 0, 0, 0]
  assert row["targets"].tolist() == ids
  assert row["levels"].tolist() == [2, 0, 1, 0, 2, 0, 2, 0, 0, 0]
  assert row["documents"].tolist() == [1, 1, 1, 1, 1, 1, 2, 0, 0, 0]
  assert row["weights"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
  shape = packing.abstract_batch(1, 10, sizes_targets=False)
  assert set(row) == set(packing.field_names()) == set(shape)
  for name, array in row.items():
    assert (array.dtype, (1, *array.shape)) == (np.int32, shape[name].shape)


def test_a_document_goes_on_in_the_next_row():
  first, second = packing.pack_documents([b"a b c"], SPLITTER, (4, 4, 4))
  assert first["bytes"].tolist() == [BOS, 97, 32, 98]
  assert first["targets"].tolist() == [97, 32, 98, 32]
  # No BOS: the piece reads the byte before it, at the deepest level.
  assert second["bytes"].tolist() == [32, 99, 0, 0]
  assert second["targets"].tolist() == [99, EOS, 0, 0]
  assert second["levels"].tolist() == [2, 0, 0, 0]
  assert second["weights"].tolist() == [1, 1, 0, 0]


@given(DOCUMENTS, _capacities())
def test_every_position_of_every_document_is_in_exactly_one_row(
  texts, capacities
):
  pieces, rows, _ = _pack(texts, capacities)
  positions = sorted(
    (piece.document, position)
    for row in pieces
    for piece in row
    for position in range(piece.start, piece.stop)
  )
  assert positions == [
    (number, position)
    for number, text in enumerate(texts)
    for position in range(len(text) + 1)
  ]
  for number, text in enumerate(texts):  # and the arrays hold its targets
    spans = []
    for row, row_pieces in zip(rows, pieces, strict=True):
      for index, piece in enumerate(row_pieces, start=1):
        if piece.document == number:
          inside = row["documents"] == index
          spans.append((piece.start, row["targets"][inside].tolist()))
    targets = sum((span for _, span in sorted(spans)), [])
    assert targets == [*text, EOS]


@given(DOCUMENTS, _capacities())
def test_no_capacity_is_exceeded_and_no_row_is_empty(texts, capacities):
  pieces, rows, packer = _pack(texts, capacities)
  used = np.zeros(3, int)
  for row in rows:
    real = row["documents"] > 0
    assert real[0]
    counts = [(real & (row["levels"] >= stage)).sum() for stage in range(3)]
    assert (np.array(counts) <= capacities).all()
    used += counts
    for name, array in row.items():
      assert not array[~real].any(), name
  np.testing.assert_array_equal(used, packer.used_S)


@given(DOCUMENTS, _capacities())
def test_levels_are_the_whole_documents_but_for_the_first(texts, capacities):
  pieces, rows, _ = _pack(texts, capacities)
  for row, row_pieces in zip(rows, pieces, strict=True):
    for index, piece in enumerate(row_pieces, start=1):
      text = texts[piece.document]
      inside = row["documents"] == index
      expected = [2, *SPLITTER.levels(text)][piece.start : piece.stop]
      expected[0] = 2
      assert row["levels"][inside].tolist() == expected
      read = [BOS, *text][piece.start : piece.stop]
      assert row["bytes"][inside].tolist() == read


@given(DOCUMENTS, _capacities())
def test_what_fits_the_rest_of_a_row_is_not_cut(texts, capacities):
  pieces, _, _ = _pack(texts, capacities)
  for row in pieces:
    used = np.zeros(3, int)
    for piece in row:
      text = texts[piece.document]
      if piece.stop <= len(text):
        rest = _size(text, piece.start, len(text) + 1)
        assert (used + rest > capacities).any()
      used += _size(text, piece.start, piece.stop)


@given(DOCUMENTS, _capacities())
@settings(max_examples=30)
def test_only_the_last_rows_have_room_left(texts, capacities):
  pieces, _, _ = _pack(texts, capacities)
  for row in pieces[:-1]:
    used = sum(_size(texts[p.document], p.start, p.stop) for p in row)
    free = capacities - used
    assert (free <= packing.SLACK * np.array(capacities)).any()


def test_a_document_of_many_rows_and_one_of_none():
  long = b"word " * 50_000
  pieces, _, packer = _pack([b"", long, b""], (1024, 160, 64))
  assert sum(len(row) for row in pieces) - 3 == len(pieces) - 1
  assert packer.used_S[2] / (64 * len(pieces)) > 0.99


@pytest.mark.parametrize("rules", [[], ["word@1"], ["word@1", "pretok"]])
def test_real_rules_of_any_number_of_stages(rules):
  splitter = Splitter(rules)
  capacities = (64, 20, 16)[: len(rules) + 1]
  texts = [b"One word, two words; 345 of them.\n" * n for n in range(9)]
  rows = packing.pack_documents(texts, splitter, capacities)
  targets = np.concatenate([row["targets"][row["weights"] > 0] for row in rows])
  assert len(targets) == sum(len(text) + 1 for text in texts)
  for row in rows:
    real = row["weights"] > 0
    counts = [
      (real & (row["levels"] >= i)).sum() for i in range(len(rules) + 1)
    ]
    assert (np.array(counts) <= capacities).all()


def test_the_picture_in_the_documentation():
  splitter = Splitter(["word@1", "word@2"])
  texts = [b"Go on!", b"The cat sat on it."]
  first, second = packing.pack_documents(texts, splitter, (18, 6, 4))
  names = {BOS: "B", EOS: "E", ord(" "): "_"}

  def show(ids):
    return "".join(names.get(i, chr(i)) for i in ids.tolist())

  assert show(first["bytes"]) == "BGo_on!BThe_cat_sa"
  assert show(first["targets"]) == "Go_on!EThe_cat_sat"
  assert "".join(map(str, first["levels"])) == "200100220001000200"
  assert show(second["bytes"][:8]) == "t_on_it."
  assert show(second["targets"][:8]) == "_on_it.E"
  assert "".join(map(str, second["levels"][:8])) == "21002002"
  assert second["weights"].sum() == 8


def test_capacities_must_match_the_splitter():
  with pytest.raises(ValueError, match=r"2 capacities .* feeds 2 stages"):
    packing.Packer(SPLITTER, (8, 4))
  with pytest.raises(ValueError, match="must all be >= 1"):
    packing.Packer(SPLITTER, (8, 4, 0))


@given(DOCUMENTS, _capacities())
def test_documents_that_fit_a_row_can_be_kept_in_one_piece(texts, capacities):
  packer = packing.Packer(SPLITTER, capacities, keep_documents=True)
  rows = [row for n, text in enumerate(texts) for row in packer.add(n, text)]
  rows += packer.finish()
  spans = {}
  for row in rows:
    for number, piece in enumerate(row):
      spans.setdefault(piece.document, []).append((piece.start, piece.stop))
      if piece.stop <= len(texts[piece.document]):  # cut: the row is its own
        assert (number, len(row)) == (0, 1)
  for document, text in enumerate(texts):
    fits = (_size(text, 0, len(text) + 1) <= capacities).all()
    assert (len(spans[document]) == 1) == fits
    assert sorted(spans[document])[0][0] == 0
    assert sum(stop - start for start, stop in spans[document]) == len(text) + 1


@pytest.mark.parametrize("size", [1, 20, 60])
def test_many_tiny_documents_fill_their_rows(size):
  row_length = 32_768
  packer = packing.Packer(Splitter([]), (row_length,))
  rows = []
  for number in range(6 * row_length // (size + 1)):
    rows += packer.add(number, b"x" * size)
  rows += packer.finish()
  for row in rows[:-1]:
    assert sum(p.stop - p.start for p in row) > 0.98 * row_length


def test_rows_come_while_documents_do(monkeypatch):
  monkeypatch.setattr(packing, "WINDOW_ROWS", 2)
  packer = packing.Packer(SpaceSplitter(), (24, 8, 4))
  rows = [list(packer.add(n, b"x" * 11)) for n in range(20)]
  # Rows of two documents; each that comes beyond two rows of text closes one.
  assert [len(found) for found in rows] == [0] * 4 + [1, 0] * 8
  assert len(list(packer.finish())) == 2


def test_the_largest_document_is_cut_not_the_oldest():
  packer = packing.Packer(SpaceSplitter(), (24, 8, 4))
  for number, size in enumerate([11, 12, 14]):
    assert not list(packer.add(number, b"x" * size))
  first, second = packer.finish()
  spans = [[(p.document, p.start, p.stop) for p in r] for r in (first, second)]
  assert spans == [[(0, 0, 12), (2, 0, 12)], [(1, 0, 13), (2, 12, 15)]]


@pytest.mark.parametrize("eos", [255, 2**15 - 1, 2**15, 2**15 + 5, 2**16])
def test_large_ids_of_tokens_are_kept(eos):
  piece = packing.Piece(0, 0, 3, np.zeros(1, np.int32))
  units = [np.array([1, 2], np.uint32)]
  row = packing.fill_row([piece], units, SpaceSplitter(), 4, eos - 1, eos)
  assert row["bytes"].tolist() == [eos - 1, 1, 2, 0]
  assert row["targets"].tolist() == [1, 2, eos, 0]
