"""Index arithmetic between stages, against loops one can check by eye.

Letters: B batch, L positions, S slots, D width.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aunet_jax.aunet.segments import (
  piece_positions,
  piece_starts,
  segment,
  take,
)

L = 12
ROWS = st.lists(st.booleans(), min_size=L, max_size=L)


def segments_of(row, num_slots):
  """The segments of one row by a plain loop."""
  kept, slot, offset = [], [], []
  for t, boundary in enumerate(row):
    if boundary and len(kept) < num_slots:
      kept.append(t)
    slot.append(max(len(kept) - 1, 0))
    offset.append(t - kept[-1] if kept else t)
  return kept, slot, offset


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(ROWS, min_size=2, max_size=2))
@pytest.mark.parametrize("num_slots", [1, 5, L])
def test_segments_are_those_of_a_loop(num_slots, rows):
  segments = segment(np.array(rows), num_slots)
  for b, row in enumerate(rows):
    kept, slot, offset = segments_of(row, num_slots)
    filler = num_slots - len(kept)
    assert segments.index_BS[b].tolist() == kept + [0] * filler
    assert (
      segments.filled_BS[b].tolist() == [True] * len(kept) + [False] * filler
    )
    assert segments.boundary_BL[b].tolist() == [t in kept for t in range(L)]
    assert segments.slot_BL[b].tolist() == slot
    assert segments.offset_BL[b].tolist() == offset


def test_down_and_up_are_these_two_matrices():
  boundary_BL = np.array([[1, 0, 0, 1, 1, 0]], bool)
  down_SL = np.array(
    [
      [1, 0, 0, 0, 0, 0],
      [0, 0, 0, 1, 0, 0],
      [0, 0, 0, 0, 1, 0],
    ]
  )
  up_LS = np.array(
    [
      [1, 0, 0],
      [1, 0, 0],
      [1, 0, 0],
      [0, 1, 0],
      [0, 0, 1],
      [0, 0, 1],
    ]
  )
  x_BLD = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
  segments = segment(boundary_BL, 3)
  x_BSD = take(x_BLD, segments.index_BS)
  np.testing.assert_array_equal(x_BSD[0], down_SL @ x_BLD[0])
  y_BLD = take(x_BSD, segments.slot_BL)
  np.testing.assert_array_equal(y_BLD[0], up_LS @ down_SL @ x_BLD[0])


def test_pooling_everywhere_is_the_identity():
  segments = segment(np.ones((2, L), bool), L)
  identity_BL = np.tile(np.arange(L), (2, 1))
  np.testing.assert_array_equal(segments.index_BS, identity_BL)
  np.testing.assert_array_equal(segments.slot_BL, identity_BL)
  np.testing.assert_array_equal(segments.offset_BL, np.zeros((2, L)))
  assert segments.filled_BS.all() and segments.boundary_BL.all()


def test_boundaries_past_the_capacity_leave_the_first_ones():
  row = np.ones((1, L), bool)
  segments = segment(row, 3)
  assert segments.index_BS.tolist() == [[0, 1, 2]]
  assert segments.slot_BL.tolist() == [[0, 1, *[2] * 10]]
  assert segments.offset_BL.tolist() == [[0, 0, *range(10)]]


def test_pieces_start_where_the_document_changes():
  documents_BL = np.array([[7, 7, 7, 3, 3, 0, 0, 7], [0, 0, 1, 2, 2, 2, 2, 2]])
  assert piece_starts(documents_BL).astype(int).tolist() == [
    [1, 0, 0, 1, 0, 1, 0, 1],
    [1, 0, 1, 1, 0, 0, 0, 0],
  ]
  assert piece_positions(documents_BL).tolist() == [
    [0, 1, 2, 0, 1, 0, 1, 0],
    [0, 1, 0, 0, 1, 2, 3, 4],
  ]
