"""The documents in one file, for every kind of file.

A reader takes an opened file and gives a `Document` or a `Skip` for every
record, in order. None holds more than the record it reads, and what it has
given out it forgets, so that a large document is in memory once.
"""

import dataclasses
import io
import re
import tarfile
from collections.abc import Callable
from typing import BinaryIO

from aunet_jax.data import compression, kinds, remote
from aunet_jax.data.compression import DAMAGE
from aunet_jax.data.opened import Opened, Records
from aunet_jax.data.plain import (
  read_csv,
  read_json,
  read_jsonl,
  read_text,
  read_tsv,
)
from aunet_jax.data.records import Document, Skip, Source
from aunet_jax.data.tables import read_arrayrecord, read_arrow, read_parquet

_MAX_LAYERS = 4  # of compression, one in the other


_WARC_TEXTS = ("conversion", "resource", "response")


def _read_warc(opened: Opened) -> Records:
  """The texts of a WARC, WET or ARC file: extracted text, or pages as sent."""
  try:
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed
  except ImportError:
    raise ValueError(
      f"reading {opened.where} needs warcio: pip install 'aunet_jax[warc]', or "
      "pip install warcio."
    ) from None
  number, where, blocks = 0, opened.where, _Blocks(opened.file)
  try:
    records = ArchiveIterator(blocks)
    for record in records:
      number += 1
      where = f"{opened.where}:{number}"
      if record.length is None:
        raise ArchiveLoadFailed("a record without Content-Length")
      if record.rec_type in _WARC_TEXTS:
        text = record.content_stream().read()
        if record.raw_stream.limit:
          raise EOFError("the file ends inside a record")
        after = None
        try:
          records.read_to_end()
        except _ContainerError as error:  # this record is complete
          after = error
        if records.err_count:
          raise ArchiveLoadFailed("a record is longer than it says")
        content = kinds.by_content(text[: compression.BLOCK], opened.field)
        if content is not None and content.kind not in ("jsonl", "warc"):
          yield Skip(where, "not text", content.name or content.kind)
        else:
          document = Document(where, text)
          del text
          yield document
          del document
        if after is not None:
          raise after
      else:
        yield Skip(where, "no text record", f"of type {record.rec_type}")
    if records.err_count:
      raise ArchiveLoadFailed("a record is longer than it says")
    opened.check_complete()
  except _ContainerError as error:
    if error.args[0] is not blocks:
      raise
    yield opened.damage(where, error.__cause__)
  except remote.ReadError:
    raise
  except Exception as error:  # the library checks little of what it parses
    yield opened.damage(where, error)


# ----- archives of files ------------------------------------------------------


class _ContainerError(Exception):
  """Damage of a file that holds records or files, met while one is read."""


class _Blocks:
  """A file whose `read` gives out what comes before damage.

  Raises: _ContainerError for what is damage of the file.
  """

  def __init__(self, file: BinaryIO):
    self._file = file

  def read(self, size: int) -> bytes:
    try:
      if isinstance(self._file, io.BufferedReader):
        return self._file.read1(size)
      return self._file.read(size)
    except DAMAGE as error:
      raise _ContainerError(self) from error


