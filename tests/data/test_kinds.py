"""Kinds by name and by first bytes; fields inside records."""

import bz2
import gzip
import io
import json
import lzma

import pytest
from read_all import read_all

from aunet_jax.data import compression, kinds, sources

ROWS = b"".join(
  json.dumps({"text": f"document {n}"}).encode() + b"\n" for n in range(3)
)


def _short(parameter):
  """Bytes are no names of tests; a gzip file's hold the time, too."""
  return "data" if isinstance(parameter, bytes) else None


DOCUMENTS = [b"document 0", b"document 1", b"document 2"]


@pytest.mark.parametrize(
  "name, expected",
  [
    ("a.jsonl", ("jsonl", None)),
    ("A.JSONL.GZ", ("jsonl", ".gz")),
    ("c4.json.gz", ("jsonl", ".gz")),
    ("c4.json", ("text", None)),
    ("a.jsonl.zstd", ("jsonl", ".zst")),
    ("a.jsonl.gzip", ("jsonl", ".gz")),
    ("a.txz", ("tar", ".xz")),
    ("a.tar.bz2", ("tar", ".bz2")),
    ("https://host/a.jsonl.zst?download=true", ("jsonl", ".zst")),
    ("a.parquet?download=true#x", ("parquet", None)),
    ("CC-MAIN.warc.wet.gz", ("warc", ".gz")),
    ("what?.txt", ("text", None)),
    ("what?.csv?download=true", ("csv", None)),
    ("README", ("text", None)),
    ("gzip", ("text", None)),
  ],
)
def test_names(name, expected):
  assert kinds.by_name(name) == expected


@pytest.mark.parametrize(
  "name, data",
  [
    ("a.jsonl.zstd", compression.zstd.compress(ROWS)),
    ("a.jsonl.gzip", gzip.compress(ROWS)),
    ("a.jsonl.lzma", lzma.compress(ROWS, lzma.FORMAT_ALONE)),
    ("a.tbz2", bz2.compress(ROWS)),
    ("a.txt", gzip.compress(ROWS)),
    ("twice.jsonl.gz", gzip.compress(gzip.compress(ROWS))),
    ("a.jsonl.gz", ROWS),  # a server that decompressed what it sent
    ("a.jsonl.gz", bz2.compress(ROWS)),
    ("a.jsonl?download=true", ROWS),
    ("a.json", ROWS),
    ("a.json", b"\n\xef\xbb\xbf{bad\n" + ROWS),
    ("a", ROWS),
  ],
  ids=_short,
)
def test_mislabelled_files_are_read_for_what_they_are(tmp_path, name, data):
  (tmp_path / name).write_bytes(data)
  texts, skips = read_all(tmp_path / name)
  assert texts == DOCUMENTS
  assert [s.reason for s in skips] == ["malformed JSON"] * (b"{bad" in data)


@pytest.mark.parametrize(
  "name, data, reason",
  [
    ("book.epub", b"PK\x03\x04....", "unsupported archive"),
    ("a.txt", b"7z\xbc\xaf\x27\x1c..", "unsupported archive"),
    ("paper.pdf", b"%PDF-1.7\n\x80 mostly text", "not text"),
    ("paper.txt", b"%PDF-1.7\n\x80 mostly text", "not text"),
    ("a.png", b"\x89PNG\r\n\x1a\n....", "not text"),
    ("a.jsonl", b"\x89PNG\r\n\x1a\n....", "not text"),
    ("a.bin", bytes(range(256)), "not text"),
    ("a.txt.gz", gzip.compress(bytes(range(256))), "not text"),
    ("model", b"weights" + bytes(8) + b"and names", "not text"),
    ("packed", b"\x01\x02name\x03of a field\x04" * 9, "not text"),
    ("random", bytes(n * 37 % 256 for n in range(60)), "not text"),
    ("a.txt.br", b"no magic number", "unsupported compression"),
    ("a.txt.lz4", b"\x04\x22\x4d\x18....", "unsupported compression"),
  ],
  ids=_short,
)
def test_what_is_no_text_is_a_counted_skip(tmp_path, name, data, reason):
  (tmp_path / name).write_bytes(data)
  texts, skips = read_all(tmp_path / name)
  assert texts == [] and [skip.reason for skip in skips] == [reason]
  if reason == "not text":
    assert "text:PATH" in skips[0].detail
    inside = gzip.decompress(data) if name.endswith(".gz") else data
    assert read_all(f"text:{tmp_path / name}") == ([inside], [])


