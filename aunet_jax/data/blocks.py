"""Files of a packed corpus, with a checksum for every block.

A corpus may be larger than memory, so damage is looked for where bytes are
first read, not at the start of a run: a reader checks a block once.
"""

import os
import weakref
import zlib
from pathlib import Path

import numpy as np

BLOCK = 1 << 16  # bytes under one checksum
_MOST = 1 << 30  # bytes of one system call; Linux ends them near 2^31


class DamagedError(ValueError):
  """A file does not hold what was written to it."""


class Writer:
  """Writes a file in order; `sums` are the CRC-32 of its blocks."""

  def __init__(self, path: Path):
    self._file = open(path, "wb")
    self._rest = bytearray()  # of a block that is not full
    self.size = 0
    self._sums: list[int] = []

  def write(self, data) -> None:
    view = memoryview(data).cast("B")
    self.size += len(view)
    if len(self._rest) + len(view) < BLOCK:
      self._rest += view
      return
    missing = BLOCK - len(self._rest)
    self._put(self._rest + view[:missing])
    end = missing + (len(view) - missing) // BLOCK * BLOCK
    for at in range(missing, end, BLOCK):
      self._put(view[at : at + BLOCK])
    self._rest = bytearray(view[end:])

  def _put(self, block) -> None:
    self._file.write(block)
    self._sums.append(zlib.crc32(block))

  def finish(self) -> np.ndarray:
    """Puts the file safely on disk; returns its sums, uint32."""
    if self._rest:
      self._put(self._rest)
      self._rest = bytearray()
    self._file.flush()
    os.fsync(self._file.fileno())
    return np.array(self._sums, "<u4")

  def close(self) -> None:
    self._file.close()


class Reader:
  """Reads spans of a file by position; any thread may."""

  def __init__(self, path: Path, size: int, sums: np.ndarray | None):
    """Args: size: bytes it must have. sums: of its blocks; None = unknown.

    Raises: OSError, DamagedError.
    """
    self._path = path
    self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(self, os.close, self._descriptor)
    found = os.fstat(self._descriptor).st_size
    if found != size:
      raise DamagedError(f"{path.name} has {found} bytes, not {size}")
    self.size = size
    self._sums = sums
    num_blocks = 0 if sums is None else len(sums)
    self._checked = bytearray(num_blocks)  # 1 where a block was

  def _read(self, start: int, stop: int) -> np.ndarray:
    if stop - start <= BLOCK:  # most reads, and the quickest way
      data = os.pread(self._descriptor, stop - start, start)
      if len(data) == stop - start:
        return np.frombuffer(data, np.uint8)
    buffer = np.empty(stop - start, np.uint8)
    done = 0
    while done < len(buffer):
      part = buffer[done : done + _MOST]
      count = os.preadv(self._descriptor, [part], start + done)
      if count == 0:
        raise DamagedError(f"{self._path.name} ends at byte {start + done}")
      done += count
    return buffer

  def check(self, start: int, stop: int) -> None:
    """Checks the blocks of a span that were not checked before.

    Raises: DamagedError; also where the span is not inside the file.
    """
    if not 0 <= start <= stop <= self.size:
      raise DamagedError(
        f"{self._path.name} has no bytes [{start}, {stop}), only {self.size}"
      )
    if self._sums is None:
      return
    last = -(-stop // BLOCK)
    number = self._checked.find(0, start // BLOCK, last)
    while number >= 0:
      begin = number * BLOCK
      block = self._read(begin, min(begin + BLOCK, self.size))
      if zlib.crc32(block) != self._sums[number]:
        raise DamagedError(f"{self._path.name} was changed near byte {begin:,}")
      self._checked[number] = 1
      number = self._checked.find(0, number, last)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Bytes [start, stop), uint8. Raises: DamagedError."""
    self.check(start, stop)
    return self._read(start, stop)


class Table:
  """Records of one type in a file."""

  def __init__(self, reader: Reader, dtype):
    """Raises: DamagedError where the file does not end with a record."""
    self._reader = reader
    self._dtype = np.dtype(dtype)
    if reader.size % self._dtype.itemsize:
      raise DamagedError(f"{reader.size} bytes are no records of {dtype}")

  def __len__(self) -> int:
    return self._reader.size // self._dtype.itemsize

  def read(self, start: int, stop: int) -> np.ndarray:
    """Records [start, stop). Raises: DamagedError."""
    size = self._dtype.itemsize
    return self._reader.read(start * size, stop * size).view(self._dtype)
