"""Parquet and Arrow: any bytes, nested columns, damage in a part."""

import io
import json
import sys
import tarfile
import types

import numpy as np
import pytest
from read_all import read_all

from aunet_jax.data import remote

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def _unchecked(values):
  """Strings of any bytes, as other writers make them."""
  offsets = np.cumsum([0] + [len(v) for v in values]).astype("<i4")
  return pa.StringArray.from_buffers(
    len(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(values))
  )


VALUES = [b"fine", b"caf\xe9", "größer".encode(), b"\xff\xfe"]


def _write(path, table):
  if path.suffix == ".parquet":
    # A dictionary that the Arrow schema asks for would be checked in reading.
    parquet.write_table(table, path, row_group_size=2, store_schema=False)
  elif path.suffix == ".arrow":
    with pa.ipc.new_file(path, table.schema) as writer:
      writer.write_table(table, 2)
  else:
    with pa.ipc.new_stream(path, table.schema) as writer:
      writer.write_table(table, 2)


NAMES = ["a.parquet", "a.arrow", "a.stream"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dictionary", [False, True])
def test_text_that_is_no_utf8_is_its_bytes(tmp_path, name, dictionary):
  column = _unchecked(VALUES)
  if dictionary:
    indices = pa.array([0, 1, 2, 3], pa.int8())
    column = pa.DictionaryArray.from_arrays(indices, column)
  _write(tmp_path / name, pa.table({"text": column}))
  assert read_all(tmp_path / name) == (VALUES, [])


@pytest.mark.parametrize("name", NAMES)
def test_large_types_and_nested_columns(tmp_path, name):
  struct = pa.StructArray.from_arrays([_unchecked(VALUES)], ["text"])
  turns = [[{"c": "a"}, {"c": "b"}], [], None, [{"c": None}]]
  table = pa.table(
    {
      "text": pa.array(["a", "b", None, ""], pa.large_string()),
      "meta": struct,
      "turns": turns,
      "a.b": ["1", "2", "3", "4"],
      "n": [10**15] * 4,
    }
  )
  path = tmp_path / name
  _write(path, table)
  texts, skips = read_all(path)
  assert texts == [b"a", b"b"]
  assert [s.reason for s in skips] == ["null text", "empty"]
  assert read_all(path, "meta.text") == (VALUES, [])
  texts, skips = read_all(path, "turns.c")
  assert texts == [b"a\nb"]
  assert [s.reason for s in skips] == ["empty", "null text", "empty"]
  assert read_all(path, "a.b")[0] == [b"1", b"2", b"3", b"4"]
  assert read_all(path, "body")[1][0].reason == "no text field"


def test_a_damaged_row_group_does_not_take_the_next_ones(tmp_path):
  texts = [f"document {n} " * 50 for n in range(40)] + [None]
  path = tmp_path / "a.parquet"
  parquet.write_table(
    pa.table({"text": texts}),
    path,
    row_group_size=10,
    use_dictionary=False,
    compression="none",
    write_page_checksum=True,
  )
  data = bytearray(path.read_bytes())
  data[data.index(b"document 15 ")] ^= 1
  path.write_bytes(data)
  found, (skip, null) = read_all(path)
  assert null[:2] == (f"{path}:41", "null text")
  expected = [t.encode() for t in texts[:-1]]
  assert found == expected[:10] + expected[20:]
  assert skip[:2] == (f"{path}:11", "corrupt file")
  assert skip.lost_bytes == pytest.approx(len(data) / 4, rel=0.1)


def test_an_arrow_stream_without_its_end_is_damaged(tmp_path):
  path = tmp_path / "a.arrow"
  table = pa.table({"text": ["one", "two", "three"]})
  with pa.ipc.new_stream(path, table.schema) as writer:
    writer.write_table(table, 1)
  whole = path.read_bytes()
  path.write_bytes(whole[:-8])
  texts, (skip,) = read_all(path)
  assert texts == [b"one", b"two", b"three"] and skip.reason == "corrupt file"
  path.write_bytes(whole[: len(whole) // 2])
  texts, (skip,) = read_all(path)
  assert texts == [b"one"] and skip.reason == "corrupt file"
  path.write_bytes(whole + whole)
  assert read_all(path) == ([b"one", b"two", b"three"] * 2, [])
  path.write_bytes(whole + b"garbage")
  texts, (skip,) = read_all(path)
  assert len(texts) == 3 and skip.reason == "corrupt file"


def test_tables_inside_what_cannot_seek(tmp_path):
  import gzip

  buffer = io.BytesIO()
  parquet.write_table(pa.table({"text": ["a", "b"]}), buffer)
  data = buffer.getvalue()
  (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(data))
  (tmp_path / "b.txt").write_bytes(data)
  with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
    member = tarfile.TarInfo("d.parquet")
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
  assert read_all(tmp_path) == ([b"a", b"b"] * 3, [])


def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch):
  _write(tmp_path / "a.parquet", pa.table({"text": ["a"]}))
  (tmp_path / "a.warc").write_bytes(b"WARC/1.0\r\n")
  for module in ("pyarrow.parquet", "warcio.archiveiterator", "datasets"):
    monkeypatch.setitem(sys.modules, module, None)
  for path, extra in (
    (tmp_path / "a.parquet", "parquet"),
    (tmp_path / "a.warc", "warc"),
    ("hf:name", "hf"),
  ):
    with pytest.raises(ValueError, match=rf"aunet_jax\[{extra}\]"):
      read_all(path)


# ----- datasets -------------------------------------------------------------


@pytest.fixture
def datasets(monkeypatch):
  """A stand-in for the library: notes what is asked for, gives records."""
  module = types.ModuleType("datasets")
  module.asked, module.records = [], [{"text": "a"}, {"text": None}, {}]

  def load_dataset(name, config=None, *, split, streaming):
    module.asked.append((name, config, split, streaming))
    if name == "missing":
      raise FileNotFoundError("no such dataset")
    return module.records

  module.load_dataset = load_dataset
  monkeypatch.setitem(sys.modules, "datasets", module)
  return module


@pytest.mark.parametrize(
  "spec, asked",
  [
    ("hf:owner/name", ("owner/name", None, "train", True)),
    ("hf:name:test", ("name", None, "test", True)),
    ("hf:name:en:test", ("name", "en", "test", True)),
  ],
)
def test_a_dataset_its_configuration_and_split(datasets, spec, asked):
  texts, skips = read_all(spec)
  assert datasets.asked == [asked] and texts == [b"a"]
  assert [s[:2] for s in skips] == [
    (f"{spec}:2", "null text"),
    (f"{spec}:3", "no text field"),
  ]


@pytest.mark.parametrize("spec", ["hf:", "hf:a::b", "hf:a:b:c:d", "hf:missing"])
def test_a_dataset_that_is_not_there_is_an_error(datasets, spec):
  with pytest.raises(ValueError, match="must be hf:|cannot open hf:missing"):
    read_all(spec)


def test_a_dataset_that_breaks_off_may_be_tried_again(datasets):
  def records():
    yield {"text": "a"}
    raise TimeoutError("no answer")

  datasets.records = records()
  with pytest.raises(remote.ReadError, match="hf:name:2 failed: no answer"):
    read_all("hf:name")


def test_nested_fields_of_a_dataset(datasets):
  datasets.records = [{"m": [{"c": "a"}, {"c": "b"}]}]
  assert json.dumps(datasets.records)
  assert read_all("hf:name", "m.c") == ([b"a\nb"], [])
