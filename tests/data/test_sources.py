"""Every kind of file is read, and every kind of damage is a counted skip."""

import bz2
import configparser
import gzip
import io
import json
import lzma
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap

import pytest
from read_all import read_all

from aunet_jax.data import sources
from aunet_jax.data.compression import zstd

TEXTS = ["The first.", "Zweitens: größer\n", "第三", "4 \ud800 lone"]
BYTES = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
JSONL = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS)


COMPRESS = {
  "": bytes,
  ".gz": gzip.compress,
  ".zst": zstd.compress,
  ".xz": lzma.compress,
  ".bz2": bz2.compress,
}


def _reasons(skips):
  return [skip.reason for skip in skips]


# ----- kinds ----------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl_is_a_document_a_line(tmp_path, suffix):
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(COMPRESS[suffix](JSONL))
  assert read_all(str(path)) == (BYTES, [])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_file_is_one_document_of_its_bytes(tmp_path, suffix):
  text = b"not \xff UTF-8\r\n\x00"
  path = tmp_path / f"a.txt{suffix}"
  path.write_bytes(COMPRESS[suffix](text))
  assert read_all(str(path)) == ([text], [])


def test_zstd_files_may_hold_several_frames(tmp_path):
  path = tmp_path / "a.jsonl.zst"
  path.write_bytes(zstd.compress(JSONL[:30]) + zstd.compress(JSONL[30:]))
  assert read_all(str(path)) == (BYTES, [])


def test_json_is_lines_where_compressed_and_text_where_not(tmp_path):
  (tmp_path / "c4.json.gz").write_bytes(gzip.compress(JSONL))
  (tmp_path / "package.json").write_bytes(b'{"name": "x"}')
  assert read_all(str(tmp_path)) == ([*BYTES, b'{"name": "x"}'], [])


def test_parquet_columns_of_text_and_bytes(tmp_path):
  pa = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  table = pa.table(
    {"text": ["a", None, "c"], "raw": [b"\xff", b"b", b""], "n": [1, 2, 3]}
  )
  path = str(tmp_path / "a.parquet")
  parquet.write_table(table, path, row_group_size=2)
  texts, skips = read_all(path)
  assert texts == [b"a", b"c"]
  assert skips[0][:2] == (f"{path}:2", "null text")
  texts, skips = read_all(path, "raw")
  assert (texts, _reasons(skips)) == ([b"\xff", b"b"], ["empty"])
  texts, skips = read_all(path, "n")
  assert (texts, _reasons(skips)) == ([], ["text of a wrong type"] * 3)
  texts, skips = read_all(path, "body")
  assert (texts, _reasons(skips)) == ([], ["no text field"])
  assert "text, raw, n" in skips[0].detail


def test_arrayrecord_records_are_documents(tmp_path):
  from array_record.python import array_record_module

  path = str(tmp_path / "a.arrayrecord")
  writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
  for text in BYTES:
    writer.write(text)
  writer.close()
  assert read_all(path) == (BYTES, [])


def test_urls_are_read_through_fsspec():
  memory = pytest.importorskip("fsspec").filesystem("memory")
  memory.pipe("/corpus/a.jsonl", JSONL)
  memory.pipe("/corpus/deep/b.txt", b"text")
  memory.pipe("/corpus/deep/c.jsonl.gz", gzip.compress(JSONL))
  assert read_all("memory://corpus/a.jsonl") == (BYTES, [])
  assert read_all("memory://corpus") == ([*BYTES, b"text", *BYTES], [])
  assert read_all("memory://corpus/deep/*.txt") == ([b"text"], [])
  with pytest.raises(ValueError, match="memory://corpus/no matches no file"):
    read_all("memory://corpus/no")
  with pytest.raises(ValueError, match="cannot open nowhere://a"):
    read_all("nowhere://a")


def test_a_remote_file_that_breaks_off_is_an_error_and_not_a_skip(monkeypatch):
  # A skip would lose the rest of a file that is whole where it lies.
  memory = pytest.importorskip("fsspec").filesystem("memory")
  memory.pipe("/broken/a.jsonl", JSONL)

  class Broken(io.BytesIO):
    def readline(self, *args):
      raise ConnectionResetError("connection reset")

    __next__ = readline

  monkeypatch.setattr(type(memory), "open", lambda *a, **k: Broken(JSONL))
  with pytest.raises(ValueError, match="a.jsonl:1 failed: connection reset"):
    read_all("memory://broken/a.jsonl")


