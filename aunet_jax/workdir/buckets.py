"""Workdirs in a bucket of Google Cloud Storage; all that is special is here.

A bucket holds objects by name. There are no folders (only names that begin
alike), an object is there whole or not at all, and none can be appended to,
locked or renamed. So a file is put as a whole; a file that grows is kept here
and put anew (`Grown`, `Mirror`); a lock is an object that only one can make
(`locked`); and a checkpoint counts once Orbax has put COMMITTED into it, where
on a disk it would rename its folder.

`path` makes what the rest of the package takes for a path. Orbax and
TensorStore read and write arrays at the same gs:// names by themselves.
"""

import base64
import contextlib
import functools
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aunet_jax import files
from aunet_jax.terminal import EXIT_BAD_INPUT, EXIT_FAILED, Failure

COMMITTED = "commit_success.txt"  # Orbax puts it last into a checkpoint
PATIENCE_SECONDS = 120  # for which a failed request is tried again
REQUEST_SECONDS = 60  # that one request may take without a byte
BEAT_SECONDS = 30  # between two signs of life of the holder of a lock
DEAD_BEATS = 4  # without which a lock may be taken over
PUT_SECONDS = 60  # between two uploads of a file that grows
_ODD = re.compile(r"[\x00-\x1f\x7f#*?[]|(?<=/)\.\.?(?=/)")  # in a name
_WRONG = (400, 401, 403, 404)  # statuses that the same request meets again


class BucketError(Failure, OSError):
  """A bucket refused a request, or failed for all of PATIENCE_SECONDS."""


class Entry(NamedTuple):
  """An object as the store lists it."""

  size: int  # bytes
  crc32c: int


# ----- paths -----------------------------------------------------------------


class BucketPath(os.PathLike):
  """An object, or what names of objects begin with; as `pathlib.Path`.

  Methods raise BucketError, and FileNotFoundError where there is no object.
  """

  def __init__(self, url: str):
    scheme, _, rest = url.partition("://")
    self.bucket, _, name = rest.partition("/")
    self.key = "/".join(part for part in name.split("/") if part)
    if scheme != "gs" or not self.bucket:
      raise ValueError(f"{url} is no gs://BUCKET/PATH.")

  def __str__(self) -> str:
    return f"gs://{self.bucket}/{self.key}".rstrip("/")

  __fspath__ = __str__

  def __repr__(self) -> str:
    return f"BucketPath({str(self)!r})"

  def __eq__(self, other) -> bool:
    return isinstance(other, BucketPath) and str(self) == str(other)

  def __hash__(self) -> int:
    return hash(str(self))

  def __truediv__(self, name: str | os.PathLike) -> "BucketPath":
    return BucketPath(f"{self}/{os.fspath(name)}")

  @property
  def name(self) -> str:
    return self.key.rpartition("/")[2]

  @property
  def parent(self) -> "BucketPath":
    return BucketPath(f"gs://{self.bucket}/{self.key.rpartition('/')[0]}")

  def absolute(self) -> "BucketPath":
    return self

  resolve = absolute

  def mkdir(self, *args, **kwargs) -> None:
    """There are no folders."""

  def is_symlink(self) -> bool:
    return False

  def is_file(self) -> bool:
    with _told(self, "looked up"):
      return self._blob().exists(**_tries())

  def is_dir(self) -> bool:
    with _told(self, "looked up"):
      return any(True for _ in self._list(max_results=1))

  def exists(self) -> bool:
    return self.is_file() or self.is_dir()

  def names(self) -> list[str]:
    """Of the objects and folders in this folder."""
    with _told(self, "listed"):
      listing = self._list(delimiter="/")
      found = [blob.name for blob in listing]
      found += [folder.rstrip("/") for folder in listing.prefixes]
    return sorted(name.rpartition("/")[2] for name in found)

  def entries(self) -> dict[str, Entry]:
    """All objects below this folder, by their names in it."""
    start = len(self._prefix())
    with _told(self, "listed"):
      return {
        blob.name[start:]: Entry(blob.size, _number(blob.crc32c))
        for blob in self._list()
        if not blob.name.endswith("/")  # a folder, as some tools draw one
      }

  def read_bytes(self) -> bytes:
    with _told(self, "read"):
      return self._blob().download_as_bytes(checksum="crc32c", **_tries())

  def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
    return self.read_bytes().decode(encoding, errors)

  def write_bytes(self, data: bytes, generation: int | None = None) -> int:
    """Puts an object in the place of what is there.

    Args: generation: that what is there must have, 0 for nothing; None = any.
    Returns: the generation of the object.
    Raises: TakenError where another one is there.
    """
    with _told(self, "written"):
      blob = self._blob()
      blob.upload_from_string(
        data,
        content_type="application/octet-stream",
        checksum="crc32c",
        if_generation_match=generation,
        **_tries(),
      )
    return blob.generation

  def generation(self) -> int | None:
    """Of the object that is there now; None for nothing."""
    with _told(self, "looked up"):
      blob = _bucket(self.bucket).get_blob(self.key, **_tries())
    return None if blob is None else blob.generation

  def unlink(
    self, missing_ok: bool = False, generation: int | None = None
  ) -> None:
    try:
      with _told(self, "deleted"):
        self._blob().delete(if_generation_match=generation, **_tries())
    except FileNotFoundError:
      if not missing_ok:
        raise

  def rmtree(self) -> None:
    """Deletes all below this folder; first what says that it is complete."""
    names = sorted(self.entries(), key=lambda name: name != COMMITTED)
    for name in names:
      (self / name).unlink(missing_ok=True)

  def rename(self, target: "BucketPath") -> None:
    """Copies a folder inside the bucket, and then deletes it."""
    for name in self.entries():
      with _told(self / name, "copied"):
        bucket = _bucket(self.bucket)
        bucket.copy_blob(
          (self / name)._blob(), bucket, (target / name).key, **_tries()
        )
    self.rmtree()

  def _prefix(self) -> str:
    return f"{self.key}/" if self.key else ""

  def _blob(self):
    return _bucket(self.bucket).blob(self.key)

  def _list(self, **kwargs):
    return _client().list_blobs(
      self.bucket, prefix=self._prefix(), **kwargs, **_tries()
    )


