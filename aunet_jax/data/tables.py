"""The documents of binary tables: Parquet, Arrow, ArrayRecord, datasets."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from aunet_jax.data import compression, kinds, remote
from aunet_jax.data.compression import DAMAGE
from aunet_jax.data.opened import Opened, Records, one_line, seekable
from aunet_jax.data.plain import field_of, text_of
from aunet_jax.data.records import Document, Skip

_BATCH_BYTES = 1 << 26  # of a column that are decoded at a time


def _pyarrow(opened: Opened):
  try:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError:
    raise ValueError(
      f"reading {opened.where} needs pyarrow: pip install "
      "'aunet_jax[parquet]', or pip install pyarrow."
    ) from None
  return pyarrow


def _as_bytes(pyarrow, kind):
  """The type with bytes for text, whose UTF-8 is then not checked."""
  types = pyarrow.types
  if types.is_dictionary(kind):
    return _as_bytes(pyarrow, kind.value_type)
  if types.is_string(kind):
    return pyarrow.binary()
  if types.is_large_string(kind) or types.is_string_view(kind):
    return pyarrow.large_binary()
  if types.is_struct(kind):
    fields = [kind.field(n) for n in range(kind.num_fields)]
    return pyarrow.struct(
      [f.with_type(_as_bytes(pyarrow, f.type)) for f in fields]
    )
  if types.is_list(kind):
    return pyarrow.list_(_as_bytes(pyarrow, kind.value_type))
  if types.is_large_list(kind):
    return pyarrow.large_list(_as_bytes(pyarrow, kind.value_type))
  return kind


def _values(pyarrow, column, name: str, field: str) -> Iterator[Any]:
  """The text field's value of every row of a column."""
  wanted = _as_bytes(pyarrow, column.type)
  if wanted != column.type:
    column = column.cast(wanted, safe=False)
  for value in column:
    python = value.as_py()
    del value
    if name != field and python is not None:
      try:
        python = kinds.find({name: python}, field)
      except KeyError:
        python = None
    yield python
    del python


def _column(names: list[str], field: str) -> str | None:
  """The column that holds a field, or whose nested values do."""
  if field in names:
    return field
  first = field.split(".")[0]
  return first if first != field and first in names else None


def _no_column(opened: Opened, names: list[str]) -> Skip:
  detail = f"no column {opened.field!r} among: {', '.join(names[:8])}"
  return Skip(opened.where, "no text field", detail, opened.size)


def read_parquet(opened: Opened) -> Records:
  """The rows; those of a damaged row group are lost, the next ones are not."""
  pyarrow = _pyarrow(opened)
  number = 0  # of the last row that was read
  try:
    with (
      seekable(opened.file) as raw,
      pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True) as file,
    ):
      names = file.schema_arrow.names
      name = _column(names, opened.field)
      if name is None:
        yield _no_column(opened, names)
        return
      for group in range(file.num_row_groups):
        end = number + file.metadata.row_group(group).num_rows
        try:
          for batch in file.iter_batches(
            _batch_rows(file, group, name), [group], [name]
          ):
            for value in _values(pyarrow, batch.column(0), name, opened.field):
              number += 1
              where = f"{opened.where}:{number}"
              result = text_of(value, where, opened.field, 0)
              del value
              yield result
              del result
            del batch
        except (pyarrow.ArrowException, *DAMAGE) as error:
          skip = opened.damage(f"{opened.where}:{number + 1}", error)
          share = (end - number) / file.metadata.num_rows
          yield skip._replace(lost_bytes=round(share * opened.size))
        number = end
  except (pyarrow.ArrowException, *DAMAGE) as error:
    skip = opened.damage(f"{opened.where}:{number + 1}", error)
    yield skip._replace(lost_bytes=None)


