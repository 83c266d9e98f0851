"""Sizes and checksums of a checkpoint's files, to tell whether it is damaged.

Orbax (0.12) returns flipped bits of an array's file as if they were numbers,
so a checkpoint that reads without an error may still be damaged. Its manifest
is written before it becomes visible; a visible checkpoint without one was
written by a version of this package that wrote none.
"""

import json
import os
import zlib
from collections.abc import Collection
from concurrent import futures
from pathlib import Path

from aunet_jax import files as files_lib

FILE = "manifest.json"


_CHUNK_BYTES = 8 << 20  # read at once; bounds memory, not speed


def write(folder: Path) -> None:
  """Writes the manifest of the files in the folder's subfolders.

  Files beside the manifest are Orbax's own notes (times, a commit mark), which
  it still edits afterwards and reads nothing from.
  """
  paths = sorted(path for path in folder.glob("*/**/*") if path.is_file())
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    sums = list(pool.map(_crc32, paths))
  files = {
    path.relative_to(folder).as_posix(): [path.stat().st_size, crc]
    for path, crc in zip(paths, sums, strict=True)
  }
  text = json.dumps({"crc32": _crc32_of(files), "files": files})
  (folder / FILE).write_text(text)


def damage(folder: Path, items: Collection[str] | None = None) -> str | None:
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
  for name, (size, _) in files.items():  # before hours of checksums
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    missing = size - path.stat().st_size
    if missing:
      return f"{name} is {abs(missing)} bytes {_too(missing)}"
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    sums = pool.map(lambda name: _crc32(folder / name), files)
    for (name, (_, crc)), found in zip(files.items(), sums, strict=True):
      if found != crc:
        return f"{name} has other bytes than were written (checksum)"
  return None


def _is_entry(name: str) -> bool:
  """Whether it names a file inside a folder of the checkpoint."""
  parts = name.split("/")
  return len(parts) > 1 and not {"", ".", ".."} & set(parts)


def _too(missing: int) -> str:
  return "short" if missing > 0 else "too long"


def _crc32(path: Path) -> int:
  crc = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      crc = zlib.crc32(chunk, crc)
  return crc


def _crc32_of(files: dict) -> int:
  return zlib.crc32(json.dumps(files, sort_keys=True).encode())