class TakenError(BucketError):
  """Another object is there than the one that was to be replaced."""


def path(workdir: str | os.PathLike, setting: str = "--workdir"):
  """The Path or BucketPath of a workdir.

  Args: setting: what names it, for the message.
  Raises: ValueError for a URL that is no gs://BUCKET/PATH, or has in it what a
    library takes for a pattern, the end of the path or a step in it.
  """
  if isinstance(workdir, BucketPath):
    return workdir
  text = os.fspath(workdir)
  if not text.startswith("gs://"):
    return files.local(text, setting)
  found = BucketPath(text)
  if not found.key:
    raise ValueError(
      f"{setting}={text} is all of a bucket; name a folder in it, as "
      f"gs://{found.bucket}/runs/first."
    )
  if odd := _ODD.search(f"/{found.key}/"):
    raise ValueError(
      f"{setting}={text} has {odd[0]!r} in it, so that checkpoints would be "
      f"written or deleted elsewhere; use another name."
    )
  _list_anew()
  return found


def write_whole(path: Path | BucketPath, content: str | bytes) -> None:
  """Writes all of a file or nothing."""
  if isinstance(path, BucketPath):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
  else:
    files.write_whole(path, content)


def here(path: Path | BucketPath) -> Path:
  """The file itself, or a copy on this machine until the process ends."""
  if not isinstance(path, BucketPath):
    return path
  copy = _folder() / str(abs(hash(path))) / path.name
  copy.parent.mkdir(exist_ok=True)
  copy.write_bytes(path.read_bytes())
  return copy


# ----- the client ------------------------------------------------------------


@functools.cache
def _client():
  from google.cloud import storage  # half a second to import

  return storage.Client()


def _bucket(name: str):
  return _client().bucket(name)


def _tries() -> dict:
  """How often and how long each request is tried."""
  from google.cloud.storage import retry

  patient = retry.DEFAULT_RETRY.with_timeout(PATIENCE_SECONDS)
  return {"timeout": REQUEST_SECONDS, "retry": patient}