class _InOrder(io.RawIOBase):
  """A file that cannot seek, and how far it was read; fills what it can."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self.consumed = 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    view, count = memoryview(buffer).cast("B"), 0
    while count < len(view):
      block = self._file.read(len(view) - count)
      if not block:
        break
      view[count : count + len(block)] = block
      count += len(block)
    self.consumed += count
    return count


class _Header(tarfile.TarInfo):
  """A header that is no header is an error; tarfile would end quietly there.

  So is an archive that ends without the two empty blocks that end one.
  """

  @classmethod
  def fromtarfile(cls, tar):
    try:
      member = super().fromtarfile(tar)
    except tarfile.EOFHeaderError:
      tar.has_ended = True
      raise
    except tarfile.EmptyHeaderError:
      if tar.offset and not tar.has_ended:
        raise EOFError("the archive ends without a mark") from None
      raise
    except tarfile.TruncatedHeaderError:
      raise EOFError("the file ends inside a header") from None
    except tarfile.HeaderError as error:
      raise tarfile.ReadError(f"a bad header: {error}") from None
    tar.has_ended = False
    return member


class _Tar(tarfile.TarFile):
  tarinfo = _Header
  ignore_zeros = True  # joined archives have empty blocks between them
  has_ended = False


def is_hidden(name: str) -> bool:
  """Whether a part of a relative path is a name that starts with "."."""
  parts = name.split("/")
  return any(p.startswith(".") and p not in (".", "..") for p in parts)


def _read_tar(opened: Opened) -> Records:
  """Every file of an archive, read as it would be in a directory."""
  where, blocks = opened.where, _Blocks(opened.file)
  try:
    with _Tar.open(fileobj=blocks, mode="r|") as archive:
      for member in archive:
        where = f"{opened.where}/{member.name}"
        opened.taken_bytes = member.offset_data
        if member.isdir():
          continue
        if is_hidden(member.name):
          yield Skip(where, "hidden name", "its name starts with a dot")
        elif not member.isreg():
          yield Skip(where, "not a regular file", "a link or device")
        else:
          inner = _InOrder(archive.extractfile(member))
          kind, packed = kinds.by_name(member.name)
          nested = dataclasses.replace(
            opened,
            file=io.BufferedReader(inner, compression.BLOCK),
            where=where,
            size=member.size,
            position=lambda inner=inner: inner.consumed,
            given_bytes=0,
            is_remote=False,
            is_stored=False,
            insisted=False,
          )
          for record in read(nested, kind, packed):
            if isinstance(record, Document):
              opened.taken_bytes += len(record.text)
            yield record
            del record
          if inner.consumed < member.size:  # damaged, or read in part
            while inner.read(compression.BLOCK):
              pass
        opened.taken_bytes = archive.offset
        archive.members = []  # or it would keep every header
    opened.check_complete()
  except _ContainerError as error:
    if error.args[0] is not blocks:
      raise
    yield opened.damage(where, error.__cause__)
  except EOFError as error:
    yield opened.damage(where, error)
  except tarfile.TarError as error:
    if "unexpected end" in str(error):
      yield opened.damage(where, EOFError("the file ends inside a member"))
    elif str(error) != "empty file":
      yield opened.damage(where, error)


# ----- what gives no documents ------------------------------------------------


def _read_archive(opened: Opened) -> Records:
  detail = f"{opened.content or 'an archive'}: unpack it first"
  yield Skip(opened.where, "unsupported archive", detail, opened.size)


def _read_packed(opened: Opened) -> Records:
  detail = f"{opened.content or 'compressed many times'}: decompress it first"
  yield Skip(opened.where, "unsupported compression", detail, opened.size)


def _read_pointer(opened: Opened) -> Records:
  text = opened.file.read(1000)
  size = re.search(rb"\nsize (\d{1,18})\n", text) or re.search(
    rb"-s(\d{1,18})-", text
  )
  yield Skip(
    opened.where,
    "pointer to a file",
    f"of {opened.content}: fetch the file itself",
    int(size[1]) if size else None,
  )


def _read_binary(opened: Opened) -> Records:
  detail = f"{opened.content}; text:PATH reads it as text all the same"
  yield Skip(opened.where, "not text", detail)


READERS: dict[str, Callable[[Opened], Records]] = {
  "text": read_text,
  "jsonl": read_jsonl,
  "json": read_json,
  "csv": read_csv,
  "tsv": read_tsv,
  "parquet": read_parquet,
  "arrow": read_arrow,
  "arrayrecord": read_arrayrecord,
  "warc": _read_warc,
  "tar": _read_tar,
}
_SKIPPERS = {
  "archive": _read_archive,
  "packed": _read_packed,
  "pointer": _read_pointer,
  "binary": _read_binary,
}
_IN_TEXT = ("jsonl", "json", "csv", "tsv")  # records written as text
# Kinds that hold texts, and no records of prompts or messages that are read.
_OF_TEXT = set(READERS) - {"jsonl", "json", "tar"}
# What random bytes may be all the same, whatever they look like.
_MAY_BE_BINARY = ("tar", "parquet", "arrow", "arrayrecord", "archive")


def _head(opened: Opened) -> bytes:
  """The first bytes; `opened.file` is at its start again."""
  file = opened.file
  if not isinstance(file, io.BufferedReader):
    if file.seekable():
      head = file.read(compression.BLOCK)
      file.seek(0)
      return head
    opened.file = file = io.BufferedReader(_InOrder(file), compression.BLOCK)
  try:
    return file.peek(1)
  except DAMAGE:  # met again by the reader
    return b""


def _unpack(opened: Opened, packed: str | None) -> kinds.Content | None:
  """Decompresses `opened.file`, and says what its first bytes tell."""
  for layer in range(_MAX_LAYERS + 1):
    head = _head(opened)
    found = compression.sniff(head)
    content = kinds.by_content(head, opened.field) if found is None else None
    if found is None and layer == 0 and packed is not None:
      if content is None or content.kind == "binary":
        found = packed
    if found is None:
      return content
    if layer < _MAX_LAYERS:
      opened.file = compression.decompress(opened.file, found)
      if layer == 0:
        streams = opened.file.raw
        opened.position = lambda streams=streams: streams.consumed
      opened.is_stored = False
  return kinds.Content("packed")


def _transcoded(opened: Opened, kind: str) -> kinds.Content | None:
  """Makes UTF-8 of records in UTF-16 or 32; None where there are none.

  Text of any encoding is trained on as it is, but records have to be parsed.
  """
  head = _head(opened)
  encoding = compression.encoding(head)
  if encoding is None:
    return None
  content = kinds.by_content(compression.as_utf8(head, encoding), opened.field)
  if content is None or opened.insisted:
    content = kinds.Content(kind)
  if content.kind not in _IN_TEXT:
    return None
  opened.file = compression.transcode(opened.file, encoding)
  opened.is_stored = False
  return content


def read(opened: Opened, kind: str, packed: str | None) -> Records:
  """The documents of an opened file, and a skip for every record without one.

  Args: kind, packed: what its name says it is.
  """
  content = _unpack(opened, packed)
  if content is None or opened.insisted:
    content = _transcoded(opened, kind) or kinds.Content(kind)
  elif content.kind == "binary" and kind in _MAY_BE_BINARY:
    content = kinds.Content(kind)
  opened.content = content.name
  if opened.turns is not None and content.kind in _OF_TEXT:
    detail = (
      f"prompts and messages are read from JSON lines, not {content.kind}"
    )
    yield Skip(opened.where, "not JSON", detail, opened.size)
    return
  reader = READERS.get(content.kind) or _SKIPPERS[content.kind]
  num_records = 0
  try:
    for record in reader(opened):
      num_records += 1
      if isinstance(record, Skip):
        yield record
      elif record.text:
        opened.given_bytes += len(record.text)
        yield record
      else:
        yield Skip(record.name, "empty", "no bytes")
      del record
  except DAMAGE as error:
    num_records += 1
    yield opened.damage(opened.where, error)
  if num_records == 0:
    yield Skip(opened.where, "empty", "no records")


def open_source(
  source: Source,
  stored: BinaryIO,
  field: str,
  separator: str | None,
  turns=None,
) -> Opened:
  return Opened(
    file=stored,
    where=source.path,
    field=field,
    separator=separator,
    turns=turns,
    size=source.size,
    position=stored.tell,
    is_remote=source.is_remote,
    insisted=source.insisted,
  )
