"""Where documents come from: files of many kinds -> (name, bytes).

A source is a path, directory, glob or URL. Text files are never decoded: a
file is one document of the bytes it holds. What cannot be read becomes a
`Skip` with a place and a reason, never an exception, so one bad record does
not end a run and none goes unreported. `docs/data.md` has the table of kinds.

`listing` finds the files, `kinds` tells what they are, `compression` opens
them, `formats` reads them; this is the door to all four.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from aunet_jax.data import formats, remote, tables
from aunet_jax.data.listing import (  # noqa: F401
  HARMLESS,
  absolute,
  list_sources,
)
from aunet_jax.data.plain import BLANK_LINE, LINE  # noqa: F401
from aunet_jax.data.records import Document, Skip, Source
from aunet_jax.data.remote import ReadError, is_url  # noqa: F401


def read_source(
  source: Source, field: str, separator: str | None = None, turns=None
) -> Iterator[Document | Skip]:
  """The documents of one file, and a skip for every record without one.

  Args:
    field: the text field of JSON objects and Parquet or dataset rows.
    separator: between the documents of a text file: "line", "blank_line" or
      any string; None = a file is a document.
    turns: a conversations.Reader, which then reads the records.
  Raises: ValueError where a library that the kind needs is not installed, or
    the separator is empty; ReadError where a remote file stops being readable.
  """
  if separator == "":
    raise ValueError('separator "" cannot separate; give a string.')
  if source.kind == "hf":
    yield from tables.read_hf(source.path, field, turns)
    return
  try:
    with remote.open_stored(source.path) as stored:
      opened = formats.open_source(source, stored, field, separator, turns)
      yield from formats.read(opened, source.kind, source.compression)
  except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
    yield Skip(source.path, "unreadable", str(error), None)
  except ValueError:  # and ReadError
    raise
  except Exception as error:
    if not source.is_remote:
      if isinstance(error, OSError):  # as links in a circle
        yield Skip(source.path, "unreadable", str(error), None)
        return
      raise
    raise ReadError(
      f"reading {source.path} failed: {error or type(error).__name__}; try "
      "again."
    ) from error


def read_documents(
  files: Sequence[Source],
  field: str,
  max_bytes: int | None,
  on_skip: Callable[[Skip], None],
  separator: str | None = None,
) -> Iterator[Document]:
  """The documents of some files in order, as `documents` gives them."""
  left = max_bytes
  for file in files:
    if left is not None and left <= 0:
      return
    for record in read_source(file, field, separator):
      if isinstance(record, Skip):
        on_skip(record)
      elif left is None:
        yield record
      else:
        left -= len(record.text)
        if left < 0:
          record = record._replace(text=record.text[:left])
        yield record
        if left <= 0:
          return
      del record


def documents(
  paths: str | list[str],
  field: str,
  max_bytes: int | None,
  on_skip: Callable[[Skip], None],
  separator: str | None = None,
) -> Iterator[Document]:
  """All documents of a specification, none empty.

  Args:
    max_bytes: of text, from the start; the last document is cut to it, and no
      file is opened after it. None = all.
    on_skip: called with everything that gives no document.
    separator: see `read_source`.
  """
  files, skips = list_sources(paths)
  for skip in skips:
    on_skip(skip)
  yield from read_documents(files, field, max_bytes, on_skip, separator)


def sample(
  paths: str | list[str],
  field: str,
  num_bytes: int,
  on_skip: Callable[[Skip], None],
  separator: str | None = None,
) -> list[bytes]:
  """Texts of about so many bytes, from the start of files all over the input.

  Args: as those of `documents`.
  """
  files, skips = list_sources(paths)
  for skip in skips:
    on_skip(skip)
  if not files:
    return []
  order = np.random.default_rng(0).permutation(len(files))
  share = max(num_bytes // len(files), num_bytes // 100)
  texts, total = [], 0
  for index in order:
    for document in read_documents(
      [files[index]], field, share, on_skip, separator
    ):
      texts.append(document.text)
      total += len(document.text)
    if total >= num_bytes:
      break
  return texts
