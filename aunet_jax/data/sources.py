"""Where documents come from: files of many kinds -> (name, bytes).

A source is a path, directory, glob or URL. Text files are never decoded: a
file is one document of the bytes it holds. What cannot be read becomes a
`Skip` with a place and a reason, never an exception, so one bad record does
not end a run and none goes unreported. `docs/data.md` has the table of kinds.
"""

import contextlib
import dataclasses
import glob
import json
import os
import stat
import sysconfig
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from aunet_jax.data.compression import (
  DAMAGE,
  NOT_THE_NETWORK,
  SUFFIXES,
  decompress,
)

# The text every Python ships with, less what is not prose or plain code.
_PYTHON_SKIPS = {
  "site-packages",
  "dist-packages",
  "test",
  "tests",
  "idle_test",
  "encodings",
  "__pycache__",
}


_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")


_BLOCK = 1 << 20  # bytes read from a compressed file at a time


class Document(NamedTuple):
  """One text; `name` says where it stands, for people."""

  name: str
  text: bytes


class Skip(NamedTuple):
  """A record that gives no document."""

  where: str  # file, or file:line
  reason: str  # one of a few fixed phrases, so that skips can be counted
  detail: str


@dataclasses.dataclass(frozen=True)
class Source:
  """One file. `size` and `modified` tell a changed file from the same one."""

  path: str  # local path or URL
  kind: str  # text, jsonl, parquet, arrayrecord, hf or archive
  compression: str | None  # .gz, .zst, .xz or .bz2
  size: int  # bytes as stored
  modified: str

  @property
  def is_remote(self) -> bool:
    return self.kind == "hf" or is_url(self.path)


# ----- which files ----------------------------------------------------------


def _kind(path: str) -> tuple[str, str | None]:
  """The kind and compression that a file's name tells."""
  name = path.lower().rstrip("/").rsplit("/", 1)[-1]
  stem, packed = name, None
  for suffix in SUFFIXES:
    if name.endswith(suffix):
      stem, packed = name[: -len(suffix)], suffix
  if stem.endswith(_ARCHIVES):
    return "archive", packed
  if stem.endswith((".jsonl", ".ndjson")) or (
    packed and stem.endswith(".json")  # as C4 and Dolma name theirs
  ):
    return "jsonl", packed
  if stem.endswith(".parquet") and packed is None:
    return "parquet", None
  if stem.endswith((".arrayrecord", ".array_record")) and packed is None:
    return "arrayrecord", None
  return "text", packed


def is_url(path: str) -> bool:
  return "://" in path


def _filesystem(url: str) -> tuple[Any, str]:
  """fsspec's file system for a URL, and the path in it."""
  try:
    import fsspec
  except ImportError:
    raise ValueError(
      f"reading {url} needs fsspec: pip install fsspec, and the file "
      "system's own package (gcsfs for gs://, s3fs for s3://)."
    ) from None
  try:
    return fsspec.core.url_to_fs(url)
  except (ImportError, ValueError) as error:
    raise ValueError(f"cannot open {url}: {error}") from None


def _list_url(url: str) -> list[Source]:
  filesystem, path = _filesystem(url)
  if any(mark in path for mark in "*?["):
    names = filesystem.glob(path)
  elif filesystem.isdir(path):
    names = filesystem.find(path)
  else:
    names = [path]
  sources = []
  for name in sorted(names):
    try:
      info = filesystem.info(name)
    except FileNotFoundError:
      raise ValueError(f"{url} matches no file.") from None
    if info["type"] != "file":
      continue
    modified = info.get("etag") or info.get("mtime") or info.get("updated")
    full = filesystem.unstrip_protocol(name)
    sources.append(Source(full, *_kind(full), info["size"] or 0, str(modified)))
  return sources


def _list_directory(directory: str) -> list[str]:
  """Every file below a directory; names that start with "." are left out."""
  found = []
  for here, directories, names in os.walk(directory):
    directories[:] = sorted(d for d in directories if not d.startswith("."))
    found.extend(os.path.join(here, n) for n in names if not n.startswith("."))
  return sorted(found)