@pytest.mark.parametrize(
  "text",
  [
    b"Plain text.\n",
    "größer, 第三".encode(),
    "größer".encode("latin-1"),
    "第三".encode("gb18030"),
    "UTF-16".encode("utf-16"),
    b"one zero \x00 in a line of text",
    b"\x1b[31mred\x1b[0m\x07\x08\f",
    b"BM, MZ and ORC are letters. PK too, and PAR: Rar!",
    b'{"name": "x"}',  # one object without the field
    b'{\n  "text": "pretty"\n}\n',
    b'{"a": 1} is an object\n{"b": 2} too',
  ],
  ids=_short,
)
def test_text_is_text(tmp_path, text):
  (tmp_path / "a.txt").write_bytes(text)
  assert read_all(tmp_path / "a.txt") == ([text], [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize(
  "name, content",
  [
    ("a.jsonl", '{"text": "中a"}\n{"text": "größer"}\n'),
    ("a.txt", '{"text": "中a"}\r\n{"text": "größer"}\r\n'),
    ("a.json", '[{"text": "中a"},\n {"text": "größer"}]'),
    ("a.csv", 'n,text\r\n1,中a\r\n2,"größer"\r\n'),
    ("a.tsv", "n\ttext\n1\t中a\n2\tgrößer\n"),
  ],
)
def test_records_of_other_encodings_are_read(tmp_path, name, content, encoding):
  """A line of UTF-16 begins with half of a line feed: 中a came out as -乡."""
  data = content.encode(encoding)
  texts = ["中a".encode(), "größer".encode()]
  (tmp_path / name).write_bytes(data)
  assert read_all(tmp_path / name) == (texts, [])
  (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
  assert read_all(tmp_path / f"{name}.gz") == (texts, [])
  assert read_all(f"text:{tmp_path / name}") == ([data], [])
  (tmp_path / name).write_bytes(data + b"x")
  assert read_all(tmp_path / name)[1]  # half a character


def test_a_pointer_says_how_much_is_missing(tmp_path):
  pointer = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
  )
  for name in ("a.txt", "a.parquet", "a.jsonl"):
    (tmp_path / name).write_bytes(pointer)
    texts, (skip,) = read_all(tmp_path / name)
    assert texts == [] and skip.reason == "pointer to a file"
    assert skip.lost_bytes == 12345


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.txt"])
def test_a_json_list_of_records(tmp_path, name):
  records = [{"text": "one", "n": 9}, {"body": 1}, 5, {"text": "zwei ß"}]
  for data, reasons in (
    (json.dumps(records).encode(), ["no text field", "not an object"]),
    (json.dumps(records, indent=2, ensure_ascii=False).encode() + b"\n", None),
  ):
    reasons = reasons or ["no text field", "not an object"]
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(data))
    texts, skips = read_all(tmp_path / name)
    assert texts == [b"one", "zwei ß".encode()]
    assert [skip.reason for skip in skips] == reasons
    (tmp_path / name).write_bytes(pack(data.rstrip()[:-1]))
    texts, skips = read_all(tmp_path / name)
    assert texts == [b"one", "zwei ß".encode()]
    assert [skip.reason for skip in skips] == [*reasons, "malformed JSON"]


def test_a_json_list_without_the_field_is_text(tmp_path):
  text = b'[{"name": "x"}, {"name": "y"}]'
  (tmp_path / "a.json").write_bytes(text)
  assert read_all(tmp_path / "a.json") == ([text], [])


def test_empty_files_of_any_kind_are_empty(tmp_path):
  for suffix in ("txt", "txt.gz", "jsonl.xz", "tar", "csv", "warc", "tar.bz2"):
    (tmp_path / f"a.{suffix}").write_bytes(b"")
    texts, skips = read_all(tmp_path / f"a.{suffix}")
    assert (texts, [skip.reason for skip in skips]) == ([], ["empty"])


def test_a_lone_json_object_is_a_record_if_it_has_the_field(tmp_path):
  (tmp_path / "a.json").write_text('{"text": "document"}')
  assert read_all(tmp_path / "a.json") == ([b"document"], [])
  assert read_all(tmp_path / "a.json", "body")[0] == [b'{"text": "document"}']


@pytest.mark.parametrize("digits", [3000, 5000, 20_000])
def test_a_first_line_longer_than_a_block_of_the_disk(tmp_path, digits):
  line = b'{"id": ' + b"9" * digits + b', "text": "a"}\n'
  (tmp_path / "a.txt").write_bytes(line * 3)
  assert read_all(tmp_path / "a.txt") == ([b"a"] * 3, [])


def test_a_long_first_line_is_json_all_the_same(tmp_path):
  long = "x" * (compression.BLOCK + 10)
  lines = [json.dumps({"text": long}), json.dumps({"text": "short"})]
  (tmp_path / "a.json").write_text("\n".join(lines))
  assert read_all(tmp_path / "a.json") == ([long.encode(), b"short"], [])


# ----- JSON and fields ------------------------------------------------------


@pytest.mark.parametrize(
  "beside",
  [
    b"9" * 5000,
    b"-" + b"9" * 100_000,
    b"1e99999",
    b"[" * 20_000 + b"]" * 20_000,
    b'{"a":' * 10_000 + b'"]{"' + b"}" * 10_000,
  ],
  ids=["5000 digits", "100000 digits", "float", "lists", "objects"],
)
def test_what_is_beside_the_text_does_not_lose_it(beside):
  record = b'{"id": ' + beside + b', "text": "fine"}'
  assert kinds.find(kinds.parse(record), "text") == "fine"
  with pytest.raises(ValueError):
    kinds.parse(record[:-1])
  with pytest.raises(ValueError):
    kinds.parse(b'{"id": ' + beside[1:] + b', "text": "fine"}]')


@pytest.mark.parametrize(
  "field, expected",
  [
    ("a", "A"),
    ("x.y", "exact"),
    ("meta.text", "inside"),
    ("turns.content", ("one", "two")),
    ("turns.parts.t", ("p", "q")),
    ("list.*", ("l", "m")),
    ("meta.list", ("n", None)),
    ("none.list", ()),
  ],
)
def test_fields(field, expected):
  record = {
    "a": "A",
    "x.y": "exact",
    "x": {"y": "not this"},
    "meta": {"text": "inside", "list": ["n", None]},
    "none": {"list": []},
    "list": ["l", "m"],
    "turns": [
      {"content": "one", "parts": [{"t": "p"}, {"t": "q"}]},
      {"tool": "no content"},
      {"content": "two"},
    ],
  }
  assert kinds.find(record, field) == expected


@pytest.mark.parametrize("field", ["b", "a.b", "meta.no", "turns.no", "list.x"])
def test_missing_fields(field):
  record = {"a": "A", "meta": {}, "turns": [{"x": 1}], "list": ["l"]}
  with pytest.raises(KeyError):
    kinds.find(record, field)


def test_nested_texts_are_joined_by_lines(tmp_path):
  records = [
    {"turns": [{"content": "one"}, {"content": None}, {"content": "zwei ß"}]},
    {"turns": [{"content": "one"}, {"content": 5}]},
    {"turns": []},
    {"turns": "none"},
  ]
  path = tmp_path / "a.jsonl"
  path.write_text("\n".join(map(json.dumps, records)))
  texts, skips = read_all(path, "turns.content")
  assert texts == ["one\nzwei ß".encode()]
  assert [skip.reason for skip in skips] == [
    "text of a wrong type",
    "empty",
    "no text field",
  ]


def test_a_stream_that_cannot_seek_is_looked_at_and_read(monkeypatch):
  from aunet_jax.data import remote

  class Pipe(io.BytesIO):
    def read(self, size=-1):
      return super().read(min(size, 5))  # as what comes over a network

    def seekable(self):
      return False

    def seek(self, *args):
      raise OSError("no")

  monkeypatch.setattr(remote, "open_stored", lambda path: Pipe(ROWS))
  source = sources.Source("memory://a", "text", None, len(ROWS), "")
  texts = [record.text for record in sources.read_source(source, "text")]
  assert texts == DOCUMENTS