def test_a_hugging_face_dataset_is_streamed(tmp_path):
  pytest.importorskip("datasets")
  lines = JSONL.splitlines()[:3]  # that library reads no lone surrogates
  (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
  (tmp_path / "test.jsonl").write_text('{"text": "other"}')
  assert read_all(f"hf:{tmp_path}") == (BYTES[:3], [])
  assert read_all(f"hf:{tmp_path}:test") == ([b"other"], [])


# ----- which files ----------------------------------------------------------


def test_directories_globs_and_lists_are_in_order(tmp_path):
  for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden", ".git/config"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(name)
  assert read_all(str(tmp_path))[0] == [b"a.txt", b"b.txt", b"sub/c.txt"]
  assert read_all(f"{tmp_path}/*.txt")[0] == [b"a.txt", b"b.txt"]
  assert read_all(f"{tmp_path}/**/c.txt")[0] == [b"sub/c.txt"]
  both = f"{tmp_path}/b.txt,{tmp_path}/a.txt"
  assert read_all(both)[0] == [b"b.txt", b"a.txt"]
  files, _ = sources.list_sources([f"{tmp_path}/b.txt", f"{tmp_path}/sub"])
  assert [pathlib.Path(f.path).name for f in files] == ["b.txt", "c.txt"]


def test_a_name_with_a_comma_is_a_name(tmp_path):
  (tmp_path / "a,b.txt").write_text("text")
  assert read_all(f"{tmp_path}/a,b.txt")[0] == [b"text"]


def test_a_path_given_twice_is_read_once(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
  texts, skips = read_all(f"{tmp_path}/a.txt,{tmp_path}/*.txt")
  assert texts == [b"text"]
  assert _reasons(skips) == ["duplicate path"] * 2


@pytest.mark.parametrize("name", ["missing.txt", "*.nothing", "missing/dir/"])
def test_what_matches_no_file_is_an_error(tmp_path, name):
  with pytest.raises(ValueError, match="matches no file; check the path"):
    read_all(str(tmp_path / name))


def test_what_is_no_file_is_counted_or_refused_where_it_is_named(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  os.symlink("/dev/null", tmp_path / "device")
  (tmp_path / "a.txt").write_text("text")
  for path in (tmp_path, f"{tmp_path}/*", f"file://{tmp_path}"):
    texts, skips = read_all(str(path))
    assert texts == [b"text"]
    assert [skip.reason for skip in skips] == ["not a regular file"] * 2
  for name in ("pipe", "device"):
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
      read_all(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b'{"text": "a"}\n' * 10 if name == "a.jsonl" else b"text\n")
  (source,), _ = sources.list_sources(str(path))
  os.truncate(path, path.stat().st_size // 2 // 14 * 14)  # whole lines
  *_, skip = sources.read_source(source, "text")
  assert skip.reason == "corrupt file" and "shorter" in skip.detail
  assert skip.lost_bytes is None


# ----- damage ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_a_truncated_file_gives_what_it_has_and_a_skip(tmp_path, suffix):
  lines = [json.dumps({"text": os.urandom(40).hex()}) for _ in range(3000)]
  whole = COMPRESS[suffix]("\n".join(lines).encode())
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(whole[: len(whole) * 2 // 3])
  texts, skips = read_all(str(path))
  expected = [json.loads(line)["text"].encode() for line in lines]
  assert texts == expected[: len(texts)]
  assert _reasons(skips) == ["corrupt file"]
  assert skips[0].where == f"{path}:{len(texts) + 1}"
  if suffix in (".gz", ".xz"):  # the others decode large blocks at a time
    assert texts
  text = tmp_path / f"b.txt{suffix}"
  text.write_bytes(whole[: len(whole) // 2])
  assert _reasons(read_all(str(text))[1]) == ["corrupt file"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_garbage_with_a_compressed_name_is_a_skip(tmp_path, suffix):
  path = tmp_path / f"a.jsonl{suffix}"
  path.write_bytes(b"this is not compressed at all" * 10)
  texts, skips = read_all(str(path))
  assert (texts, _reasons(skips)) == ([], ["corrupt file"])


def test_every_wrong_line_has_its_place_and_reason(tmp_path):
  lines = {
    b'{"text": "good"}': None,
    b'{"text": "cut': "malformed JSON",
    b"": None,
    b'{"text": "\xff"}': "malformed JSON",
    b'["text"]': "not an object",
    b'{"body": "a"}': "no text field",
    b'{"text": null}': "null text",
    b'{"text": 5}': "text of a wrong type",
    b'{"text": ["a"]}': "text of a wrong type",
    b'{"text": ""}': "empty",
    b"[" * 100_000: "malformed JSON",
    b'{"text": "last"}': None,
  }
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"\n".join(lines))
  texts, skips = read_all(str(path))
  assert texts == [b"good", b"last"]
  assert [skip[:2] for skip in skips] == [
    (f"{path}:{number}", reason)
    for number, reason in enumerate(lines.values(), start=1)
    if reason
  ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrayrecord"])
@pytest.mark.parametrize("content", [b"", b"PAR1 not really" * 50])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  texts, skips = read_all(str(tmp_path / name))
  assert texts == []
  assert _reasons(skips) == ["corrupt file"]


def test_a_damaged_arrayrecord_gives_what_stands_before_the_damage(tmp_path):
  from array_record.python import array_record_module

  path = tmp_path / "a.arrayrecord"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  records = [os.urandom(500) for _ in range(1000)]
  for record in records:
    writer.write(record)
  writer.close()
  whole = path.read_bytes()
  half = len(whole) // 2
  path.write_bytes(whole[:half] + bytes(2000) + whole[half + 2000 :])
  texts, skips = read_all(str(path))
  assert 0 < len(texts) < 1000
  assert texts == records[: len(texts)]
  assert [skip[:2] for skip in skips] == [
    (f"{path}:{len(texts) + 1}", "corrupt file")
  ]
  path.write_bytes(whole[:half])  # the end, with the index, is lost
  assert _reasons(read_all(str(path))[1]) == ["corrupt file"]


def test_a_file_deleted_between_listing_and_reading(tmp_path):
  for name in ("a.txt", "b.jsonl", "c.parquet", "d.arrayrecord"):
    (tmp_path / name).write_text("text")
  files, _ = sources.list_sources(str(tmp_path))
  for file in files:
    pathlib.Path(file.path).unlink()
    (skip,) = sources.read_source(file, "text")
    assert skip[:2] == (file.path, "unreadable")


def test_a_dangling_link_and_an_archive_are_skips(tmp_path):
  (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
  (tmp_path / "b.zip").write_bytes(b"x")
  (tmp_path / "c.txt").write_text("text")
  texts, skips = read_all(str(tmp_path))
  assert texts == [b"text"]
  assert _reasons(skips) == ["unreadable", "unsupported archive"]


def test_no_permission_is_a_skip():
  # Root may read everything, so the reading is done as another user.
  directory = pathlib.Path(tempfile.mkdtemp())
  try:
    directory.chmod(0o755)
    secret = directory / "a.txt"
    secret.write_text("text")
    secret.chmod(0)
    (directory / "b.txt").write_text("text")
    assert not stat.S_IMODE(secret.stat().st_mode)
    program = textwrap.dedent("""
      import os, sys
      sys.path[:0] = sys.argv[2:]
      from aunet_jax.data import sources
      if os.getuid() == 0:
        os.setuid(65534)
      files, _ = sources.list_sources(sys.argv[1])
      for file in files:
        for record in sources.read_source(file, "text"):
          print(type(record).__name__, record[1])
    """)
    root = str(pathlib.Path(sources.__file__).parents[2])
    result = subprocess.run(
      [sys.executable, "-c", program, str(directory), root],
      capture_output=True,
      text=True,
      check=True,
    )
    lines = result.stdout.splitlines()
    assert lines == ["Skip unreadable", "Document b'text'"]
  finally:
    shutil.rmtree(directory)


def test_an_empty_file_among_good_ones(tmp_path):
  (tmp_path / "a.txt").write_text("text")
  (tmp_path / "b.txt").write_text("")
  (tmp_path / "c.jsonl").write_text("")
  texts, skips = read_all(str(tmp_path))
  assert (texts, _reasons(skips)) == ([b"text"], ["empty"] * 2)


# ----- documents of a specification -----------------------------------------


def _count_opened(monkeypatch):
  opened = []
  read = sources.read_source

  def counting(source, *others):
    opened.append(pathlib.Path(source.path).name)
    return read(source, *others)

  monkeypatch.setattr(sources, "read_source", counting)
  return opened


def test_documents_end_at_a_number_of_bytes(tmp_path, monkeypatch):
  for name in ("a", "b", "c"):
    lines = ['{"text": "12345"}', "not JSON", '{"text": "67890"}']
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
  (tmp_path / ".hidden").write_text("x")
  opened, skips = _count_opened(monkeypatch), []
  found = sources.documents(str(tmp_path), "text", 17, skips.append)
  assert [d.text for d in found] == [b"12345", b"67890", b"12345", b"67"]
  assert opened == ["a.jsonl", "b.jsonl"]
  assert _reasons(skips) == ["hidden name"] + ["malformed JSON"] * 2
  for size in (3, 5):  # in the middle of a file
    found = sources.documents(str(tmp_path), "text", size, skips.append)
    assert [d.text for d in found] == [b"12345"[:size]]
  everything = sources.documents(str(tmp_path), "text", None, skips.append)
  assert len(list(everything)) == 6


def test_a_sample_is_from_files_all_over_the_input(tmp_path, monkeypatch):
  for number in range(10):
    (tmp_path / f"{number}.txt").write_text(f"{number}" * 1000)
  opened = _count_opened(monkeypatch)
  texts = sources.sample(str(tmp_path), "text", 1000, lambda skip: None)
  assert sorted(texts) == [b"%d" % n * 100 for n in range(10)]
  assert sorted(opened) == [f"{n}.txt" for n in range(10)]
  nothing = sources.sample([], "text", 1000, lambda skip: None)
  assert nothing == []


def test_what_documented_sources_need_is_in_the_base_install():
  # Jobs install the package with its hardware's extra and nothing else.
  parser = configparser.ConfigParser()
  parser.read(pathlib.Path(__file__).parents[2] / "setup.cfg")
  base = parser["options"]["install_requires"]
  for package in ("backports.zstd", "fsspec", "gcsfs"):
    assert f"\n{package}>=" in base
  extras = parser["options.extras_require"]
  for extra, package in (
    ("parquet", "pyarrow"),
    ("warc", "warcio"),
    ("s3", "s3fs"),
    ("hf", "datasets"),
  ):
    assert extras[extra].strip().startswith(f"{package}>=")
