"""A store gives what was written, or says that it is damaged."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_splitter import SpaceSplitter

from aunet_jax.data import blocks, reading, store

SPLITTER = SpaceSplitter()
CAPACITIES = (24, 8, 4)
MESSAGE = "delete that directory to rebuild it"


def write(directory, texts, splitter=SPLITTER, capacities=CAPACITIES):
  with store.StoreWriter(directory, splitter, capacities) as writer:
    for number, text in enumerate(texts):
      writer.add(f"name {number}", text, reading.document_digest(text))
    writer.finish()


def contents(directory) -> list:
  """Everything a store gives."""
  opened = store.Store(directory, SPLITTER)
  rows = [opened.row(i) for i in range(opened.num_rows)]
  return [
    opened.summary,
    [{name: x.tolist() for name, x in row.items()} for row in rows],
    list(opened.documents()),
    [block.tolist() for block in opened.digests()],
    opened.sizes().tolist(),
  ]


@pytest.fixture(scope="module")
def texts():
  rng = np.random.default_rng(0)
  return [
    b" ".join([b"%03d" % number] * rng.integers(0, 20)) for number in range(30)
  ]


@pytest.fixture(scope="module")
def original(tmp_path_factory, texts):
  directory = tmp_path_factory.mktemp("index") / "train"
  write(directory, texts)
  return directory


def test_documents_come_back(original, texts):
  opened = pickle.loads(pickle.dumps(store.Store(original, SPLITTER)))
  found = list(opened.documents())
  assert found == [(f"name {i}", text) for i, text in enumerate(texts)]
  assert opened.sizes().tolist() == [len(text) for text in texts]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_is_noticed_or_does_not_matter(
  tmp_path_factory, original, data
):
  copy = tmp_path_factory.mktemp("copy") / "train"
  copy.mkdir()
  for path in original.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  path = copy / data.draw(st.sampled_from([p.name for p in copy.iterdir()]))
  content = bytearray(path.read_bytes())
  position = data.draw(st.integers(0, len(content) - 1))
  content[position] ^= data.draw(st.integers(1, 255))
  path.write_bytes(content)
  try:
    assert contents(copy) == contents(original)  # spaces of summary.json
  except store.DamagedError as error:
    assert MESSAGE in str(error)
  else:
    assert path.name == "summary.json"


def _rewrite(directory, change, format_number):
  """Applies `change` to a store and, but for the oldest, renews the checks.

  So only the bounds of the numbers are left to notice it.
  """
  arrays = {
    path.name: bytearray(path.read_bytes()) for path in directory.glob("*.bin")
  }
  change(arrays)
  for name, content in arrays.items():
    (directory / name).write_bytes(content)
  summary = store.read_json(directory / "summary.json")
  if format_number == 2:
    summary = {"format": 2} | {
      name: summary[name]
      for name in (
        "fingerprint", "splitter_hash", "capacities", "state_size", "num_rows",
        "num_documents", "num_bytes", "num_cuts", "used",
      )
    }  # fmt: skip
    (directory / "checksums.bin").unlink()
    (directory / "digests.bin").unlink()
    (directory / "summary.json").write_text(json.dumps(summary))
    return
  sums = b""
  for name in summary["files"]:
    writer = blocks.Writer(directory / "scratch")
    writer.write((directory / name).read_bytes())
    sums += writer.finish().tobytes()
    writer.close()
  (directory / "checksums.bin").write_bytes(sums)
  summary["checksum_of_checksums"] = blocks.zlib.crc32(sums)
  store.write_json(directory / "summary.json", summary)


def _set(name, index, value):
  def change(arrays):
    at = index * 8 % len(arrays[name])
    arrays[name][at : at + 8] = value.to_bytes(8, "little", signed=True)

  return change


# A piece is document, start, stop (8 bytes each) and a state of 4 bytes.
def _set_piece(offset, size, value):
  def change(arrays):
    at = 28 * 3 + offset
    content = value.to_bytes(size, "little", signed=True)
    arrays["pieces.bin"][at : at + size] = content

  return change


@pytest.mark.parametrize("format_number", [2, 3])
@pytest.mark.parametrize(
  "change",
  [
    _set_piece(0, 8, 30),  # no such document
    _set_piece(0, 8, -1),
    _set_piece(8, 8, -1),  # start
    _set_piece(8, 8, 1 << 40),
    _set_piece(16, 8, 1 << 40),  # stop
    _set_piece(16, 8, 0),
    _set_piece(24, 4, 1 << 30),  # state
    _set_piece(24, 4, -1),
    _set("documents.bin", 3, 1 << 40),
    _set("documents.bin", 3, -1),
    _set("rows.bin", 1, 1 << 40),
    _set("rows.bin", 1, -1),
    _set("rows.bin", 2, 0),  # the order of rows
  ],
)
def test_numbers_out_of_bounds_never_reach_compiled_code(
  tmp_path, original, change, format_number
):
  copy = tmp_path / "train"
  copy.mkdir()
  for path in original.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  _rewrite(copy, change, format_number)
  with pytest.raises(store.DamagedError, match=MESSAGE):
    opened = store.Store(copy, SPLITTER)
    for index in range(opened.num_rows):
      opened.row(index)


def test_an_index_of_the_format_before_is_read(tmp_path, original):
  copy = tmp_path / "train"
  copy.mkdir()
  for path in original.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  _rewrite(copy, lambda arrays: None, 2)
  old, new = store.Store(copy, SPLITTER), store.Store(original, SPLITTER)
  assert list(old.documents()) == list(new.documents())
  for index in range(new.num_rows):
    for name, array in new.row(index).items():
      np.testing.assert_array_equal(old.row(index)[name], array)


def test_a_format_of_another_version_is_refused(tmp_path, original):
  copy = tmp_path / "train"
  copy.mkdir()
  for path in original.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  summary = store.read_json(copy / "summary.json") | {"format": 99}
  store.write_json(copy / "summary.json", summary)
  with pytest.raises(store.DamagedError, match="its format 99 is not"):
    store.Store(copy, SPLITTER)
