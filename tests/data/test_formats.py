"""Archives of files and of pages, inside other files, with damage."""

import gzip
import io
import tarfile

import pytest
from read_all import read_all

from aunet_jax.data.compression import zstd

# ----- tar ------------------------------------------------------------------


def _tar(members, end=True):
  buffer = io.BytesIO()
  archive = tarfile.open(fileobj=buffer, mode="w")
  for name, data in members:
    member = tarfile.TarInfo(name)
    if data is None:
      member.type = tarfile.DIRTYPE
    elif isinstance(data, str):
      member.type, member.linkname = tarfile.SYMTYPE, data
    else:
      member.size = len(data)
    archive.addfile(member, io.BytesIO(data or b"") if member.size else None)
  if end:
    archive.close()
  return buffer.getvalue()


MEMBERS = [
  ("d", None),
  ("d/0001.txt", b"one"),
  ("d/0002.json", b'{"text": "two"}'),
  ("d/0003.jsonl.gz", gzip.compress(b'{"text": "three"}\n{"text": "four"}\n')),
  ("d/" + "long/" * 60 + "0004.txt", b"five"),
]
TEXTS = [b"one", b"two", b"three", b"four", b"five"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tzst", "a.txt"])
def test_files_of_an_archive_are_read_as_in_a_directory(tmp_path, name):
  data = _tar(MEMBERS)
  pack = {"a.tar.gz": gzip.compress, "a.tzst": zstd.compress}.get(name, bytes)
  (tmp_path / name).write_bytes(pack(data))
  assert read_all(tmp_path / name) == (TEXTS, [])


def test_what_is_left_out_of_an_archive_is_counted(tmp_path):
  members = [
    ("./.git/HEAD", b"x"),
    ("./a.png", b"\x89PNG\r\n\x1a\n"),
    ("./link", "a.txt"),
    ("./empty", b""),
    ("./a.txt", b"text"),
  ]
  path = tmp_path / "a.tar"
  path.write_bytes(_tar(members))
  texts, skips = read_all(path)
  assert texts == [b"text"]
  assert [skip[:2] for skip in skips] == [
    (f"{path}/./.git/HEAD", "hidden name"),
    (f"{path}/./a.png", "not text"),
    (f"{path}/./link", "not a regular file"),
    (f"{path}/./empty", "empty"),
  ]


def test_joined_archives_are_read(tmp_path):
  path = tmp_path / "a.tar"
  path.write_bytes(_tar(MEMBERS[:2]) + _tar(MEMBERS[2:]))
  assert read_all(path) == (TEXTS, [])


@pytest.mark.parametrize(
  "what", ["cut in a file", "cut in a header", "no end", "bad header"]
)
def test_a_damaged_archive_gives_what_comes_before(tmp_path, what):
  members = [(f"{n}.txt", b"%d" % n * 600) for n in range(9)]
  data = _tar(members)  # every file takes a header and two blocks
  if what == "cut in a file":
    data = data[: 4 * 1536 + 700]
  elif what == "cut in a header":
    data = data[: 4 * 1536 + 100]
  elif what == "no end":
    data = _tar(members[:4], end=False)
  else:
    data = data[: 4 * 1536] + b"x" * 512 + data[4 * 1536 + 512 :]
  (tmp_path / "a.tar").write_bytes(data)
  (tmp_path / "b.tar.gz").write_bytes(gzip.compress(data))
  for name in ("a.tar", "b.tar.gz"):
    texts, skips = read_all(tmp_path / name)
    assert texts == [text for _, text in members[:4]]
    assert [skip.reason for skip in skips] == ["corrupt file"]
    if what == "bad header":  # the rest of it is there
      assert 5 * 600 <= skips[0].lost_bytes <= len(data) - 4 * 1536
    else:  # nobody knows what would have come
      assert skips[0].lost_bytes is None


def test_what_is_no_archive_is_lost_as_a_whole(tmp_path):
  (tmp_path / "a.tar").write_bytes(b"plain text\n" * 99)
  (skip,) = read_all(tmp_path / "a.tar")[1]
  assert (skip.reason, skip.lost_bytes) == ("corrupt file", 11 * 99)


def test_damage_inside_a_file_of_an_archive_stays_there(tmp_path):
  inside = gzip.compress(b"x" * 100)[:-4]
  members = [("a.txt.gz", inside), ("b.txt", b"text")]
  (tmp_path / "a.tar").write_bytes(_tar(members))
  texts, skips = read_all(tmp_path / "a.tar")
  assert texts == [b"text"]
  assert [skip[:2] for skip in skips] == [
    (f"{tmp_path}/a.tar/a.txt.gz", "corrupt file")
  ]


# ----- WARC -----------------------------------------------------------------


def _record(kind, content, headers=""):
  return (
    f"WARC/1.0\r\nWARC-Type: {kind}\r\n{headers}"
    f"Content-Length: {len(content)}\r\n\r\n"
  ).encode() + (content + b"\r\n\r\n")


HTTP = "WARC-Target-URI: http://example.org/\r\n"
PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>page</p>"
PACKED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(
  b"<b>"
)
IMAGE = b"HTTP/1.1 200 OK\r\n\r\n\x89PNG\r\n\x1a\n"
RECORDS = [
  _record("warcinfo", b"software: x\r\n"),
  _record("conversion", "größer\n".encode(), HTTP),
  _record("request", b"GET / HTTP/1.1\r\n\r\n", HTTP),
  _record("response", PAGE, HTTP),
  _record("response", PACKED, HTTP),
  _record("response", IMAGE, HTTP),
  _record("conversion", b""),
]
PAGES = ["größer\n".encode(), b"<p>page</p>", b"<b>"]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "b.wet.gz", "c"])
def test_texts_of_a_warc_file(tmp_path, name):
  pytest.importorskip("warcio")
  data = b"".join(RECORDS)
  if name.endswith(".gz"):  # a stream a record, as they are written
    data = b"".join(map(gzip.compress, RECORDS))
  (tmp_path / name).write_bytes(data)
  texts, skips = read_all(tmp_path / name)
  assert texts == PAGES
  reasons = ["no text record", "no text record", "not text", "empty"]
  assert [skip.reason for skip in skips] == reasons


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: data[:-10],
    lambda data: data[: len(data) // 2],
    lambda data: data.replace(b"Length: 11", b"Length: 9", 1),
    lambda data: data.replace(b"Content-Length: 11\r\n", b"", 1),
    lambda data: data + b"garbage\r\n",
  ],
  ids=["cut", "half", "wrong length", "no length", "garbage after"],
)
def test_a_damaged_warc_file_is_a_skip(tmp_path, damage, capsys):
  pytest.importorskip("warcio")
  records = [_record("conversion", b"document %02d" % n) for n in range(9)]
  data = damage(b"".join(records))
  assert data != b"".join(records)
  (tmp_path / "a.warc").write_bytes(data)
  texts, skips = read_all(tmp_path / "a.warc")
  assert texts == [b"document %02d" % n for n in range(len(texts))]
  assert [skip.reason for skip in skips] == ["corrupt file"]
