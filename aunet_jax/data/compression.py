"""Compressed files as plain ones, with every kind of damage an exception.

The standard library's readers of .bz2 and .xz end quietly where something else
than a next stream follows a stream, which would lose the rest of the file. So
the decoders are driven here, one stream after the other: a file may hold
several, with padding between them, and anything else is damage. All that was
decoded before the damage is given out first.
"""

import bz2
import codecs
import io
import lzma
import sys
import zlib
from typing import BinaryIO

if sys.version_info >= (3, 14):
  from compression import zstd
else:
  from backports import zstd

BLOCK = 1 << 20  # buffer of what is decompressed, bytes
_INPUT = 1 << 13  # decoded at a time; what is lost at most where damage begins
_OUTPUT = 1 << 16

DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)


class _Gzip:
  """A gzip member, with the methods of the other libraries' decoders."""

  def __init__(self):
    self._decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

  def decompress(self, data: bytes, max_length: int) -> bytes:
    return self._decoder.decompress(
      self._decoder.unconsumed_tail + data, max_length
    )

  @property
  def eof(self) -> bool:
    return self._decoder.eof

  @property
  def needs_input(self) -> bool:
    return not self._decoder.unconsumed_tail

  @property
  def unused_data(self) -> bytes:
    return self._decoder.unused_data


def _zstd() -> zstd.ZstdDecompressor:
  # 2^31 is the largest window that compressors write (zstd --long=31).
  return zstd.ZstdDecompressor(
    options={zstd.DecompressionParameter.window_log_max: 31}
  )


DECODERS = {
  ".gz": _Gzip,
  ".zst": _zstd,
  ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
  ".lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
  ".bz2": bz2.BZ2Decompressor,
}

# Ends of names; those of the second kind say that a tar archive is inside.
SUFFIXES = {
  ".gz": ".gz",
  ".gzip": ".gz",
  ".zst": ".zst",
  ".zstd": ".zst",
  ".xz": ".xz",
  ".lzma": ".lzma",
  ".bz2": ".bz2",
  ".bz": ".bz2",
  ".bzip2": ".bz2",
}
TAR_SUFFIXES = {
  ".tgz": ".gz",
  ".taz": ".gz",
  ".tzst": ".zst",
  ".txz": ".xz",
  ".tlz": ".lzma",
  ".tbz": ".bz2",
  ".tbz2": ".bz2",
  ".tb2": ".bz2",
}


def sniff(head: bytes) -> str | None:
  """The compression that the first bytes of a file tell."""
  if head.startswith(b"\x1f\x8b\x08"):
    return ".gz"
  if head[:4] == b"\x28\xb5\x2f\xfd" or (
    head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5  # a skippable frame
  ):
    return ".zst"
  if head.startswith(b"\xfd7zXZ\0"):
    return ".xz"
  if (
    head[:3] == b"BZh"
    and head[3:4].isdigit()
    and (
      head[4:10] in (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
    )
  ):
    return ".bz2"
  if head.startswith(b"\x5d\0\0") and len(head) > 13:
    return ".lzma"
  return None


class Decoded(io.RawIOBase):
  """What a file holds, made of its bytes in order.

  Attributes: decoded: bytes that were given out.
  """

  def __init__(self):
    self.decoded = 0
    self._error: Exception | None = None

  def readable(self) -> bool:
    return True

  def _some(self, limit: int) -> bytes:
    """The next bytes, at most `limit`; none at the end.

    Raises: one of DAMAGE.
    """
    raise NotImplementedError

  def readinto(self, buffer) -> int:
    """Fills the buffer, but for the end and for what comes before damage.

    Raises: one of DAMAGE, at every call, once all before it was given out.
    """
    view, count = memoryview(buffer).cast("B"), 0
    while count < len(view) and self._error is None:
      try:
        data = self._some(min(len(view) - count, _OUTPUT))
      except DAMAGE as error:
        self._error = error
        break
      if not data:
        return count
      view[count : count + len(data)] = data
      count += len(data)
      self.decoded += len(data)
    if self._error is not None and not count:
      raise self._error
    return count


class Streams(Decoded):
  """The content of all compressed streams of a file, in order.

  Attributes: consumed: bytes of the file whose content was decoded for sure;
    not those that a decoder still works on.
  """

  def __init__(self, file: BinaryIO, compression: str):
    super().__init__()
    self._file, self._compression = file, compression
    self._decoder = None
    self._input = b""
    self._num_read = self.consumed = 0

  def _read(self) -> bool:
    """Reads more input; False at the end of the file."""
    self.consumed = self._num_read
    self._input = self._file.read(_INPUT)
    self._num_read += len(self._input)
    return bool(self._input)

  def _some(self, limit: int) -> bytes:
    while True:
      if self._decoder is None and not self._next_stream():
        return b""
      if self._decoder.needs_input and not self._input and not self._read():
        raise EOFError("the file ends inside a compressed stream")
      data = self._decoder.decompress(self._input, limit)
      self._input = b""
      if self._decoder.eof:
        self._input, self._decoder = self._decoder.unused_data, None
        self.consumed = self._num_read - len(self._input)
      if data:
        return data

  def _next_stream(self) -> bool:
    """Starts the next stream, after padding; False at the end of the file."""
    is_first, padding = not self._num_read, 0
    while self._input or self._read():
      rest = self._input if is_first else self._input.lstrip(b"\0")
      padding += len(self._input) - len(rest)
      self._input = rest
      if rest:
        break
    if self._compression == ".xz" and padding % 4:
      raise lzma.LZMAError(f"padding of {padding} bytes, not a multiple of 4")
    if not self._input:
      return False
    self._decoder = DECODERS[self._compression]()
    return True


# How files begin that hold text in another encoding than UTF-8.
_MARKS = {
  b"\xff\xfe\0\0": "utf-32",
  b"\0\0\xfe\xff": "utf-32",
  b"\xff\xfe": "utf-16",
  b"\xfe\xff": "utf-16",
}


def encoding(head: bytes) -> str | None:
  """The encoding that a byte order mark names, but for UTF-8."""
  return next((e for mark, e in _MARKS.items() if head.startswith(mark)), None)


def as_utf8(head: bytes, encoding: str) -> bytes:
  """The first bytes of a file, which may end inside a character."""
  return head.decode(encoding, "ignore").encode()


class _Utf8(Decoded):
  """A text file as UTF-8; halves of surrogate pairs become three bytes each."""

  def __init__(self, file: BinaryIO, encoding: str):
    super().__init__()
    self._file = file
    self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    self._ready = b""

  def _some(self, limit: int) -> bytes:
    block = b"more"
    while block and not self._ready:
      block = self._file.read(_INPUT)
      try:
        text = self._decoder.decode(block, final=not block)
      except UnicodeDecodeError as error:
        raise OSError(str(error)) from None
      self._ready = text.encode("utf-8", "surrogatepass")
    data, self._ready = self._ready[:limit], self._ready[limit:]
    return data


def transcode(file: BinaryIO, encoding: str) -> io.BufferedReader:
  """A text file as UTF-8, to be read in order.

  Args: encoding: of `encoding`.
  Raises: one of DAMAGE while reading what is no such text.
  """
  return io.BufferedReader(_Utf8(file, encoding), BLOCK)


def decompress(file: BinaryIO, compression: str) -> io.BufferedReader:
  """What a file holds, to be read in order; its `raw` is a `Streams`.

  Args: compression: a key of DECODERS.
  Raises: one of DAMAGE while reading what is cut off or no such data.
  """
  return io.BufferedReader(Streams(file, compression), BLOCK)
