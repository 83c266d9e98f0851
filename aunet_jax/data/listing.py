"""Which files a specification names, by one rule for local paths and URLs.

- A directory gives every file below it. Linked directories are followed, each
  directory is read once; one met again is a skip, and so is a loop.
- Names that start with "." are left out, unless the specification spells the
  dot. Each is a skip; what is below a hidden directory is not looked at.
- A glob gives the files it matches and all below the directories it matches.
- A directory that cannot be read is a skip, and so is what is no file, as a
  pipe; where the specification names one itself, it is refused.
"""

import fnmatch
import os
import stat
import sysconfig
from collections.abc import Iterator
from typing import Any, NamedTuple

from aunet_jax.data import formats, kinds, remote
from aunet_jax.data.records import Skip, Source
from aunet_jax.data.remote import is_url

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

# Reasons of skips that lose no text, and are no sign of bad data.
HARMLESS = (
  "empty",
  "duplicate path",
  "link loop",
  "hidden name",
  "no text record",
)


class _Entry(NamedTuple):
  name: str
  path: str
  is_directory: bool
  is_link: bool
  is_regular: bool
  size: int
  modified: str


class _Local:
  """The local file system."""

  def join(self, directory: str, name: str) -> str:
    return os.path.join(directory, name)

  def split(self, pattern: str) -> tuple[str, list[str]]:
    """The directory a glob starts from, and its parts below that."""
    root = "/" if pattern.startswith("/") else ""
    return root, [part for part in pattern.split("/") if part]

  def real(self, path: str) -> str:
    return os.path.realpath(path)

  def scan(self, directory: str) -> list[_Entry]:
    with os.scandir(directory or ".") as found:
      names = sorted(entry.name for entry in found)
    entries = [self.look(os.path.join(directory, name)) for name in names]
    return [entry for entry in entries if entry is not None]

  def look(self, path: str) -> _Entry | None:
    """What is at a path, through links; None = nothing."""
    name = os.path.basename(path.rstrip("/"))
    try:
      is_link = stat.S_ISLNK(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
      return None
    try:
      status = os.stat(path)
    except OSError:  # a dangling link: listed here, reported when read
      return _Entry(name, path, False, is_link, True, 0, "missing")
    return _Entry(
      name,
      path,
      stat.S_ISDIR(status.st_mode),
      is_link,
      stat.S_ISREG(status.st_mode),
      status.st_size,
      str(status.st_mtime_ns),
    )

  def source(self, path: str) -> str:
    return path


class _Remote:
  """A file system of fsspec; what it has for links is not known."""

  def __init__(self, url: str):
    self._url = url
    self._system, self.path = remote.filesystem(url)

  def join(self, directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}" if directory else name

  def split(self, pattern: str) -> tuple[str, list[str]]:
    start = 0
    if is_url(pattern):  # of HTTP, whose paths are URLs
      start = pattern.find("/", pattern.index("://") + 3)
    root = pattern[:start] or ("/" if pattern.startswith("/") else "")
    return root, [part for part in pattern[start:].split("/") if part]

  def real(self, path: str) -> str:
    return path.rstrip("/")

  def scan(self, directory: str) -> list[_Entry]:
    found = self._call(self._system.ls, directory, detail=True)
    entries = [self._entry(info) for info in found]
    here = self.real(directory).lstrip("/")  # stores may list a mark for it
    return sorted(e for e in entries if self.real(e.path).lstrip("/") != here)

  def look(self, path: str) -> _Entry | None:
    try:
      return self._entry(self._call(self._system.info, path))
    except FileNotFoundError:
      return None

  def source(self, path: str) -> str:
    return remote.full_url(self._url, self._system, path)

  def _call(self, function, *args, **kwargs) -> Any:
    try:
      return function(*args, **kwargs)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
      raise
    except Exception as error:  # of any library below fsspec
      raise remote.ReadError(
        f"listing {self._url} failed: {error or type(error).__name__}; try "
        "again."
      ) from error

  def _entry(self, info: dict) -> _Entry:
    path = info["name"]
    keys = ("etag", "mtime", "updated", "ETag", "LastModified", "md5Hash")
    return _Entry(
      path.rstrip("/").rsplit("/", 1)[-1],
      path,
      # A web server's directories look like files, but for the slash.
      info["type"] == "directory" or (is_url(path) and path.endswith("/")),
      False,
      info["type"] == "file",
      info.get("size") or 0,
      str(next((info[key] for key in keys if info.get(key)), None)),
    )


class _Listing:
  """The files of one item of a specification, and what is left out."""

  def __init__(self, tree: _Local | _Remote):
    self._tree = tree
    self._seen: set[str] = set()  # directories that were read, without links
    self.files: dict[str, _Entry] = {}
    self.skips: list[Skip] = []

  def add(self, entry: _Entry) -> None:
    if entry.is_directory:
      self._walk(entry)
    else:
      self.files.setdefault(entry.path, entry)

  def _skip(self, path: str, reason: str, detail: str, lost=0) -> None:
    skip = Skip(self._tree.source(path), reason, detail, lost)
    if skip not in self.skips[-1:]:
      self.skips.append(skip)

  def _scan(self, directory: str) -> list[_Entry]:
    try:
      return self._tree.scan(directory)
    except OSError as error:
      detail = str(error.strerror or error)
      self._skip(directory or ".", "unreadable", detail, None)
      return []

  def _hide(self, entry: _Entry) -> None:
    detail = "its name starts with a dot"
    self._skip(entry.path, "hidden name", detail)

  def _walk(self, root: _Entry) -> None:
    """Adds every file below; real directories come before linked ones."""
    pending, links = [], [root]
    while pending or links:
      entry = pending.pop() if pending else links.pop(0)
      real = self._tree.real(entry.path)
      if real in self._seen:
        above = self._tree.real(os.path.dirname(entry.path.rstrip("/")))
        loops = f"{above}/".startswith(f"{real.rstrip('/')}/")
        reason = "link loop" if loops else "duplicate path"
        self._skip(entry.path, reason, f"{real} is read already")
        continue
      self._seen.add(real)
      for inner in self._scan(entry.path):
        if inner.name.startswith("."):
          self._hide(inner)
        elif not inner.is_directory:
          self.files.setdefault(inner.path, inner)
        elif inner.is_link:
          links.append(inner)
        else:
          pending.append(inner)

  def match(self, directory: str, parts: list[str]) -> None:
    """Adds what a glob's parts match below a directory."""
    while not _is_glob(parts[0]):
      directory, parts = self._tree.join(directory, parts[0]), parts[1:]
    real = self._tree.real(directory)
    found = {
      entry.path: entry for entry in self._matches(directory, parts, (real,))
    }
    for path in sorted(found):
      self.add(found[path])

  def _matches(
    self, directory: str, parts: list[str], above: tuple[str, ...]
  ) -> Iterator[_Entry]:
    """Args: above: `directory` and those it was reached through since the
    first that the glob does not spell; real paths."""
    first, rest = parts[0], parts[1:]
    if not _is_glob(first):
      entry = self._tree.look(self._tree.join(directory, first))
      entries = [] if entry is None else [entry]
    else:
      if first == "**" and rest:  # no directory at all is a match, too
        yield from self._matches(directory, rest, above)
      entries = self._scan(directory)
    for entry in entries:
      if first != "**" and not fnmatch.fnmatchcase(entry.name, first):
        if _is_glob(first):
          continue
      if first == "**" and rest and not entry.is_directory:
        continue
      if entry.name.startswith(".") and not first.startswith("."):
        self._hide(entry)
      elif first == "**" and entry.is_directory:
        real = self._tree.real(entry.path)
        if real in above:
          self._skip(entry.path, "link loop", f"{real} is above it")
        else:
          yield from self._matches(entry.path, parts, (*above, real))
      elif not rest:
        yield entry
      elif entry.is_directory:
        real = self._tree.real(entry.path)
        yield from self._matches(entry.path, rest, (*above, real))


def _is_glob(part: str) -> bool:
  return any(mark in part for mark in "*?[")


def _python_files() -> list[str]:
  found = []
  for here, directories, names in os.walk(sysconfig.get_path("stdlib")):
    directories[:] = [d for d in directories if d not in _PYTHON_SKIPS]
    found.extend(
      os.path.join(here, n) for n in names if n.endswith((".py", ".txt"))
    )
  return sorted(found)


def _list_python() -> list[Source]:
  files = [_Local().look(path) for path in _python_files()]
  return [Source(f.path, "text", None, f.size, f.modified) for f in files if f]


def _list(path: str, kind: str | None) -> tuple[list[Source], list[Skip]]:
  """The files of one item, sorted by path."""
  if path.startswith(("file://", "local://")):
    path = path.split("://", 1)[1]
  tree = _Remote(path) if is_url(path) else _Local()
  start = tree.path if is_url(path) else path
  listing = _Listing(tree)
  try:
    entry = tree.look(start)
    if entry is not None:
      listing.add(entry)
    elif _is_glob(start):
      listing.match(*tree.split(start))
  except PermissionError as error:
    raise ValueError(f"{path} cannot be looked at: {error}.") from None
  sources, skips = [], listing.skips
  for name in sorted(listing.files):
    file = listing.files[name]
    full = tree.source(name)
    if not file.is_regular:
      if entry is not None and not entry.is_directory:
        raise ValueError(f"{full} is not a regular file; give files only.")
      detail = "a pipe, a socket or a device"
      skips.append(Skip(full, "not a regular file", detail))
      continue
    named, packed = kinds.by_name(full)
    sources.append(
      Source(
        full, kind or named, packed, file.size, file.modified, kind is not None
      )
    )
  return sources, skips


def _kind_prefix(path: str) -> tuple[str | None, str]:
  """The kind that is insisted on, as in "text:PATH", and the path."""
  kind, colon, rest = path.partition(":")
  if (
    colon
    and kind in formats.READERS
    and not rest.startswith("//")
    and not os.path.lexists(path)
  ):
    return kind, rest
  return None, path


def split_paths(paths: str | list[str]) -> list[str]:
  """The items of a specification, which "," joins in a string."""
  if not isinstance(paths, str):
    return list(paths)
  if os.path.lexists(_kind_prefix(paths)[1]):
    return [paths]
  return paths.split(",")


def absolute(paths: str | None) -> str | None:
  """The same specification, to be used from any directory."""
  if paths is None:
    return None
  made = []
  for item in split_paths(paths):
    kind, path = _kind_prefix(item)
    if not (path == "python" or path.startswith("hf:") or is_url(path)):
      path = os.path.abspath(path)
    made.append(path if kind is None else f"{kind}:{path}")
  return ",".join(made)


def list_sources(paths: str | list[str]) -> tuple[list[Source], list[Skip]]:
  """Every file of a specification, in a fixed order, each once.

  Args: paths: a path, directory, glob, URL, "python", "hf:NAME" or
    "KIND:PATH" (to insist on a kind of file); several joined by "," (where no
    such file exists) or as a list.
  Returns: the sources, and a skip for everything left out.
  Raises: ValueError where an item matches no file.
  """
  sources, skips, seen = [], [], set()
  for item in split_paths(paths):
    if not item:
      raise ValueError(f"an empty path in {paths!r}; remove it.")
    kind, path = _kind_prefix(item)
    left_out: list[Skip] = []
    if path == "python":
      found = _list_python()
    elif path.startswith("hf:"):
      found = [Source(path, "hf", None, 0, "")]
    else:
      found, left_out = _list(path, kind)
    if not found and all(skip.reason in HARMLESS for skip in left_out):
      hidden = f" but {len(left_out)} left out" if left_out else ""
      raise ValueError(
        f"{item} matches no file{hidden}; check the path (relative to "
        f"{os.getcwd()}) and quote globs."
      )
    skips += left_out
    for source in found:
      path = source.path
      same = path if source.is_remote else os.path.realpath(path)
      if same in seen:
        skips.append(Skip(source.path, "duplicate path", "read once"))
      else:
        seen.add(same)
        sources.append(source)
  return sources, skips
