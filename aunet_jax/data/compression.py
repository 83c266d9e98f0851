"""Compressed files as plain ones, with every kind of damage an exception."""

import bz2
import gzip
import io
import lzma
import zlib
from typing import BinaryIO

SUFFIXES = (".gz", ".zst", ".xz", ".bz2")


_BLOCK = 1 << 20  # bytes decompressed at a time


class BadZstd(OSError):
  """The data is not what a zstd compressor writes."""


DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)


# Of these OSErrors, what a broken connection can not be.
NOT_THE_NETWORK = (gzip.BadGzipFile, BadZstd)


class _Zstd(io.RawIOBase):
  """Decompresses zstd frames; a stream that ends inside one is an EOFError.

  The library's own reader ends quietly there, which would lose text unseen.
  """

  def __init__(self, file):
    try:
      import zstandard
    except ImportError:
      raise ValueError(
        "reading .zst files needs zstandard: pip install zstandard."
      ) from None
    self._file = file
    self._new = zstandard.ZstdDecompressor().decompressobj
    self._frame = None
    self._rest = b""
    self._error = zstandard.ZstdError

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._rest:
      block = self._file.read(1 << 16)
      if not block:
        if self._frame is not None:
          raise EOFError("the file ends inside a zstd frame")
        return 0
      self._rest = self._decompress(block)
    count = min(len(buffer), len(self._rest))
    buffer[:count] = self._rest[:count]
    self._rest = self._rest[count:]
    return count

  def _decompress(self, block: bytes) -> bytes:
    parts = []
    while block:
      frame = self._frame or self._new()
      try:
        parts.append(frame.decompress(block))
      except self._error as error:
        raise BadZstd(f"bad zstd data: {error}") from None
      self._frame = None if frame.eof else frame
      block = frame.unused_data if frame.eof else b""
    return memoryview(b"".join(parts))


def decompress(stored: BinaryIO, suffix: str | None) -> BinaryIO:
  """What a file holds, to be read in order; `stored` stays open.

  Args: suffix: one of SUFFIXES, or None for a file that is not compressed.
  Raises: one of DAMAGE while reading what is cut off or no such data.
  """
  if suffix == ".gz":
    return gzip.GzipFile(fileobj=stored)
  if suffix == ".xz":
    return lzma.LZMAFile(stored)
  if suffix == ".bz2":
    return bz2.BZ2File(stored)
  if suffix == ".zst":
    return io.BufferedReader(_Zstd(stored), _BLOCK)
  return stored
