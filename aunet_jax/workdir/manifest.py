"""Sizes and checksums of a checkpoint's files, to tell whether it is damaged.

Orbax (0.12) returns flipped bits of an array's file as if they were numbers,
so a checkpoint that reads without an error may still be damaged. Its manifest
is written before it becomes visible; a visible checkpoint without one was
written by a version of this package that wrote none.

In a bucket no byte is read again: the store knows the size and CRC-32C of
every object, and those are compared. A checkpoint that was copied out of a
bucket is compared by the same sums, computed from its files.
"""

import json
import os
import zlib
from collections.abc import Collection
from concurrent import futures
from pathlib import Path

from aunet_jax import files as files_lib
from aunet_jax.workdir.buckets import BucketPath

FILE = "manifest.json"


_CHUNK_BYTES = 8 << 20  # read at once; bounds memory, not speed


def write(folder: Path | BucketPath) -> None:
  """Writes the manifest of the files in the folder's subfolders.

  Files beside the manifest are Orbax's own notes (times, a commit mark), which
  it still edits afterwards and reads nothing from.
  """
  if isinstance(folder, BucketPath):
    files = {k: list(v) for k, v in folder.entries().items() if "/" in k}
    text = json.dumps(
      {"crc32": _crc32_of(files), "sums": "crc32c", "files": files}
    )
    (folder / FILE).write_bytes(text.encode())
    return
  paths = sorted(path for path in folder.glob("*/**/*") if path.is_file())
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    sums = list(pool.map(_crc32, paths))
  files = {
    path.relative_to(folder).as_posix(): [path.stat().st_size, crc]
    for path, crc in zip(paths, sums, strict=True)
  }
  text = json.dumps({"crc32": _crc32_of(files), "files": files})
  (folder / FILE).write_text(text)


def damage(
  folder: Path | BucketPath, items: Collection[str] | None = None
) -> str | None:
  """What is wrong with a checkpoint's files; None where nothing is.

  A folder without a manifest has nothing to compare with: None.

  Args: items: subfolders to look at; None = all.
  """
  if not folder.is_dir():
    return "it is not a directory"
  if items is None and folder.is_symlink():  # it cannot be deleted as one
    return "it is a link"
  try:
    saved = files_lib.parse_json((folder / FILE).read_bytes())
    files = saved["files"]
    intact = saved["crc32"] == _crc32_of(files) and all(map(_is_entry, files))
    intact = intact and all(
      len(entry) == 2 and all(type(number) is int for number in entry)
      for entry in files.values()
    )
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError, AttributeError):
    intact = False
  if not intact:
    return f"its {FILE} is damaged"

  files = {
    name: expected
    for name, expected in files.items()
    if items is None or name.split("/")[0] in items
  }
  there = _Files(folder, saved.get("sums", "crc32"))
  for name, (size, _) in files.items():  # before hours of checksums
    found = there.size(name)
    if found is None:
      return f"{name} is missing"
    if size != found:
      return f"{name} is {abs(size - found)} bytes {_too(size - found)}"
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    sums = pool.map(there.sum, files)
    for (name, (_, crc)), found in zip(files.items(), sums, strict=True):
      if found != crc:
        return f"{name} has other bytes than were written (checksum)"
  return None


class _Files:
  """Sizes and sums of what lies in a folder now."""

  def __init__(self, folder: Path | BucketPath, kind: str):
    """Args: kind: of the sums, "crc32" or "crc32c"."""
    self._folder, self._kind, self._listed = folder, kind, None
    if isinstance(folder, BucketPath):
      self._listed = folder.entries()

  def size(self, name: str) -> int | None:
    if self._listed is not None:
      return self._listed[name].size if name in self._listed else None
    path = self._folder / name
    return path.stat().st_size if path.is_file() else None

  def sum(self, name: str) -> int:
    if self._listed is None:
      return _sum(self._folder / name, self._kind)
    if self._kind == "crc32c":
      return self._listed[name].crc32c
    return zlib.crc32((self._folder / name).read_bytes())  # copied from a disk


def _is_entry(name: str) -> bool:
  """Whether it names a file inside a folder of the checkpoint."""
  parts = name.split("/")
  return len(parts) > 1 and not {"", ".", ".."} & set(parts)


def _too(missing: int) -> str:
  return "short" if missing > 0 else "too long"


def _crc32(path: Path) -> int:
  return _sum(path, "crc32")


def _sum(path: Path, kind: str) -> int:
  add = zlib.crc32
  if kind == "crc32c":
    import google_crc32c  # of the client of buckets

    def add(chunk, crc):
      return google_crc32c.extend(crc, chunk)

  crc = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      crc = add(chunk, crc)
  return crc


def _crc32_of(files: dict) -> int:
  return zlib.crc32(json.dumps(files, sort_keys=True).encode())