def _list_python() -> list[str]:
  found = []
  for here, directories, names in os.walk(sysconfig.get_path("stdlib")):
    directories[:] = [d for d in directories if d not in _PYTHON_SKIPS]
    found.extend(
      os.path.join(here, n) for n in names if n.endswith((".py", ".txt"))
    )
  return sorted(found)


def _list_local(path: str) -> list[Source]:
  if path == "python":
    names = _list_python()
  elif os.path.isdir(path):
    names = _list_directory(path)
  elif os.path.lexists(path):
    names = [path]
  else:
    names = sorted(glob.glob(path, recursive=True))
    names = [name for name in names if not os.path.isdir(name)]
  sources = []
  for name in names:
    try:
      status = os.stat(name)
    except OSError:  # a dangling link: listed here, reported when read
      sources.append(Source(name, *_kind(name), 0, "missing"))
      continue
    if not stat.S_ISREG(status.st_mode):
      raise ValueError(f"{name} is not a regular file; give files only.")
    kind = ("text", None) if path == "python" else _kind(name)
    sources.append(Source(name, *kind, status.st_size, str(status.st_mtime_ns)))
  return sources


def list_sources(paths: str | list[str]) -> tuple[list[Source], list[Skip]]:
  """Every file of a specification, in a fixed order, each once.

  Args: paths: a path, directory, glob, URL, "python" or "hf:NAME"; several
    joined by "," (where no such file exists) or as a list.
  Returns: the sources, and a skip for every path given more than once.
  Raises: ValueError where an item matches no file.
  """
  if isinstance(paths, str):
    paths = [paths] if os.path.lexists(paths) else paths.split(",")
  sources, skips, seen = [], [], set()
  for path in paths:
    if not path:
      raise ValueError(f"an empty path in {paths!r}; remove it.")
    if path.startswith("hf:"):
      found = [Source(path, "hf", None, 0, "")]
    elif is_url(path):
      found = _list_url(path)
    else:
      found = _list_local(path)
    if not found:
      raise ValueError(
        f"{path} matches no file; check the path (relative to "
        f"{os.getcwd()}) and quote globs."
      )
    for source in found:
      path = source.path
      same = path if source.is_remote else os.path.realpath(path)
      if same in seen:
        skips.append(Skip(source.path, "duplicate path", "read once"))
      else:
        seen.add(same)
        sources.append(source)
  return sources, skips


# ----- what is in them ------------------------------------------------------


@contextlib.contextmanager
def _open(source: Source):
  """The decompressed bytes of a source, as a buffered binary file."""
  if is_url(source.path):
    filesystem, path = _filesystem(source.path)
    stored = filesystem.open(path, "rb")
  else:
    stored = open(source.path, "rb")
  with stored:  # what decompresses does not close what it reads from
    yield decompress(stored, source.compression)


def _damage(source: Source, where: str, error: Exception) -> Skip:
  """A skip for a file that cannot be decoded to its end.

  Raises: ValueError where the error may be the network's, since a skip would
    then lose text that is there.
  """
  ours = isinstance(error, NOT_THE_NETWORK)
  if source.is_remote and isinstance(error, OSError) and not ours:
    raise ValueError(f"reading {where} failed: {error}; try again.") from error
  return Skip(where, "corrupt file", str(error))


def _text(value: Any, where: str, field: str) -> Document | Skip:
  """A document from the value of a text field."""
  if value is None:
    return Skip(where, "null text", f"field {field!r} is null")
  if isinstance(value, bytes):
    return Document(where, value)
  if not isinstance(value, str):
    kind = type(value).__name__
    return Skip(where, "text of a wrong type", f"field {field!r} is a {kind}")
  # Lone surrogates are text to JSON; any bytes are text to the model.
  return Document(where, value.encode("utf-8", "surrogatepass"))


def _field(record: Any, where: str, field: str) -> Document | Skip:
  if not isinstance(record, dict):
    return Skip(where, "not an object", f"a {type(record).__name__}")
  if field not in record:
    known = ", ".join(map(str, list(record)[:8]))
    return Skip(where, "no text field", f"no {field!r} among: {known}")
  return _text(record[field], where, field)


