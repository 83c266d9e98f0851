"""What sources are made of: a file, a document, and a record that gave none."""

import dataclasses
from typing import NamedTuple


class Document(NamedTuple):
  """One text; `name` says where it is, for people."""

  name: str
  text: bytes
  cut_bytes: int = 0  # of its record, that did not fit a row


class Skip(NamedTuple):
  """A record, file or directory that gives no document."""

  where: str  # file, or file:line
  reason: str  # one of a few fixed phrases, so that skips can be counted
  detail: str
  # Text that is lost with it, an estimate; None = the file cannot be read or
  # ends early, and only other files tell how much it may have held.
  lost_bytes: int | None = 0


@dataclasses.dataclass(frozen=True)
class Source:
  """One file. `size` and `modified` tell a changed file from the same one."""

  path: str  # local path or URL
  kind: str  # what its name says it is, a key of formats.READERS
  compression: str | None  # a key of compression.DECODERS, from its name
  size: int  # bytes as stored; 0 where unknown
  modified: str
  insisted: bool = False  # the user named the kind; first bytes change nothing

  @property
  def is_remote(self) -> bool:
    return self.kind == "hf" or "://" in self.path

  def identity(self) -> list:
    """What caches are keyed by, in JSON types."""
    known = [self.path, self.kind, self.compression, self.size, self.modified]
    return [*known, "insisted"] if self.insisted else known
