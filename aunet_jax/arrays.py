"""Reads arrays from `.npz` files that are not trusted.

`numpy.load` trusts the header of such a file: a few bytes can ask for all
memory. Here the header is compared with the size of the data before an array is
made, and nothing is unpickled.
"""

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

# What `numpy.savez` and `numpy.savez_compressed` write, and the most bytes that
# one byte of it can stand for (zlib's documentation, "maximum compression").
_LARGEST_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}


class Header(NamedTuple):
  """What a file says of one of its arrays, and holds the bytes for."""

  shape: tuple[int, ...]
  dtype: np.dtype


def _read_header(stream, member: zipfile.ZipInfo) -> Header:
  """Raises: ValueError where the member has other bytes than it needs."""
  ratio = _LARGEST_RATIO.get(member.compress_type)
  if ratio is None:
    raise ValueError("it is packed in a way that NumPy does not use")
  if member.file_size > ratio * member.compress_size + 1032:
    raise ValueError("it is larger than what it is packed into can hold")
  version = np.lib.format.read_magic(stream)
  if version == (1, 0):
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
  else:
    shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
  if dtype.hasobject:
    raise ValueError("it holds Python objects, which would run code")
  size, there = dtype.itemsize, member.file_size - stream.tell()
  for length in shape:
    if length < 0:
      raise ValueError(f"its shape {shape} is negative")
    size *= length
  if size != there:
    raise ValueError(
      f"shape {shape} of {dtype} needs {size} bytes; there are {there}"
    )
  return Header(shape, dtype)


def _visit(path: str | Path, names: Collection[str] | None, read) -> dict:
  """What `read(stream, member)` makes of each array, by name.

  Raises: ValueError, whatever is wrong; without the path.
  """
  if not Path(path).is_file():
    raise ValueError("there is no such file")
  found, name = {}, None
  try:
    with zipfile.ZipFile(path) as archive:
      for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if names is not None and name not in names:
          continue
        if name == member.filename:
          raise ValueError(f"entry {name!r} is not an array")
        with archive.open(member) as stream:
          found[name] = read(stream, member)
  except Exception as error:  # the libraries name no set of what they raise
    if str(error).startswith("entry "):
      raise
    if name is None:
      raise ValueError(f"it is not an .npz file: {error}") from None
    raise ValueError(f"entry {name!r} was refused: {error}") from None
  missing = set(names or ()) - found.keys()
  if missing:
    raise ValueError(f"it has no entry {min(missing)!r}")
  return found


def read_headers(
  path: str | Path, names: Collection[str] | None = None
) -> dict[str, Header]:
  """Shapes and dtypes in an `.npz` file; reads none of the arrays.

  Args: names: those wanted; None = all. Others are not looked at.
  Raises: ValueError saying what is wrong, without the path.
  """
  return _visit(path, names, _read_header)


def read(
  path: str | Path, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
  """The arrays of an `.npz` file; arguments and errors as `read_headers`."""

  def read_array(stream, member):
    _read_header(stream, member)
    stream.seek(0)
    array = np.lib.format.read_array(stream, allow_pickle=False)
    stream.read(1)  # the checksum is compared at the end
    return array

  return _visit(path, names, read_array)
