"""Loaders: exact epochs, exact resume, mixtures in their shares."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_corpora import CAPACITIES, different, open_corpora, open_texts, write

from aunet_jax import config
from aunet_jax.data.loader import evaluation_batches, make_loader


def _rows(batch):
  """Every row of a batch that holds text, as hashable bytes."""
  keys = [
    np.stack([batch[name][i] for name in sorted(batch)]).tobytes()
    for i in range(len(batch["bytes"]))
    if batch["weights"][i].any()
  ]
  return collections.Counter(keys)


def _take(loaders, num_batches):
  """Rows that a group of processes gets in so many steps."""
  rows = collections.Counter()
  for _ in range(num_batches):
    for loader in loaders:
      rows += _rows(next(loader))
  return rows


def _loaders(corpus, count, batch_size=4, seed=1, **settings):
  return [
    make_loader(
      corpus,
      seed=seed,
      batch_size=batch_size,
      share_index=index,
      share_count=count,
      **settings,
    )
    for index in range(count)
  ]


def _close(loaders):
  for loader in loaders:
    loader.close()


def _all_rows(corpus):
  return collections.Counter(
    np.stack([row[name] for name in sorted(row)]).tobytes()
    for row in map(corpus.row, range(corpus.num_rows))
  )


# ----- epochs and resume ----------------------------------------------------


@given(
  lengths=st.lists(
    st.integers(0, 30) | st.integers(0, 1200), min_size=1, max_size=25
  ),
  capacities=st.sampled_from([CAPACITIES, (24, 24, 24), (40, 3, 1), (7, 7, 2)]),
  processes=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 4), (4, 2)]),
  stop=st.integers(0, 1000),
  seed=st.integers(0, 2**40),
)
@settings(max_examples=25, deadline=None)
def test_an_epoch_is_every_byte_once_across_a_stop_at_other_processes(
  tmp_path_factory, lengths, capacities, processes, stop, seed
):
  texts = [f"{i} ".ljust(n, "a")[:n] for i, n in enumerate(lengths)]
  tmp_path = tmp_path_factory.mktemp("epoch")
  if not any(texts):
    with pytest.raises(ValueError, match="no documents to train on"):
      open_texts(tmp_path, texts)
    return
  corpus, _ = open_texts(tmp_path, texts, capacities=capacities)
  num_batches = -(-corpus.num_rows // 4)
  stop = stop % (num_batches + 1)
  before, after = (_loaders(corpus, count, seed=seed) for count in processes)
  rows = _take(before, stop)
  states = [json.loads(json.dumps(loader.get_state())) for loader in before]
  assert all(state == states[0] for state in states)
  for loader in after:
    loader.set_state(states[0])
  rows += _take(after, num_batches - stop)
  assert rows == _all_rows(corpus)
  assert _take(after, num_batches) == rows  # the next epoch has the same rows
  _close(before + after)
  # Rows hold each position of each document once, and its target.
  (store,) = corpus.stores
  positions = collections.Counter(
    (piece.document, position)
    for index in range(corpus.num_rows)
    for piece in store.pieces(index)
    for position in range(piece.start, piece.stop)
  )
  kept = [text for text in texts if text]
  assert positions == collections.Counter(
    (number, position)
    for number, text in enumerate(kept)
    for position in range(len(text) + 1)
  )
  targets = collections.Counter()
  for index in range(corpus.num_rows):
    row = corpus.row(index)
    targets.update(row["targets"][row["weights"] > 0].tolist())
  expected = collections.Counter(b"".join(t.encode() for t in texts))
  expected[config.EOS] = sum(map(bool, texts))
  assert targets == expected


def test_epochs_are_shuffled_by_seed_and_differ(tmp_path):
  corpus, _ = open_texts(tmp_path, different(30))
  steps = -(-corpus.num_rows // 4)

  def order(seed):
    (loader,) = _loaders(corpus, 1, seed=seed)
    batches = [next(loader)["bytes"].tobytes() for _ in range(2 * steps)]
    loader.close()
    return batches[:steps], batches[steps:]

  first, second = order(1)
  assert first != second
  assert order(1) == (first, second)
  assert order(2)[0] != first
  assert order(65)[0] != first  # all bits of a seed count
  whole = make_loader(corpus, seed=1, batch_size=4)  # one process reads all
  assert [next(whole)["bytes"].tobytes() for _ in first] == first
  whole.close()


def test_resuming_gives_the_same_batches_in_the_same_order(tmp_path):
  corpus, _ = open_texts(tmp_path, different(30))
  (loader,) = _loaders(corpus, 1)
  for _ in range(7):
    next(loader)
  state = loader.get_state()
  expected = [next(loader) for _ in range(9)]
  loader.set_state(state)  # the same loader, rewound
  (other,) = _loaders(corpus, 1)
  other.set_state(state)
  for batch in expected:
    for again in (next(loader), next(other)):
      for name, array in batch.items():
        np.testing.assert_array_equal(again[name], array)
  _close([loader, other])


def test_worker_processes_change_nothing(tmp_path):
  corpus, _ = open_texts(tmp_path, different(40))
  (alone,) = _loaders(corpus, 1)
  expected = [next(alone) for _ in range(8)]
  state = None
  for num_workers in (1, 2):
    (loader,) = _loaders(corpus, 1, num_workers=num_workers)
    if state is not None:  # taken with another number of workers
      loader.set_state(state)
    for batch in expected[4:] if state else expected[:4]:
      again = next(loader)
      for name, array in batch.items():
        np.testing.assert_array_equal(again[name], array)
    state = loader.get_state()
    loader.close()
  alone.close()


@pytest.mark.slow  # it starts many processes
@pytest.mark.parametrize("before", [(1, 2), (2, 1), (4, 0)])
@pytest.mark.parametrize("after", [(1, 0), (2, 2), (4, 1)])
def test_an_epoch_across_other_processes_and_workers(tmp_path, before, after):
  corpus, _ = open_texts(tmp_path, different(60))
  num_batches = -(-corpus.num_rows // 8)
  first, second = (
    _loaders(corpus, count, batch_size=8, num_workers=num_workers)
    for count, num_workers in (before, after)
  )
  rows = _take(first, num_batches // 3)
  for loader in second:
    loader.set_state(first[-1].get_state())
  rows += _take(second, num_batches - num_batches // 3)
  _close(first + second)
  assert rows == _all_rows(corpus)


def test_another_corpus_seed_or_batch_size_refuses_a_state(tmp_path):
  corpus, _ = open_texts(tmp_path / "a", different(30))
  other, _ = open_texts(tmp_path / "b", different(31))
  (loader,) = _loaders(corpus, 1)
  state = loader.get_state()
  for changed in (
    _loaders(other, 1),
    _loaders(corpus, 1, seed=2),
    _loaders(corpus, 1, batch_size=8),
  ):
    with pytest.raises(ValueError, match="would repeat or skip text"):
      changed[0].set_state(state)


def test_processes_must_share_a_batch_evenly(tmp_path):
  corpus, _ = open_texts(tmp_path, different(5))
  with pytest.raises(ValueError, match="do not divide over the 3 groups"):
    make_loader(corpus, seed=0, batch_size=8, share_count=3)
  with pytest.raises(ValueError, match=r"must be in \[0, 2\)"):
    make_loader(corpus, seed=0, batch_size=8, share_index=2, share_count=2)


def test_a_batch_that_fits_no_machine_is_refused_before_a_row_is_read(tmp_path):
  corpus, _ = open_texts(tmp_path, different(5))
  for make in (
    lambda **size: make_loader(corpus, seed=0, **size),
    lambda **size: next(evaluation_batches(corpus, **size)),
  ):
    with pytest.raises(ValueError, match="10,000,000,000 rows of 24 positions"):
      make(batch_size=10**10)
    with pytest.raises(ValueError, match="5,000,000,000 rows"):
      make(batch_size=10**10, share_count=2)


# ----- mixtures and held-out text -------------------------------------------


def test_a_mixture_gives_each_source_its_share_of_the_bytes(tmp_path):
  # Rows of the first hold 23 bytes; of the second, with more words, fewer.
  first = write(tmp_path / "first.jsonl", ["x" * 23] * 100)
  second = write(tmp_path / "second.jsonl", ["y y " * 20] * 60)
  items = [{"path": first, "weight": 3}, {"path": second, "weight": 1}]
  corpus, _ = open_corpora(tmp_path, items)
  assert corpus.weights == (0.75, 0.25)
  (loader,) = _loaders(corpus, 1)
  counts = collections.Counter()
  for _ in range(200):
    counts.update(next(loader)["targets"].ravel().tolist())
  loader.close()
  xs, ys = counts[ord("x")], counts[ord("y")] + counts[ord(" ")]
  assert abs(xs / (xs + ys) - 0.75) < 0.02


def test_a_mixture_passes_over_each_source_exactly(tmp_path):
  small = write(tmp_path / "small.jsonl", different(9, seed=1))
  large = write(tmp_path / "large.jsonl", different(30, seed=2))
  items = [{"path": small, "weight": 0.5}, {"path": large, "weight": 0.5}]
  corpus, _ = open_corpora(tmp_path, items)
  part = corpus.stores[0]
  own = _all_rows(dataclasses.replace(corpus, stores=(part,), weights=None))
  (loader,) = _loaders(corpus, 1, batch_size=1)
  seen = collections.Counter()
  while seen.total() < 3 * part.num_rows:
    for row in _rows(next(loader)):
      if row in own:
        seen[row] += 1
  loader.close()
  assert seen == collections.Counter({row: 3 * n for row, n in own.items()})


def test_a_mixture_is_shuffled_by_its_seed(tmp_path):
  small = write(tmp_path / "small.jsonl", different(9, seed=1))
  large = write(tmp_path / "large.jsonl", different(30, seed=2))
  items = [{"path": small, "weight": 1}, {"path": large, "weight": 2}]
  corpus, _ = open_corpora(tmp_path, items)
  orders = set()
  for seed in (1, 2, 65, 2**32 - 1):
    (loader,) = _loaders(corpus, 1, seed=seed)
    orders.add(tuple(next(loader)["bytes"].tobytes() for _ in range(5)))
    loader.close()
  assert len(orders) == 4


def test_a_mixture_resumes_at_other_processes(tmp_path):
  small = write(tmp_path / "small.jsonl", different(9, seed=1))
  large = write(tmp_path / "large.jsonl", different(30, seed=2))
  items = [{"path": small, "weight": 1}, {"path": large, "weight": 2}]
  corpus, _ = open_corpora(tmp_path, items)
  (alone,) = _loaders(corpus, 1)
  expected = [_rows(next(alone)) for _ in range(12)]
  two, four = _loaders(corpus, 2), _loaders(corpus, 4)
  got = [_take(two, 1) for _ in range(5)]
  for loader in four:
    loader.set_state(two[1].get_state())
  got += [_take(four, 1) for _ in range(7)]
  assert got == expected
  _close([alone, *two, *four])


def test_evaluation_batches_are_every_row_once(tmp_path):
  corpus, _ = open_texts(tmp_path, different(30))
  assert corpus.num_rows % 8  # so that the last batch is not full
  for count in (1, 2, 4):
    rows = collections.Counter()
    lengths = set()
    for index in range(count):
      batches = list(
        evaluation_batches(
          corpus, batch_size=8, share_index=index, share_count=count
        )
      )
      lengths.add(len(batches))
      rows += sum(map(_rows, batches), collections.Counter())
    assert rows == _all_rows(corpus)
    assert lengths == {-(-corpus.num_rows // 8)}
  some = evaluation_batches(
    corpus, batch_size=4, max_bytes=corpus.num_bytes // 3
  )
  rows = sum(map(_rows, some), collections.Counter())
  assert rows <= _all_rows(corpus)
  assert abs(rows.total() - corpus.num_rows / 3) <= 1
  for max_bytes, expected in (
    (1, 1),
    (10 * corpus.num_bytes, corpus.num_rows),
  ):
    some = evaluation_batches(corpus, batch_size=4, max_bytes=max_bytes)
    rows = sum(map(_rows, some), collections.Counter())
    assert rows <= _all_rows(corpus) and rows.total() == expected


def test_memory_stays_flat(tmp_path):
  # Freed memory goes back to the system or is used again: after many epochs
  # a loader holds what it held after the first.
  corpus, _ = open_texts(tmp_path, different(200))
  (loader,) = _loaders(corpus, 1, batch_size=32)

  def resident():
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1])

  for _ in range(200):
    next(loader)
  before = resident()
  for _ in range(800):
    next(loader)
  after = resident()
  loader.close()
  assert after < 1.05 * before