def _batch_rows(file, group: int, name: str) -> int:
  """Rows to decode at once, so that their text fits memory."""
  about = file.metadata.row_group(group)
  size = sum(
    about.column(n).total_uncompressed_size
    for n in range(about.num_columns)
    if about.column(n).path_in_schema.split(".")[0] == name.split(".")[0]
  )
  return max(1, min(256, about.num_rows * _BATCH_BYTES // max(size, 1)))


def read_arrow(opened: Opened) -> Records:
  """An Arrow file, or streams of record batches, as datasets are saved."""
  pyarrow = _pyarrow(opened)
  number = 0
  try:
    with seekable(opened.file) as raw:
      if raw.read(6) == b"ARROW1":
        raw.seek(0)
        batches = _file_batches(pyarrow.ipc.open_file(raw))
      else:
        raw.seek(0)
        batches = _stream_batches(pyarrow, raw)
      for batch in batches:
        names = batch.schema.names
        name = _column(names, opened.field)
        if name is None:
          yield _no_column(opened, names)
          return
        column = batch.column(name)
        del batch
        for value in _values(pyarrow, column, name, opened.field):
          number += 1
          where = f"{opened.where}:{number}"
          result = text_of(value, where, opened.field, 0)
          del value
          yield result
          del result
  except (pyarrow.ArrowException, *DAMAGE) as error:
    skip = opened.damage(f"{opened.where}:{number + 1}", error)
    yield skip._replace(lost_bytes=None)


def _file_batches(file) -> Iterator[Any]:
  for number in range(file.num_record_batches):
    yield file.get_batch(number)


def _stream_batches(pyarrow, raw: BinaryIO) -> Iterator[Any]:
  """Raises: EOFError where the end mark is missing, which pyarrow allows."""
  while mark := raw.read(4):
    raw.seek(-len(mark), io.SEEK_CUR)
    with pyarrow.ipc.open_stream(raw) as stream:
      yield from stream
    raw.seek(-8, io.SEEK_CUR)
    end = raw.read(8)
    if end != b"\xff\xff\xff\xff\0\0\0\0" and (
      mark == b"\xff\xff\xff\xff" or end[4:] != b"\0\0\0\0"
    ):
      raise EOFError("the stream has no end mark")


def read_arrayrecord(opened: Opened) -> Records:
  from array_record.python import array_record_module

  # The library reads local files only, and takes names in UTF-8 only.
  with tempfile.TemporaryDirectory() as scratch:
    path = os.path.join(scratch, "file")
    if opened.is_stored and not opened.is_remote:
      os.symlink(os.path.abspath(opened.file.name), path)
    else:
      with open(path, "wb") as copy:
        shutil.copyfileobj(opened.file, copy, compression.BLOCK)
    number, share = 0, None
    try:
      reader = array_record_module.ArrayRecordReader(path)
      try:
        for number in range(reader.num_records()):
          share = 1 - number / reader.num_records()
          yield Document(f"{opened.where}:{number + 1}", reader.read())
      finally:
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
      lost = None if share is None else round(share * opened.size)
      detail = one_line(error)
      yield Skip(f"{opened.where}:{number + 1}", "corrupt file", detail, lost)


def read_hf(path: str, field: str, turns=None) -> Records:
  """A Hugging Face dataset, streamed: "hf:NAME[:[CONFIG:]SPLIT]"."""
  try:
    import datasets
  except ImportError:
    raise ValueError(
      f"reading {path} needs the datasets library: pip install "
      "'aunet_jax[hf]', or pip install datasets."
    ) from None
  parts = path.split(":")[1:]
  if not 1 <= len(parts) <= 3 or not all(parts):
    raise ValueError(
      f"{path!r} must be hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT."
    )
  name, config = parts[0], parts[1] if len(parts) == 3 else None
  split = parts[-1] if len(parts) > 1 else "train"
  try:
    stream = datasets.load_dataset(name, config, split=split, streaming=True)
  except (FileNotFoundError, ValueError) as error:
    raise ValueError(f"cannot open {path}: {one_line(error)}") from error
  records = enumerate(stream, start=1)
  number = 0
  while True:
    try:
      number, record = next(records, (number, None))
    except Exception as error:  # of any library below that one
      raise remote.ReadError(
        f"reading {path}:{number + 1} failed: {one_line(error)}; try again."
      ) from error
    if record is None:
      return
    where = f"{path}:{number}"
    if turns is not None:
      result = turns.document(record, where, 0)
    else:
      result = field_of(record, where, field, 0)
    del record
    if isinstance(result, Document) and not result.text:
      result = Skip(result.name, "empty", "no bytes")
    yield result
    del result