@contextlib.contextmanager
def _told(path: BucketPath, done: str) -> Iterator[None]:
  """Failures of the client as one line that names the object."""
  import google.api_core.exceptions as api
  import google.auth.exceptions
  import requests
  from google.cloud.storage import exceptions as storage

  try:
    yield
  except api.PreconditionFailed:
    raise TakenError(f"{path} was made or changed by another.") from None
  except api.NotFound as error:
    if "bucket does not exist" not in str(error.message):
      raise FileNotFoundError(f"{path}: no such object") from None
    raise _error(path, done, 404, f"there is no gs://{path.bucket}") from None
  except (
    api.GoogleAPIError,
    google.auth.exceptions.GoogleAuthError,
    requests.RequestException,
    storage.InvalidResponse,
    storage.DataCorruption,
    OSError,  # no credentials to be found, a name that no server has
  ) as error:
    cause = error.cause if isinstance(error, api.RetryError) else error
    response = getattr(cause, "response", None)
    status = getattr(response, "status_code", None)
    try:
      reason = response.json()["error"]["message"]
    except (AttributeError, ValueError, KeyError, TypeError):
      reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    raise _error(path, done, status, reason) from None


def _error(path, done: str, status: int | None, reason: str) -> BucketError:
  error = BucketError(
    f"{path} could not be {done}: {f'{status} ' if status else ''}{reason}"
  )
  error.status = EXIT_BAD_INPUT if status in _WRONG else EXIT_FAILED
  return error


def _number(crc32c: str) -> int:
  """As the store writes it: base64 of its four bytes, the highest first."""
  return int.from_bytes(base64.b64decode(crc32c), "big")


def _list_anew() -> None:
  """Keeps gcsfs, through which Orbax looks, from remembering listings.

  Another process of the run, or another run, may have put something since.
  """
  import fsspec

  settings = fsspec.config.conf.setdefault("gcs", {})
  settings.setdefault("use_listings_cache", False)


@functools.cache
def _folder() -> Path:
  """Of this process alone; gone with it."""
  holder = tempfile.TemporaryDirectory(prefix="aunet_jax_")
  _HOLDERS.append(holder)
  return Path(holder.name)


_HOLDERS: list = []


# ----- files that grow -------------------------------------------------------


class Grown:
  """A file of lines that are added: appended to, or put anew now and then."""

  def __init__(self, path: Path | BucketPath):
    self._path, self._lines = path, None
    if isinstance(path, BucketPath):
      with contextlib.suppress(FileNotFoundError):
        self._lines = [path.read_text(errors="replace")]
      self._lines = self._lines or []
    self._put_at, self._new = time.monotonic(), False

  def add(self, line: str) -> None:
    """Raises: OSError of a disk; of a bucket, `put` tells."""
    if self._lines is None:
      with self._path.open("a") as file:
        file.write(line)
      return
    self._lines.append(line)
    self._new = True
    if time.monotonic() - self._put_at > PUT_SECONDS:
      with contextlib.suppress(BucketError):
        self.put()

  def put(self) -> None:
    """All lines up to now are in the bucket. Raises: BucketError."""
    if self._new:
      self._put_at = time.monotonic()
      self._lines = ["".join(self._lines)]
      self._path.write_bytes(self._lines[0].encode())
      self._new = False


class Mirror:
  """A folder that others write into, on this machine, and its copy."""

  def __init__(self, path: Path | BucketPath):
    self._there = path if isinstance(path, BucketPath) else None
    self.here = path
    if self._there is not None:
      self.here = Path(tempfile.mkdtemp(dir=_folder()))
    self._sizes: dict[str, int] = {}

  def put(self) -> None:
    """Copies what has grown. Raises: BucketError."""
    if self._there is None:
      return
    for path in sorted(self.here.rglob("*")):
      name, size = path.relative_to(self.here).as_posix(), path.stat().st_size
      if path.is_file() and self._sizes.get(name) != size:
        (self._there / name).write_bytes(path.read_bytes())
        self._sizes[name] = size


