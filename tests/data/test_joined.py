"""Stores read as one: rows, counts, and damage of any part."""

import pickle

import numpy as np
import pytest
from toy_corpora import CAPACITIES, SPLITTER, different

from aunet_jax.data import blocks, joined, reading, store


@pytest.fixture
def opened(tmp_path):
  """(directory, [stores], joined)."""
  directory = tmp_path / "index" / "train"
  for name, count in (("a", 30), ("b", 1), ("c", 50)):
    with store.StoreWriter(directory / name, SPLITTER, CAPACITIES) as writer:
      for text in different(count, seed=count):
        data = text.encode()
        writer.add(name, data, reading.document_digest(data))
      writer.finish()
  joined.join(directory, ["c", "a", "b"])
  stores = [store.Store(directory / name, SPLITTER) for name in "cab"]
  return directory, stores, joined.open_store(directory, SPLITTER)


def test_it_reads_as_its_stores_one_after_the_other(opened):
  _, stores, whole = opened
  again = pickle.loads(pickle.dumps(whole))  # as worker processes get it
  rows = [part.row(n) for part in stores for n in range(part.num_rows)]
  assert whole.num_rows == len(rows)
  for number in reversed(range(len(rows))):
    for name, array in rows[number].items():
      np.testing.assert_array_equal(whole.row(number)[name], array)
      np.testing.assert_array_equal(again.row(number)[name], array)
  assert [len(whole.pieces(n)) for n in range(len(rows))] == [
    len(part.pieces(n)) for part in stores for n in range(part.num_rows)
  ]
  assert list(whole.documents()) == [d for p in stores for d in p.documents()]
  assert whole.sizes().tolist() == [n for p in stores for n in p.sizes()]
  for name in ("num_pieces", "num_documents", "num_bytes", "num_cuts"):
    assert whole.summary[name] == store.total(stores, name)
  used = np.sum([part.summary["used"] for part in stores], axis=0)
  assert whole.summary["used"] == used.tolist()


def test_order_and_content_make_the_fingerprint(opened):
  directory, _, whole = opened
  joined.join(directory, ["a", "b", "c"])
  other = joined.open_store(directory, SPLITTER)
  assert other.summary["fingerprint"] != whole.summary["fingerprint"]
  assert other.summary["content"] != whole.summary["content"]


def test_a_part_is_opened_when_it_is_read(opened):
  directory, stores, whole = opened
  last = directory / "b" / "rows.bin"
  last.write_bytes(last.read_bytes()[:-1])
  assert whole.row(0)
  with pytest.raises(blocks.DamagedError, match="data index .*index is dam"):
    whole.row(whole.num_rows - 1)


def test_a_part_of_another_index_is_refused(opened):
  directory, _, whole = opened
  (directory / "b").rename(directory / "x")
  (directory / "a").rename(directory / "b")
  with pytest.raises(blocks.DamagedError, match="b is of another index"):
    whole.row(whole.num_rows - 1)


@pytest.mark.parametrize("change", ['"num_rows": 1', '"parts": 3'])
def test_a_summary_that_was_changed_is_refused(opened, change):
  directory, _, _ = opened
  path = directory / "summary.json"
  said = store.read_json(path)
  said["parts"][0]["num_rows"] += 1
  store.write_json(path, said)
  with pytest.raises(blocks.DamagedError, match="its parts hold"):
    joined.open_store(directory, SPLITTER)
  path.write_text("{" + change + "}")
  with pytest.raises(blocks.DamagedError, match="delete that directory"):
    joined.open_store(directory, SPLITTER)
