"""Windows of documents: what a row can hold, each position scored once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aunet_jax.config import BOS, EOS
from aunet_jax.evaluate import windows
from aunet_jax.splitting.splitter import Splitter

SPLITTER = Splitter(["word@1", "word@2"])
TEXT = st.text("ab1 .\n", max_size=60).map(str.encode)
ROWS = st.tuples(st.integers(2, 24), st.integers(1, 9), st.integers(1, 5))


def of(text, capacities, stride=None, number=0):
  units = np.frombuffer(text, np.uint8)
  splitter = Splitter(["word@1", "word@2"][: len(capacities) - 1])
  return list(windows.windows(number, units, splitter, capacities, stride))


@settings(deadline=None)
@given(text=TEXT, capacities=ROWS, stride=st.none() | st.integers(1, 24))
def test_every_position_is_scored_once_and_no_stage_is_overfull(
  text, capacities, stride
):
  inputs = [BOS, *text]
  targets = [*text, EOS]
  levels = [2, *SPLITTER.levels(text)]
  scored = []
  for window in of(text, capacities, stride):
    span = slice(window.start, window.stop)
    assert window.inputs.tolist() == inputs[span]
    assert window.targets.tolist() == targets[span]
    assert window.levels.tolist() == [2, *levels[span][1:]]
    for stage, capacity in enumerate(capacities):
      assert (window.levels >= stage).sum() <= capacity
    # It could not have held one more.
    if window.stop < len(inputs):
      more = np.array([2, *levels[window.start + 1 : window.stop + 1]])
      assert any(
        (more >= stage).sum() > capacity
        for stage, capacity in enumerate(capacities)
      )
    scored += range(window.scored, window.stop)
  assert scored == list(range(len(inputs)))


@settings(deadline=None)
@given(text=TEXT)
def test_a_document_that_fits_is_one_window_whatever_the_row(text):
  for capacities in ((61, 61, 61), (500, 400, 300)):
    (window,) = of(text, capacities)
    assert (window.start, window.stop) == (0, len(text) + 1)


def test_windows_of_a_stride_overlap_by_the_rest():
  found = of(b"x" * 39, (16,), stride=4)
  assert [(w.start, w.stop, w.scored) for w in found] == [
    (0, 16, 0), (4, 20, 16), (8, 24, 20), (12, 28, 24), (16, 32, 28),
    (20, 36, 32), (24, 40, 36),
  ]  # fmt: skip


@settings(deadline=None)
@given(
  texts=st.lists(TEXT, min_size=1, max_size=6),
  stride=st.none() | st.integers(1, 9),
)
def test_rows_hold_every_window_in_order(texts, stride):
  capacities = (24, 9, 5)
  some = [
    window
    for number, text in enumerate(texts)
    for window in of(text, capacities, stride, number)
  ]
  rows = list(windows.rows(some, capacities))
  assert [w for row in rows for w in row] == some
  arrays = windows.batch(rows, len(rows) + 1, 24)
  assert arrays["weights"].sum() == sum(len(text) + 1 for text in texts)
  for stage, capacity in enumerate(capacities):
    real = (arrays["documents"] > 0) & (arrays["levels"] >= stage)
    assert real.sum(axis=1).max() <= capacity
  eos = (arrays["targets"] == EOS) & (arrays["weights"] > 0)
  assert eos.sum() == len(texts)
  assert not arrays["documents"][-1].any()


@pytest.mark.parametrize("capacities", [(8,), (8, 8), (1, 1)])
def test_an_empty_document_is_a_window_of_eos(capacities):
  (window,) = of(b"", capacities)
  assert window.inputs.tolist() == [BOS] and window.targets.tolist() == [EOS]
