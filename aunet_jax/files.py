"""Files that processes share: locks, and atomic writes.

Also reads JSON that is not trusted.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from aunet_jax.terminal import Failure

LOCKS = "AUNET_JAX_LOCKS"  # environment variable; "none" takes no locks
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,2}[^/]")
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def local(path: str | os.PathLike, setting: str) -> Path:
  """The path, where it is one of a directory of this machine.

  Args: setting: what names it, as "--workdir", for the message.
  Raises: ValueError for a URL: as a path it would be a folder named "gs:".
  """
  if found := _URL.match(str(path)):
    raise ValueError(
      f"{setting}={path} is a URL, and nothing can be kept there: files are "
      f"appended to, locked and renamed. Name a directory; a bucket can be "
      f"mounted as one ({'gcsfuse' if found[1] == 'gs' else 'as a file system'}"
      f")."
    )
  return Path(path)


class LockError(Failure):
  """A lock cannot be taken here, whoever holds it."""

  status = 2


class Lock:
  """A lock on a file, held until it is closed or the process ends."""

  def __init__(self, path: str | Path):
    """Opens the lock file: never through a link, never emptying it.

    Raises: LockError where `path` is a link or cannot be a lock file.
    """
    self.path = Path(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
      self._file = os.open(self.path, flags, 0o666)
    except OSError as error:
      if error.errno != errno.ELOOP:
        raise
      raise LockError(
        f"{self.path} is a link; a lock must be a file of its own. Delete it."
      ) from None

  def take(self, wait: bool) -> bool:
    """Takes the lock; False where another process has it and wait is False.

    Raises: LockError where the file system has no locks.
    """
    if os.environ.get(LOCKS) == "none":
      return True
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      return False
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
      raise LockError(
        f"{self.path} cannot be locked: this file system has no locks "
        f"({error.strerror}). Use a directory on another one, mount it with "
        f"locks (Lustre: -o flock), or set {LOCKS}=none and make sure that no "
        f"second process uses this directory."
      ) from None
    return True

  def fileno(self) -> int:
    """The descriptor: a child process that inherits it holds the lock too."""
    return self._file

  def close(self) -> None:
    os.close(self._file)


@contextlib.contextmanager
def locked(path: str | Path, busy: Callable[[], None]) -> Iterator[None]:
  """Holds the lock at `path`.

  Args: busy: called where another process holds it; it raises to give up, or
    returns to wait.
  Raises: LockError, and what `busy` raises.
  """
  lock = Lock(path)
  with contextlib.closing(lock):
    if not lock.take(wait=False):
      busy()
      lock.take(wait=True)
    yield


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
  """A file to write, which takes its name once the block ends well.

  Readers see the old content or all of the new, and it survives a crash of the
  machine from then on.
  """
  path = Path(path)
  descriptor, partial = tempfile.mkstemp(
    dir=path.parent, prefix=f".{path.name}.", suffix=".partial"
  )
  try:
    with os.fdopen(descriptor, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(partial, 0o666 & ~umask)
    os.replace(partial, path)
  except BaseException:
    Path(partial).unlink(missing_ok=True)
    raise


def write_whole(path: str | Path, content: str | bytes) -> None:
  """Writes all of a file or nothing; see `written_whole`."""
  data = content.encode() if isinstance(content, str) else content
  with written_whole(path) as file:
    file.write(data)


def cache_folder() -> Path:
  """Where things are kept that can be made again, for all runs of a user.

  Raises: RuntimeError where the user has no home directory.
  """
  cache = os.environ.get("XDG_CACHE_HOME")
  return (Path(cache) if cache else Path.home() / ".cache") / "aunet_jax"


def parse_json(text: str | bytes):
  """The value of a JSON text.

  Raises: ValueError for all that is wrong with it, nesting too deep to read
    included.
  """
  try:
    return json.loads(text)
  except RecursionError:
    raise ValueError("its brackets are nested too deeply") from None
