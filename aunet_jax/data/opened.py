"""A file that is being read: its bytes, how far, and what damage costs."""

import contextlib
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from aunet_jax.data import compression, remote
from aunet_jax.data.records import Document, Skip

_IN_MEMORY = 1 << 24  # a larger file that needs seeking is copied to disk

Records = Iterator[Document | Skip]


@dataclasses.dataclass
class Opened:
  """A file that is being read, and how far."""

  file: BinaryIO  # what it holds, decompressed; at its start
  where: str  # its name, for people
  field: str  # the text field of records
  separator: str | None  # between the documents of a text file
  size: int  # bytes as stored, or 0
  position: Callable[[], int]  # bytes of those that were read
  turns: Any = None  # a conversations.Reader; None = records are plain text
  is_remote: bool = False
  is_stored: bool = True  # `file` is the file itself, nothing in or around it
  insisted: bool = False  # the user named the kind
  content: str = ""  # what its first bytes say it is, for people
  given_bytes: int = 0  # text of the documents that it gave
  taken_bytes: int = 0  # of `file`, in records that were complete

  def damage(self, where: str, error: Exception) -> Skip:
    """A skip for what cannot be decoded from here on.

    Raises: ReadError where the error may be the network's, since a skip would
      then lose text that is there.
    """
    # A decoder's own OSError has no number and is of no narrower class.
    ours = not isinstance(error, OSError) or (
      type(error) is OSError and error.errno is None
    )
    if self.is_remote:
      short = self.size and self.position() < self.size
      if not ours or (isinstance(error, EOFError) and short):
        raise remote.ReadError(
          f"reading {where} failed: {error}; try again."
        ) from error
    reason = "corrupt file" if ours else "unreadable"
    return Skip(where, reason, one_line(error), self._lost(error))

  def _lost(self, error: Exception) -> int | None:
    position = self.position()
    if isinstance(error, EOFError) or not position:
      return None
    rest = max(self.size - position, 0)
    if self.given_bytes:
      rest = rest * self.given_bytes // position
    # What was decoded to no record: a wrong bit may be noticed much later.
    raw = getattr(self.file, "raw", None)
    if isinstance(raw, compression.Decoded):
      decoded = raw.decoded
    else:
      decoded = position
    if self.taken_bytes or not self.given_bytes:
      rest += max(decoded - self.taken_bytes, 0)
    return rest

  def check_complete(self) -> None:
    """To be called at the end of what was read.

    Raises: ReadError where a connection ended before its file did; EOFError,
      which is damage, where a file became shorter since it was listed.
    """
    if self.position() >= self.size:
      return
    if self.is_remote:
      raise remote.ReadError(
        f"reading {self.where} ended after {self.position():,} of "
        f"{self.size:,} bytes; try again."
      )
    raise EOFError(
      f"it became shorter while it was read: {self.position():,} bytes, not "
      f"{self.size:,}"
    )


def one_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]


def blocks(file: BinaryIO) -> Iterator[bytes]:
  # Only read1 gives out what was decoded before damage.
  read = file.read1 if isinstance(file, io.BufferedReader) else file.read
  while block := read(compression.BLOCK):
    yield block


@contextlib.contextmanager
def seekable(file: BinaryIO):
  """The same bytes in a file that can seek."""
  if file.seekable():
    yield file
    return
  with tempfile.SpooledTemporaryFile(_IN_MEMORY) as copy:
    shutil.copyfileobj(file, copy, compression.BLOCK)
    copy.seek(0)
    yield copy