# ----- a lock ----------------------------------------------------------------


class Lock:
  """An object that says who works in a workdir, renewed while it does.

  Made only where there is none, so only one can. Who finds one waits: the
  holder renews it every BEAT_SECONDS; one that is not renewed DEAD_BEATS times
  is taken over, at once where its process was one of this machine and is gone.
  """

  def __init__(self, path: BucketPath):
    self._path, self._generation, self._said = path, None, _owner()
    self._seen, self._since = None, 0.0
    self._closed, self._one = threading.Event(), threading.Lock()

  def take(self) -> bool:
    """False where it must be waited for: call it again.

    Raises: ValueError where another run holds it and lives.
    """
    if self._create():
      return True
    there = self._path.generation()
    if there is None:
      return False  # just given back
    try:
      owner = files.parse_json(self._path.read_bytes())
    except (FileNotFoundError, ValueError):
      owner = {}
    now = time.monotonic()
    first = self._seen is None
    if not first and there != self._seen:
      raise ValueError(
        f"another process is training in {self._path.parent} ({_who(owner)}); "
        f"wait for it, stop it, or use another --workdir."
      )
    if first:
      self._seen, self._since = there, now
      print(
        f"{self._path} is held by {_who(owner)}; it is taken over after "
        f"{DEAD_BEATS * BEAT_SECONDS:.0f} s without a sign of life (at once, "
        f"if you delete it)",
        flush=True,
      )
    if _gone(owner) or now - self._since > DEAD_BEATS * BEAT_SECONDS:
      with contextlib.suppress(TakenError):
        self._path.unlink(missing_ok=True, generation=there)
      self._seen = None
      return self._create()
    return False

  def _create(self) -> bool:
    try:
      self._generation = self._path.write_bytes(self._said, generation=0)
    except TakenError:
      if not self._holds():
        return False
    threading.Thread(target=self._beat, daemon=True).start()
    return True

  def _holds(self) -> bool:
    """Whether what is there is ours, where a request has failed.

    A request whose answer was lost is sent twice, and meets itself.
    """
    there = self._path.generation()  # before its content: it may change
    try:
      mine = there is not None and self._path.read_bytes() == self._said
    except FileNotFoundError:
      return False
    if mine:
      self._generation = there
    return mine

  def _beat(self) -> None:
    while not self._closed.wait(BEAT_SECONDS):
      with self._one:
        if not self._closed.is_set():
          self._renew()

  def _renew(self) -> None:
    try:
      self._generation = self._path.write_bytes(
        self._said, generation=self._generation
      )
      return
    except TakenError:
      pass
    except OSError:
      return  # the next one may come through
    try:
      if self._holds():
        return
    except BucketError:
      return
    print(
      f"\nerror: {self._path} was taken over or deleted: another process may "
      f"train in this workdir, so this one ends.",
      file=sys.stderr,
      flush=True,
    )
    os._exit(EXIT_FAILED)

  def close(self) -> None:
    with self._one:
      self._closed.set()
      if self._generation is None:
        return
      with contextlib.suppress(OSError):
        self._path.unlink(missing_ok=True, generation=self._generation)


def _process(pid: int | str) -> list[str]:
  """What tells a process of this machine from any other one, on Linux."""
  try:
    began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return [
      Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
      os.readlink("/proc/self/ns/pid"),
      began,
    ]
  except OSError:
    return []


def _owner() -> bytes:
  """What a lock says of who holds it; never the same twice."""
  said = {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "process": _process("self"),
    "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "key": uuid.uuid4().hex,
  }
  return json.dumps(said).encode()


def _who(owner) -> str:
  try:
    return f"{owner['host']}, process {owner['pid']}, since {owner['since']}"
  except (KeyError, TypeError):
    return "somebody unknown"


def _gone(owner) -> bool:
  """Whether it was a process of this machine, and is no more."""
  try:
    there, here = owner["process"], _process("self")
    return bool(here) and (
      there[:2] == here[:2] and _process(int(owner["pid"])) != there
    )
  except (KeyError, TypeError, ValueError, IndexError):
    return False
