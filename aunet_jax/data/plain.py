"""The documents of text files, JSON lines and tables in text."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from aunet_jax.data import compression, kinds
from aunet_jax.data.compression import DAMAGE
from aunet_jax.data.opened import Opened, Records, blocks, one_line
from aunet_jax.data.records import Document, Skip

LINE, BLANK_LINE = "line", "blank_line"
_BLANK_LINES = re.compile(rb"\r?\n(?:[ \t\r\f\v]*\n)+")
_LAST_LINES = re.compile(rb"\r?\n[ \t\r\n\f\v]*\Z")
_LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r\f\v]*\n)+")


def read_text(opened: Opened) -> Records:
  if opened.separator is not None:
    yield from _read_separated(opened)
    return
  if isinstance(opened.file, io.BufferedReader):
    held = io.BytesIO()  # grows in place, and gives its bytes out uncopied
    for block in blocks(opened.file):
      held.write(block)
    text = held.getvalue()
    held.close()
  else:
    text = opened.file.read()
  opened.check_complete()
  if (
    len(text) > compression.BLOCK  # so that its first line was not seen
    and text.startswith(b"{")
    and not opened.insisted
    and b"\n" not in text[: compression.BLOCK]
    and kinds.is_json_lines(text, opened.field)
  ):
    opened.file = io.BytesIO(text)
    del text
    yield from read_jsonl(opened)
    return
  document = Document(opened.where, text)
  del text
  yield document


def _read_separated(opened: Opened) -> Records:
  """The documents between separators; a damaged file gives the complete ones.

  Where two separators follow each other there is no document between them.
  """
  number = 0
  pieces = {LINE: _lines, BLANK_LINE: _paragraphs}.get(
    opened.separator, _between
  )
  try:
    for text in pieces(opened):
      number += 1
      opened.taken_bytes += len(text)
      if text:
        yield Document(f"{opened.where}:{number}", text)
      del text
    opened.check_complete()
  except DAMAGE as error:
    yield opened.damage(f"{opened.where}:{number + 1}", error)


def _lines(opened: Opened) -> Iterator[bytes]:
  while line := opened.file.readline():
    yield b"" if line.isspace() else line.rstrip(b"\r\n")


def _between(opened: Opened) -> Iterator[bytes]:
  separator = opened.separator.encode("utf-8", "surrogateescape")
  held, searched = bytearray(), 0
  for block in blocks(opened.file):
    held += block
    start = 0
    while (at := held.find(separator, max(searched, start))) >= 0:
      with memoryview(held) as view:
        text = bytes(view[start:at])
      yield text
      start = at + len(separator)
    del held[:start]
    searched = max(0, len(held) - len(separator) + 1)
  yield bytes(held)


def _paragraphs(opened: Opened) -> Iterator[bytes]:
  held, searched, is_start = bytearray(), 0, True
  for block in blocks(opened.file):
    held += block
    solid = len(held)  # the end of the last word; a gap may go on after it
    while solid and held[solid - 1] in b" \t\r\n\f\v":
      solid -= 1
    if not solid:
      continue
    start = 0
    if is_start:
      is_start = False
      if gap := _LEADING_BLANK_LINES.match(held):
        start = gap.end()
    while gap := _BLANK_LINES.search(held, max(searched, start)):
      first, end = gap.span()
      gap = None  # it holds the buffer
      if end > solid:
        break
      with memoryview(held) as view:
        text = bytes(view[start:first])
      yield text
      start = end
    gap = None
    searched = solid - start
    del held[:start]
  if held.strip():
    gap = _LAST_LINES.search(held, searched)
    end = gap.start() if gap else len(held)
    with memoryview(held) as view:
      text = bytes(view[:end])
    del held, gap
    yield text


# ----- records ---------------------------------------------------------------


def text_of(value: Any, where: str, field: str, size: int) -> Document | Skip:
  """A document from the value of a text field, in a record of `size` bytes."""
  if isinstance(value, kinds.Joined):
    parts = [part for part in value if part is not None]
    wrong = [p for p in parts if not isinstance(p, str | bytes)]
    if wrong:
      value = wrong[0]
    else:
      value = b"\n".join(
        p if isinstance(p, bytes) else p.encode("utf-8", "surrogatepass")
        for p in parts
      )
  if value is None:
    return Skip(where, "null text", f"field {field!r} is null", size)
  if isinstance(value, bytes):
    return Document(where, value)
  if not isinstance(value, str):
    kind = type(value).__name__
    detail = f"field {field!r} is a {kind}"
    return Skip(where, "text of a wrong type", detail, size)
  # Lone surrogates are text to JSON; any bytes are text to the model.
  return Document(where, value.encode("utf-8", "surrogatepass"))


def field_of(record: Any, where: str, field: str, size: int) -> Document | Skip:
  if not isinstance(record, dict):
    return Skip(where, "not an object", f"a {type(record).__name__}", size)
  try:
    value = kinds.find(record, field)
  except KeyError:
    known = ", ".join(map(str, list(record)[:8]))
    detail = f"no {field!r} among: {known}"
    return Skip(where, "no text field", detail, size)
  record.clear()  # frees what is beside the text
  return text_of(value, where, field, size)


def _document(record: Any, where: str, opened: Opened, size: int):
  if opened.turns is not None:
    return opened.turns.document(record, where, size)
  return field_of(record, where, opened.field, size)


def _json(line: bytes, where: str, opened: Opened) -> Document | Skip:
  try:
    record = kinds.parse(line)
  except ValueError as error:
    return Skip(where, "malformed JSON", one_line(error), len(line))
  return _document(record, where, opened, len(line))


def read_jsonl(opened: Opened) -> Records:
  number = 0
  try:
    while line := opened.file.readline():
      number += 1
      opened.taken_bytes += len(line)
      where = f"{opened.where}:{number}"
      result = None if line.isspace() else _json(line, where, opened)
      del line
      if result is not None:
        yield result
      del result
    opened.check_complete()
  except DAMAGE as error:
    yield opened.damage(f"{opened.where}:{number + 1}", error)


_BETWEEN = re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")


def read_json(opened: Opened) -> Records:
  """The objects of one JSON list, which is read into memory."""
  data = b"".join(blocks(opened.file))
  opened.check_complete()
  number, at, end = 0, 0, ","
  try:
    text = data.decode("utf-8-sig")
    del data
    at = text.index("[") + 1
    at += len(text[at : at + 1000]) - len(text[at : at + 1000].lstrip())
    decoder = json.JSONDecoder(parse_int=float)
    while end == ",":
      number += 1
      record, stop = decoder.raw_decode(text, at)
      size = stop - at
      between = _BETWEEN.match(text, stop)
      at, end = between.end(), between[1]
      yield _document(record, f"{opened.where}:{number}", opened, size)
      del record
    if end != "]" or at != len(text):
      raise ValueError("the list does not end")
  except (ValueError, RecursionError) as error:
    where = f"{opened.where}:{number}"
    lost = opened.size if not number else len(text) - at
    yield Skip(where, "malformed JSON", one_line(error), lost)


def read_csv(opened: Opened, dialect: str = "excel") -> Records:
  """Rows of a table with a heading; broken quotes are skips.

  The standard library reads rows one by one and of any size; bytes that are no
  UTF-8 stay what they are.
  """
  csv.field_size_limit(sys.maxsize)  # its default would refuse 131 kB of text
  file = opened.file
  if not isinstance(file, io.BufferedReader):
    file = io.BufferedReader(file, compression.BLOCK)
  text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
  taken = 0

  def lines():
    nonlocal taken
    for line in text:
      taken += len(line)
      opened.taken_bytes += len(line)
      yield line

  rows = csv.reader(lines(), dialect, strict=True)
  column = width = None
  try:
    while True:
      taken = 0
      where = f"{opened.where}:{rows.line_num + 1}"
      try:
        row = next(rows, None)
      except csv.Error as error:
        yield Skip(where, "malformed table", str(error), taken)
        continue
      if row is None:
        break
      if not row:  # a blank line
        continue
      if width is None:
        if opened.field not in row:
          known = ", ".join(row[:8])
          detail = f"no column {opened.field!r} among: {known}"
          yield Skip(where, "no text field", detail, opened.size)
          return
        column, width = row.index(opened.field), len(row)
      elif len(row) != width:
        detail = f"{len(row)} cells in a table of {width} columns"
        yield Skip(where, "malformed table", detail, taken)
      else:
        value = row[column].encode("utf-8", "surrogateescape")
        del row
        yield Document(where, value)
        del value
    opened.check_complete()
  except DAMAGE as error:
    yield opened.damage(f"{opened.where}:{rows.line_num + 1}", error)
  finally:
    text.detach()


def read_tsv(opened: Opened) -> Records:
  yield from read_csv(opened, "excel-tab")