def _read_text(source: Source, field: str) -> Iterator[Document | Skip]:
  with _open(source) as file:
    yield Document(source.path, file.read())


def _read_jsonl(source: Source, field: str) -> Iterator[Document | Skip]:
  with _open(source) as file:
    number = 0
    try:
      for number, line in enumerate(file, start=1):
        if line.isspace():
          continue
        where = f"{source.path}:{number}"
        try:
          record = json.loads(line)
        except (ValueError, RecursionError) as error:
          yield Skip(where, "malformed JSON", str(error))
          continue
        yield _field(record, where, field)
    except DAMAGE as error:
      yield _damage(source, f"{source.path}:{number + 1}", error)


def _read_parquet(source: Source, field: str) -> Iterator[Document | Skip]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ValueError(
      f"reading {source.path} needs pyarrow: pip install pyarrow."
    ) from None
  number = 0
  try:
    with _open(source) as raw, pyarrow.parquet.ParquetFile(raw) as file:
      if field not in file.schema_arrow.names:
        known = ", ".join(file.schema_arrow.names[:8])
        detail = f"no column {field!r} among: {known}"
        yield Skip(source.path, "no text field", detail)
        return
      for batch in file.iter_batches(256, columns=[field]):
        for value in batch.column(0):
          number += 1
          yield _text(value.as_py(), f"{source.path}:{number}", field)
  except (pyarrow.ArrowException, EOFError) as error:
    where = f"{source.path}:{number + 1}"
    yield Skip(where, "corrupt file", str(error).splitlines()[0])


def _read_arrayrecord(source: Source, field: str) -> Iterator[Document | Skip]:
  from array_record.python import array_record_module

  with tempfile.TemporaryDirectory() as scratch:
    path = source.path
    if is_url(path):  # the library reads local files only
      path = os.path.join(scratch, "copy")
      with _open(source) as remote, open(path, "wb") as local:
        while block := remote.read(_BLOCK):
          local.write(block)
    open(path, "rb").close()  # a missing file is an OSError here, not there
    number = 0
    try:
      reader = array_record_module.ArrayRecordReader(path)
      try:
        for number in range(reader.num_records()):
          yield Document(f"{source.path}:{number + 1}", reader.read())
      finally:
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
      where = f"{source.path}:{number + 1}"
      yield Skip(where, "corrupt file", str(error))


def _read_hf(source: Source, field: str) -> Iterator[Document | Skip]:
  """A Hugging Face dataset, streamed: "hf:NAME", "hf:NAME:SPLIT"."""
  try:
    import datasets
  except ImportError:
    raise ValueError(
      f"reading {source.path} needs the datasets library: pip install datasets."
    ) from None
  name, _, split = source.path.removeprefix("hf:").partition(":")
  stream = datasets.load_dataset(name, split=split or "train", streaming=True)
  for number, record in enumerate(stream, start=1):
    yield _field(record, f"{source.path}:{number}", field)


def _read_archive(source: Source, field: str) -> Iterator[Document | Skip]:
  yield Skip(source.path, "unsupported archive", "unpack it first")


_READERS = {
  "text": _read_text,
  "jsonl": _read_jsonl,
  "parquet": _read_parquet,
  "arrayrecord": _read_arrayrecord,
  "hf": _read_hf,
  "archive": _read_archive,
}


def read_source(source: Source, field: str) -> Iterator[Document | Skip]:
  """The documents of one file, and a skip for every record without one.

  Args: field: the text field of JSON objects and Parquet or dataset rows.
  Raises: ValueError where a library that the kind needs is not installed, or
    a remote file stops being readable.
  """
  num_records = 0
  try:
    for record in _READERS[source.kind](source, field):
      num_records += 1
      if isinstance(record, Document) and not record.text:
        yield Skip(record.name, "empty", "no bytes")
      else:
        yield record
    if num_records == 0:
      yield Skip(source.path, "empty", "no records")
  except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
    yield Skip(source.path, "unreadable", str(error))
  except DAMAGE as error:
    yield _damage(source, source.path, error)
