"""What a file holds: from its name, then from its first bytes.

Names are often wrong or missing: a download keeps its "?query", a script
compresses to ".txt", a repository holds pointers in place of files. So what is
recognised by its first bytes is taken for what it is, and only the rest for
what its name says. What is neither text nor a kind that can be read is a skip.
"""

import contextlib
import json
import re
from typing import Any, NamedTuple

from aunet_jax.data import compression

_SUFFIXES = {
  ".jsonl": "jsonl",
  ".jsonlines": "jsonl",
  ".ndjson": "jsonl",
  ".ldjson": "jsonl",
  ".parquet": "parquet",
  ".arrow": "arrow",
  ".feather": "arrow",
  ".arrayrecord": "arrayrecord",
  ".array_record": "arrayrecord",
  ".csv": "csv",
  ".tsv": "tsv",
  ".warc": "warc",
  ".wet": "warc",
  ".wat": "warc",
  ".tar": "tar",
  ".zip": "archive",
  ".7z": "archive",
  ".rar": "archive",
  # Compressions that are not read; some have no magic number.
  ".br": "packed",
  ".lz": "packed",
  ".lz4": "packed",
  ".lzo": "packed",
  ".snappy": "packed",
  ".sz": "packed",
  ".z": "packed",
}

# Offset, bytes, kind, and what to call it where it cannot be read.
_MAGIC = (
  (0, b"PAR1", "parquet", ""),
  (0, b"ARROW1\0\0", "arrow", ""),
  (0, b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", "arrayrecord", ""),
  (257, b"ustar\0", "tar", ""),
  (257, b"ustar  \0", "tar", ""),
  (0, b"PK\x03\x04", "archive", "a zip archive"),
  (0, b"PK\x05\x06", "archive", "a zip archive"),
  (0, b"7z\xbc\xaf\x27\x1c", "archive", "a 7z archive"),
  (0, b"Rar!\x1a\x07", "archive", "a rar archive"),
  (0, b"!<arch>\n", "archive", "an ar archive"),
  (0, b"MSCF\0\0\0\0", "archive", "a cab archive"),
  (0, b"\x04\x22\x4d\x18", "packed", "lz4"),
  (0, b"\xff\x06\0\0sNaPpY", "packed", "snappy"),
  (0, b"LZIP\x01", "packed", "lzip"),
  (0, b"\x1f\x9d", "packed", "compress"),
  (0, b"\x89LZO\0", "packed", "lzop"),
  (0, b"version https://git-lfs.github.com/spec/", "pointer", "Git LFS"),
  (0, b"/annex/objects/", "pointer", "git-annex"),
  (0, b"../.git/annex/objects/", "pointer", "git-annex"),
  (0, b"%PDF-", "binary", "a PDF"),
  (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "binary", "an Office document"),
  (60, b"BOOKMOBI", "binary", "a Mobipocket book"),
  (0, b"AT&TFORM", "binary", "a DjVu document"),
  (0, b"\x89PNG\r\n\x1a\n", "binary", "a PNG image"),
  (0, b"\xff\xd8\xff", "binary", "a JPEG image"),
  (0, b"GIF87a", "binary", "a GIF image"),
  (0, b"GIF89a", "binary", "a GIF image"),
  (0, b"II*\0", "binary", "a TIFF image"),
  (0, b"MM\0*", "binary", "a TIFF image"),
  (8, b"WEBPVP8", "binary", "a WebP image"),
  (8, b"WAVEfmt ", "binary", "a sound"),
  (0, b"ID3\x02", "binary", "a sound"),
  (0, b"ID3\x03", "binary", "a sound"),
  (0, b"ID3\x04", "binary", "a sound"),
  (0, b"OggS\0", "binary", "a sound"),
  (0, b"fLaC\0", "binary", "a sound"),
  (0, b"\x1a\x45\xdf\xa3", "binary", "a video"),
  (0, b"\x7fELF", "binary", "a program"),
  (0, b"\xca\xfe\xba\xbe", "binary", "a program"),
  (0, b"\0asm", "binary", "a program"),
  (0, b"SQLite format 3\0", "binary", "a database"),
  (0, b"\x89HDF\r\n\x1a\n", "binary", "an HDF5 file"),
  (0, b"\x93NUMPY", "binary", "a NumPy array"),
  (0, b"Obj\x01", "binary", "an Avro table"),
  (0, b"FEA1\0", "binary", "a Feather table of version 1"),
  (0, b"wOFF\0", "binary", "a font"),
  (0, b"wOF2\0", "binary", "a font"),
)

_WARC = re.compile(rb"WARC/\d\.\d+\r?\n")
_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
# Bytes that text of any encoding has seldom: C0 without \a to \r and escape.
_CONTROLS = bytes({*range(7), *range(14, 27), *range(28, 32), 127})
_TEXT_SAMPLE = 8192  # bytes that are looked at for controls
_JSON_LINES = 8  # that are looked at, at most


class Content(NamedTuple):
  """What first bytes tell. `name` is for people."""

  kind: str  # a key of formats.READERS, or packed, pointer, binary
  name: str = ""


def by_name(path: str) -> tuple[str, str | None]:
  """The kind and compression that a file's name tells."""
  first = path.split("::")[0]  # zip://a.txt::s3://…: the name in the archive
  path = first if "://" in first else path
  name = re.split(r"[/\\]", path.lower().rstrip("/"))[-1]
  found = _by_plain_name(name)
  # "a.parquet?download=true" and the like; also "what?.csv?download=true"
  while found == ("text", None) and (cut := re.search(r"[?#][^?#]*\Z", name)):
    name = name[: cut.start()]
    found = _by_plain_name(name)
  return found


def _by_plain_name(name: str) -> tuple[str, str | None]:
  stem, suffix = _cut(name)
  if suffix in compression.TAR_SUFFIXES:
    return "tar", compression.TAR_SUFFIXES[suffix]
  packed = compression.SUFFIXES.get(suffix)
  if packed is not None:
    stem, suffix = _cut(stem)
    if suffix == ".json":  # C4 and Dolma name their JSON lines so
      return "jsonl", packed
  return _SUFFIXES.get(suffix, "text"), packed


def _cut(name: str) -> tuple[str, str]:
  stem, dot, suffix = name.rpartition(".")
  return (stem, dot + suffix) if dot else (name, "")


def by_content(head: bytes, field: str) -> Content | None:
  """What the first bytes of a decompressed file tell; None = nothing.

  Args: head: up to compression.BLOCK bytes, all there are if they are fewer.
    field: of a lone JSON object, which is a record only if it has it.
  """
  for offset, magic, kind, name in _MAGIC:
    if head.startswith(magic, offset):
      return Content(kind, name)
  if _WARC.match(head):
    return Content("warc")
  if head[:4] == b"\xff\xff\xff\xff" and head[6:8] == b"\0\0":
    return Content("arrow")  # a stream: its first message and the size of that
  if is_json_lines(head, field, len(head) < compression.BLOCK):
    return Content("jsonl")
  if is_json_array(head, field):
    return Content("json")
  if head and not head.startswith(_BOMS):
    sample = head[:_TEXT_SAMPLE]
    controls = len(sample) - len(sample.translate(None, _CONTROLS))
    # Compressed and other random bytes have 10% of them, and are no UTF-8. Four
    # zeros in a row are a number of some binary format. An ORC table may hold
    # plain text.
    if (
      b"\0\0\0\0" in sample
      or controls > 0.08 * len(sample)
      or (controls > max(1, 0.02 * len(sample)) and not _is_utf8(sample))
      or (controls and head.startswith(b"ORC"))
    ):
      return Content("binary", "binary data")
  return None


def _is_utf8(sample: bytes) -> bool:
  try:
    sample.decode()
  except UnicodeDecodeError as error:
    return error.end == len(sample) > 4  # a character may go on after it
  return True


_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?=\{)")


def is_json_array(head: bytes, field: str) -> bool:
  """Whether this begins a JSON list of objects, the first with `field`."""
  if start := _ARRAY.match(head):
    text = head[start.end() :].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
      return has(json.JSONDecoder(parse_int=float).raw_decode(text)[0], field)
  return False


def is_json_lines(head: bytes, field: str, is_complete: bool = True) -> bool:
  """Whether most of the first lines are JSON objects, and more than one.

  One alone is often a setting or a program's state: it has to have `field`.

  Args: is_complete: nothing comes after `head`.
  """
  lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n", 8 * _JSON_LINES)
  if not is_complete or len(lines) > 8 * _JSON_LINES:
    lines.pop()  # its end is not seen
  lines = [stripped for line in lines if (stripped := line.strip())]
  lines = lines[:_JSON_LINES]
  objects = []
  for line in lines:
    if line.startswith(b"{"):
      with contextlib.suppress(ValueError):
        objects.append(parse(line))
  if len(lines) == 1 == len(objects):
    return has(objects[0], field)
  return len(objects) > 1 and 2 * len(objects) >= len(lines)


# ----- JSON, and fields in it -----------------------------------------------

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_DEEPEST = 64  # levels of nesting that are read; below them is null


def parse(line: bytes) -> Any:
  """The value of a JSON text.

  Numbers of any length are read, if need be as floats, and nesting of any
  depth; Python refuses both, though the text beside them is fine.

  Raises: ValueError for what is no JSON or no UTF-8.
  """
  try:
    return json.loads(line)  # any argument would make a decoder for each line
  except RecursionError:
    return json.loads(_prune(line), parse_int=float)
  except ValueError:  # malformed, or a number of more digits than Python takes
    try:
      return json.loads(line, parse_int=float)
    except RecursionError:
      return json.loads(_prune(line), parse_int=float)


def _prune(line: bytes) -> bytes:
  """The JSON text with null for what is nested more than _DEEPEST levels.

  Raises: ValueError where brackets do not match.
  """
  kept, opened, start = [], bytearray(), 0
  for token in _TOKEN.finditer(line):
    mark = token.group()[:1]
    if mark in b"[{":
      if len(opened) == _DEEPEST:
        kept += [line[start : token.start()], b"null"]
      opened += mark
    elif mark in b"]}":
      if not opened or opened.pop() != mark[0] - 2:
        raise ValueError(f"an unexpected {mark.decode()}")
      if len(opened) == _DEEPEST:
        start = token.end()
  if opened:
    raise ValueError(f"{len(opened)} brackets are not closed")
  return b"".join([*kept, line[start:]])


class Joined(tuple):
  """The values that a path finds in the items of lists, in order."""


def find(record: dict, field: str) -> Any:
  """The value of a field: a name, or a path as "a.b".

  A path goes through every item of the lists on its way, and through those of
  its last value; "*" is every item of a list, which a name alone does not take.

  Returns: a `Joined` where there were lists.
  Raises: KeyError where the record has no such field.
  """
  if field in record:
    return record[field]
  names = field.split(".")
  if len(names) == 1:
    raise KeyError(field)
  return _walk(record, names)


def _walk(value: Any, names: list[str]) -> Any:
  if isinstance(value, list):
    names = names[1:] if names[:1] == ["*"] else names
    found = []
    for item in value:
      try:
        inner = _walk(item, names)
      except KeyError:  # as messages of other kinds in a conversation
        continue
      found += inner if isinstance(inner, Joined) else [inner]
    if value and names and not found:
      raise KeyError(names[0])
    return Joined(found)
  if not names:
    return value
  if not isinstance(value, dict) or names[0] not in value:
    raise KeyError(names[0])
  return _walk(value[names[0]], names[1:])


def has(record: dict, field: str) -> bool:
  try:
    find(record, field)
  except KeyError:
    return False
  return True
