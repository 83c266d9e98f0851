"""Compressed streams, joined, padded, cut off and damaged."""

import bz2
import gzip
import io
import json
import lzma
import struct
import zlib

import pytest

from aunet_jax.data import compression, sources

zstd = compression.zstd


def _lzma(data):
  return lzma.compress(data, lzma.FORMAT_ALONE)


PACK = {
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstd.compress,
  ".lzma": _lzma,
}
JOINED = [".gz", ".bz2", ".xz", ".zst"]  # .lzma files hold one stream


def _line(number):
  return json.dumps({"text": f"stream {number}"}).encode() + b"\n"


def _flip(data, at=0):
  return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _read(path, field="text"):
  """(texts, skips) of a file."""
  files, skips = sources.list_sources(str(path))
  texts = []
  for record in sources.read_source(files[0], field):
    if isinstance(record, sources.Skip):
      skips.append(record)
    else:
      texts.append(record.text)
  return texts, skips


@pytest.mark.parametrize("padding", [0, 4, 8, 40_000])
@pytest.mark.parametrize("suffix", JOINED)
def test_joined_streams_are_read_with_padding_between(
  tmp_path, suffix, padding
):
  path = tmp_path / f"x.jsonl{suffix}"
  parts = [PACK[suffix](_line(n)) for n in range(10)]
  path.write_bytes((b"\0" * padding).join([*parts, b""]))
  texts, skips = _read(path)
  assert texts == [b"stream %d" % n for n in range(10)]
  assert skips == []


@pytest.mark.parametrize("suffix", JOINED)
def test_damage_after_a_stream_is_a_skip_with_what_is_lost(tmp_path, suffix):
  path = tmp_path / f"x.jsonl{suffix}"
  parts = [PACK[suffix](_line(n)) for n in range(10)]
  for bad in (_flip(parts[1]), b"BZ", b"garbage after it"):
    path.write_bytes(parts[0] + bad + b"".join(parts[2:]))
    texts, skips = _read(path)
    assert texts == [b"stream 0"]
    (skip,) = skips
    assert skip[:2] == (f"{path}:2", "corrupt file")
    # 8 or 9 documents of 8 bytes.
    assert 40 < skip.lost_bytes < 160


@pytest.mark.parametrize("suffix", PACK)
def test_a_stream_that_ends_early_loses_nobody_knows_how_much(tmp_path, suffix):
  whole = PACK[suffix](_line(0) * 1000)
  path = tmp_path / f"x.jsonl{suffix}"
  path.write_bytes(whole[: len(whole) // 2])
  _, (skip,) = _read(path)
  assert skip.reason == "corrupt file" and skip.lost_bytes is None


def test_padding_of_xz_is_a_multiple_of_four(tmp_path):
  path = tmp_path / "x.jsonl.xz"
  path.write_bytes(lzma.compress(_line(0)) + b"\0\0\0")
  texts, skips = _read(path)
  assert texts == [b"stream 0"]
  assert [skip.reason for skip in skips] == ["corrupt file"]


@pytest.mark.parametrize("log", [27, 28, 31])
def test_zstd_windows_of_any_size_are_read(tmp_path, log):
  options = {zstd.CompressionParameter.window_log: log}
  packer = zstd.ZstdCompressor(options=options)
  data = packer.compress(_line(0)) + packer.flush()
  path = tmp_path / "x.jsonl.zst"
  path.write_bytes(data)
  assert _read(path) == ([b"stream 0"], [])


def test_zstd_frames_that_hold_no_text_are_passed_over(tmp_path):
  skippable = struct.pack("<II", 0x184D2A50, 5) + b"index"
  path = tmp_path / "x.jsonl.zst"
  path.write_bytes(
    skippable + zstd.compress(_line(0)) + skippable + zstd.compress(_line(1))
  )
  assert _read(path) == ([b"stream 0", b"stream 1"], [])


@pytest.mark.parametrize("suffix", PACK)
def test_what_comes_before_damage_is_given_out(suffix):
  data = PACK[suffix](bytes(range(256)) * 10_000)
  damaged = data[: len(data) * 3 // 4]
  file = compression.decompress(io.BytesIO(damaged), suffix)
  given = b""
  with pytest.raises(EOFError):
    while block := file.read1(1000):
      given += block
  assert given == (bytes(range(256)) * 10_000)[: len(given)]
  with pytest.raises(EOFError):  # and not the end, at another try
    file.read1(1000)


def test_a_wrong_checksum_is_damage():
  data = gzip.compress(b"text" * 1000)
  file = compression.decompress(io.BytesIO(_flip(data, len(data) - 8)), ".gz")
  with pytest.raises(zlib.error, match="incorrect data check"):
    file.read()


def test_a_damaged_text_is_lost_as_a_whole(tmp_path):
  path = tmp_path / "a.txt.bz2"
  path.write_bytes(bz2.compress(b"x" * 5000) + b"garbage")
  texts, (skip,) = _read(path)
  assert texts == [] and skip.lost_bytes == 5000 + len(b"garbage")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_text_becomes_utf8_as_it_is_read(encoding):
  text = "größer 中a 😀\n" * 5000 + "\ud800"
  stored = text.encode(encoding, "surrogatepass")
  assert compression.encoding(stored) == encoding
  file = compression.transcode(io.BytesIO(stored), encoding)
  assert file.read() == text.encode("utf-8", "surrogatepass")
  file = compression.transcode(io.BytesIO(stored[:-1]), encoding)
  assert file.readline() == "größer 中a 😀\n".encode()
  with pytest.raises(compression.DAMAGE, match="truncated"):
    file.read()
  head = compression.as_utf8(stored[:101], encoding)  # cut in a character
  assert text.encode("utf-8", "surrogatepass").startswith(head) and head


@pytest.mark.parametrize("suffix", PACK)
def test_first_bytes_tell_the_compression(suffix):
  assert compression.sniff(PACK[suffix](b"text")) == suffix
  assert compression.sniff(PACK[suffix](b"")) == suffix


@pytest.mark.parametrize("head", [b"", b"BZh is how", b"]", b"text", b"\x1f"])
def test_text_is_not_taken_for_compressed(head):
  assert compression.sniff(head) is None
