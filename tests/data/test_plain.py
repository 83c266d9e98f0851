"""Separators of text files, and tables in text."""

import gzip
import io
import random
import re

import pytest

from aunet_jax.data import compression, plain, sources


def _read(path, field="text", separator=None):
  files, skips = sources.list_sources(str(path))
  texts = []
  for file in files:
    for record in sources.read_source(file, field, separator):
      if isinstance(record, sources.Skip):
        skips.append(record)
      else:
        texts.append(record.text)
  return texts, skips


# ----- separators -----------------------------------------------------------


@pytest.mark.parametrize(
  "separator, text, expected",
  [
    ("<|end|>", b"a\n<|end|>\nb<|end|><|end|>", [b"a\n", b"\nb"]),
    ("<|end|>", b"no separator <|end", [b"no separator <|end"]),
    ("\xff", "a\xffb".encode(), [b"a", b"b"]),
    ("\udcff", b"a\xffb", [b"a", b"b"]),
    ("line", b"a\r\n b \n\n  \nc", [b"a", b" b ", b"c"]),
    ("blank_line", b"\n \n a\nb\n\n\nc\n", [b" a\nb", b"c"]),
    ("blank_line", b"a\r\n\r\nb\r\n \t\r\n", [b"a", b"b"]),
    ("blank_line", b"a\n \n  b", [b"a", b"  b"]),
  ],
)
def test_separators(tmp_path, separator, text, expected):
  (tmp_path / "a.txt").write_bytes(text)
  texts, skips = _read(tmp_path / "a.txt", separator=separator)
  assert (texts, skips) == (expected, [])


@pytest.mark.parametrize("separator", ["line", "blank_line", "--", "\n\n"])
def test_where_blocks_end_does_not_matter(separator, monkeypatch):
  rng = random.Random(0)
  for _ in range(300):
    text = "".join(rng.choices("a \n-\r", k=rng.randrange(40))).encode()
    found = set()
    for block in (1, 2, 3, 1000):
      monkeypatch.setattr(compression, "BLOCK", block)
      opened = sources.formats.Opened(
        io.BytesIO(text), "x", "text", separator, 0, lambda: 0
      )
      records = plain.read_text(opened)
      found.add(tuple(r.text for r in records))
    (texts,) = found
    if separator == "line":
      expected = [t.rstrip(b"\r") for t in text.split(b"\n") if t.strip()]
    elif separator == "blank_line":
      lines = re.sub(rb"\r?\n", b"\n", text).split(b"\n")
      joined = b"\n".join(t if t.strip() else b"" for t in lines)
      cut = [t.strip(b"\n") for t in re.split(rb"\n\n+", joined)]
      assert [t.replace(b"\r\n", b"\n") for t in texts] == [
        t for t in cut if t
      ], text
      continue
    else:
      expected = text.split(separator.encode())
    assert list(texts) == [t for t in expected if t], text


def test_separated_documents_before_damage_count(tmp_path):
  data = gzip.compress(b"one\n\ntwo\n\nthree") + b"garbage"
  (tmp_path / "a.txt.gz").write_bytes(data)
  texts, skips = _read(tmp_path / "a.txt.gz", separator="blank_line")
  assert texts == [b"one", b"two"]  # the third may go on
  assert [skip[:2] for skip in skips] == [
    (f"{tmp_path}/a.txt.gz:3", "corrupt file")
  ]


def test_an_empty_separator_is_refused():
  from aunet_jax import config

  with pytest.raises(ValueError, match="cannot separate"):
    config.DataConfig(separator="")
  (source,), _ = sources.list_sources(__file__)
  with pytest.raises(ValueError, match="cannot separate"):
    next(sources.read_source(source, "text", ""))  # it is found for ever


# ----- tables ---------------------------------------------------------------


@pytest.mark.parametrize("suffix, cell", [(".csv", ","), (".tsv", "\t")])
def test_a_table_with_a_heading(tmp_path, suffix, cell):
  rows = [
    ["\ufeffid", "text"],
    ["1", "one"],
    ["2", '"two\nlines, ""quoted"" and\ta tab"'],
    ["3", ""],
    ["4", "x" * 200_000],
    ["5", "größer"],
  ]
  text = "\r\n".join(cell.join(row) for row in rows).encode()
  (tmp_path / f"a{suffix}").write_bytes(text.replace("ß".encode(), b"\xdf"))
  texts, skips = _read(tmp_path / f"a{suffix}")
  assert texts == [
    b"one",
    b'two\nlines, "quoted" and\ta tab',
    b"x" * 200_000,
    "grö".encode() + b"\xdfer",
  ]
  assert [s.reason for s in skips] == ["empty"]
  assert _read(tmp_path / f"a{suffix}", "id")[0] == [
    b"1",
    b"2",
    b"3",
    b"4",
    b"5",
  ]


def test_broken_rows_are_skips_with_their_size(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text(
    'id,text\n1,one\n2,not, quoted\n3\n4,"a"b\n5,five\n6,"no end\n7,lost\n'
  )
  texts, skips = _read(path)
  assert texts == [b"one", b"five"]
  assert [(s.where, s.reason, s.lost_bytes) for s in skips] == [
    (f"{path}:3", "malformed table", 14),
    (f"{path}:4", "malformed table", 2),
    (f"{path}:5", "malformed table", 7),
    (f"{path}:7", "malformed table", 17),
  ]


def test_a_table_without_the_column_is_one_skip(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text("id,body\n1,one\n")
  texts, (skip,) = _read(path)
  assert texts == [] and skip.reason == "no text field"
  assert "id, body" in skip.detail and skip.lost_bytes == 14
