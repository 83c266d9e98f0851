"""Files behind URLs, through fsspec, and how their failures are told."""

import contextlib
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from aunet_jax.data.compression import BLOCK
from aunet_jax.terminal import EXIT_FAILED, Failure


class ReadError(Failure, ValueError):
  """A file that is there could not be read to its end; try again."""

  status = EXIT_FAILED


def is_url(path: str) -> bool:
  return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
  """fsspec's file system for a URL, and the path in it.

  Raises: ValueError where no installed package knows such URLs, or the archive
    that one names is none.
  """
  import fsspec

  try:
    return fsspec.core.url_to_fs(url)
  except (ImportError, ValueError, zipfile.BadZipFile, tarfile.TarError) as e:
    raise ValueError(f"cannot open {url}: {e}") from None


def full_url(url: str, system: Any, name: str) -> str:
  """The URL of the file `name`, found on the file system of `url`."""
  if "::" not in url:
    return system.unstrip_protocol(name)
  first, rest = url.split("::", 1)
  if is_url(first):  # zip://*.txt::s3://…: the name is one in the archive
    return f"{first.split('://')[0]}://{name.lstrip('/')}::{rest}"
  return f"{first}::{rest.split('://')[0]}://{name.lstrip('/')}"


@contextlib.contextmanager
def open_stored(path: str) -> Iterator[BinaryIO]:
  """A file's bytes as they are stored, from a local path or a URL."""
  if is_url(path):
    system, name = filesystem(path)  # some close their files when they go
    with system.open(name, "rb") as file:
      yield file
  else:
    with open(path, "rb", buffering=BLOCK) as file:
      yield file
