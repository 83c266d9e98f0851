"""Random trees of files against a plain oracle of what must be read.

  python -m benchmarks.fuzz_sources --trees=10000 --seed=0

Every tree has files of all kinds, sizes and names, right and wrong, compressed,
joined, padded and damaged, with links to files and directories, loops, hidden
names and, where this runs as root, names that another user may not read. What
a file holds is known from making it; which files a specification names is found
again by a fixpoint over real paths. Compared are the texts of every file, in
order, and how often each reason is counted. A tree that disagrees is printed
with the number that makes it again; the exit status is then 1.
"""

import argparse
import bz2
import collections
import csv
import dataclasses
import gzip
import io
import json
import lzma
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from aunet_jax.data import sources
from aunet_jax.data.compression import zstd

NOBODY = 65534
SEPARATORS = (None, None, "line", "blank_line", "<|end|>")
FIELDS = ("text", "text", "meta.text")
PACKERS = {
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstd.compress,
  ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}
OTHER_NAMES = {
  ".gz": (".gz", ".GZ", ".gzip"),
  ".bz2": (".bz2", ".bz"),
  ".xz": (".xz",),
  ".zst": (".zst", ".zstd"),
  ".lzma": (".lzma",),
}


@dataclasses.dataclass
class File:
  """What a file must give.

  Attributes:
    texts: of a file without damage, in order.
    reasons: of its skips.
    sure: texts from the start that must be read in spite of damage.
    loose: a wrong bit may have become text, so that only `sure` is held.
  """

  data: bytes
  suffix: str  # the right end of its name
  texts: list[bytes]
  reasons: Counter
  sure: int | None = None  # None = all, and no other
  loose: bool = False
  any_name: bool = False  # its bytes tell its kind
  streams: tuple[int, ...] = ()  # texts in each piece that may be a stream
  pieces: tuple[bytes, ...] = ()

  def disagrees(self, texts: list[bytes], reasons: Counter) -> str | None:
    if self.sure is None:
      if texts != self.texts:
        return f"texts {_short(texts)}, not {_short(self.texts)}"
      if reasons != self.reasons:
        return f"reasons {dict(reasons)}, not {dict(self.reasons)}"
      return None
    if texts[: self.sure] != self.texts[: self.sure]:
      return (
        f"texts {_short(texts)}, not first {_short(self.texts[: self.sure])}"
      )
    if self.loose:
      return None
    if texts != self.texts[: len(texts)]:
      return f"texts {_short(texts)} do not begin {_short(self.texts)}"
    if reasons["corrupt file"] != 1:
      return f"reasons {dict(reasons)}, not one corrupt file"
    return None


def _short(texts: list[bytes]) -> str:
  return f"{len(texts)}: {[text[:30] for text in texts[:6]]}"


class Maker:
  """Makes files and trees from a seed."""

  def __init__(self, seed: int, field: str, separator: str | None):
    self.rng = random.Random(seed)
    self.field, self.separator = field, separator

  # ----- contents -----------------------------------------------------------

  def words(self, most: int = 30) -> str:
    rng = self.rng
    words = ("a", "The", "größer", "第三", "42", ",", "x" * 50, '"so"', "\t")
    text = "".join(
      rng.choice(words) + rng.choice((" ", " ", "\n", "\n\n", "\r\n", " \n \n"))
      for _ in range(rng.randrange(1, most))
    )
    return rng.choice(("", "", "\ufeff", "  ", "\n")) + text

  def text(self) -> File:
    text = self.words().encode()
    if self.rng.random() < 0.2:
      text = text.replace("ß".encode(), b"\xdf") + b"\xff"
    if self.separator == "<|end|>":
      text += b"".join(
        b"<|end|>" + self.words(4).encode() * self.rng.randrange(2)
        for _ in range(self.rng.randrange(4))
      )
    if self.rng.random() < 0.05:
      text = self.rng.choice((b"", b"\n", b" \n\n", b"<|end|>"))
    if self.rng.random() < 0.03:
      text = text * self.rng.randrange(1, 3000)
    texts = [t for t in split(text, self.separator) if t]
    suffixes = (".txt", "", ".md", ".py", ".json", ".log")
    reasons = Counter() if texts else Counter(empty=1)
    return File(text, self.rng.choice(suffixes), texts, reasons)

  def record(self) -> tuple[object, bytes | None, str | None]:
    """A JSON record, its text, and the reason where it has none."""
    rng, kind = self.rng, self.rng.random()
    text = self.words(12)
    value: object = text
    reason = None
    if kind < 0.05:
      value, text, reason = None, None, "null text"
    elif kind < 0.1:
      value, text, reason = 5, None, "text of a wrong type"
    elif kind < 0.15:
      value, text, reason = "", None, "empty"
    record: dict = {"id": rng.randrange(10**6), "text": value}
    if self.field == "meta.text":
      record = {"text": "not this", "meta": {"text": value}}
      if reason is None and rng.random() < 0.3:
        record["meta"] = [{"text": value}, {"x": 1}, {"text": "more"}]
        text = f"{text}\nmore"
    if rng.random() < 0.05:
      return {"body": "x"}, None, "no text field"
    if rng.random() < 0.03:
      return [1], None, "not an object"
    return record, None if text is None else text.encode(), reason

  def jsonl(self) -> File:
    rng = self.rng
    lines, texts, reasons, pieces, counts = [], [], Counter(), [], []
    for _ in range(rng.randrange(1, 15)):
      record, text, reason = self.record()
      line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode()
      if isinstance(record, dict) and rng.random() < 0.03:
        odd = rng.choice((b"9" * 5000, b"[" * 3000 + b"]" * 3000))
        line = b'{"odd": ' + odd + b", " + line[1:]
      if rng.random() < 0.05:
        line, text, reason = b'{"text": "cut', None, "malformed JSON"
      lines.append(line + rng.choice((b"\n", b"\r\n", b"\n\n")))
      if reason is None:
        texts.append(text)
      else:
        reasons[reason] += 1
      if rng.random() < 0.4:
        pieces.append(b"".join(lines))
        counts.append(len(texts))
        lines = []
    if lines:
      pieces.append(b"".join(lines))
      counts.append(len(texts))
    data = b"".join(pieces)
    objects = 0
    shown = [line for line in data.split(b"\n") if line.strip()][:8]
    for line in shown:
      objects += line.startswith(
        (b'{"id', b'{"text": "not', b'{"body', b'{"odd')
      )
    found = objects > 1 and 2 * objects >= len(shown)
    suffix = rng.choice((".jsonl", ".ndjson", ".jsonlines"))
    return File(
      data,
      suffix,
      texts,
      reasons,
      any_name=found,
      streams=tuple(counts),
      pieces=tuple(pieces),
    )

  def array(self) -> File:
    """A JSON list of records, of which the first has the field."""
    rng = self.rng
    records, texts, reasons = [], [], Counter()
    while len(records) < 1 or rng.random() < 0.8:
      record, text, reason = self.record()
      if not records and reason in ("no text field", "not an object"):
        continue
      records.append(record)
      if reason is None:
        texts.append(text)
      else:
        reasons[reason] += 1
    data = json.dumps(records, indent=rng.choice((None, 1, 4))).encode()
    if rng.random() < 0.1:
      data = data.rstrip()[:-1]
      reasons["malformed JSON"] += 1
    return File(data, ".json", texts, reasons, any_name=True)

  def table(self) -> File:
    rng = self.rng
    suffix, dialect = rng.choice(((".csv", "excel"), (".tsv", "excel-tab")))
    file, texts, reasons = io.StringIO(newline=""), [], Counter()
    writer = csv.writer(file, dialect)
    has = rng.random() < 0.9
    writer.writerow(["id", self.field if has else "body", "n"])
    for number in range(rng.randrange(8)):
      text = self.words(10)
      if rng.random() < 0.1:
        writer.writerow([number, text])
        reasons["malformed table"] += 1
      elif rng.random() < 0.1:
        writer.writerow([number, "", 1])
        reasons["empty"] += 1
      else:
        writer.writerow([number, text, 1])
        texts.append(text.encode())
    if not has:
      texts, reasons = [], Counter({"no text field": 1})
    elif not texts and not reasons:
      reasons["empty"] = 1
    return File(file.getvalue().encode(), suffix, texts, reasons)

  def column(self) -> tuple[pa.Table, list[bytes], Counter]:
    values, texts, reasons = [], [], Counter()
    for _ in range(self.rng.randrange(1, 9)):
      text = self.words(8)
      if self.rng.random() < 0.1:
        reasons["null text"] += 1
        values.append(None)
      elif self.rng.random() < 0.1:
        reasons["empty"] += 1
        values.append(b"")
      else:
        data = text.encode() + b"\xe9" * (self.rng.random() < 0.2)
        values.append(data)
        texts.append(data)
    kinds = (pa.binary(), pa.large_binary(), pa.string(), pa.large_string())
    wanted = self.rng.choice(kinds)
    array = pa.array(
      values,
      pa.large_binary() if pa.types.is_large_string(wanted) else pa.binary(),
    )
    if pa.types.is_string(wanted) or pa.types.is_large_string(wanted):
      array = pa.Array.from_buffers(
        wanted, len(array), array.buffers(), array.null_count
      )
    if self.field == "meta.text" and self.rng.random() < 0.7:
      inner = pa.StructArray.from_arrays([array], ["text"])
      return pa.table({"meta": inner, "n": [1] * len(values)}), texts, reasons
    table = pa.table({"n": [1] * len(values), self.field: array})
    return table, texts, reasons

  def parquet(self) -> File:
    table, texts, reasons = self.column()
    buffer = io.BytesIO()
    pa.parquet.write_table(
      table, buffer, row_group_size=self.rng.choice((2, 100))
    )
    data = buffer.getvalue()
    return File(data, ".parquet", texts, reasons, any_name=True)

  def arrow(self) -> File:
    table, texts, reasons = self.column()
    buffer = io.BytesIO()
    new = self.rng.choice((pa.ipc.new_file, pa.ipc.new_stream))
    with new(buffer, table.schema) as writer:
      writer.write_table(table, self.rng.choice((1, 100)))
    data = buffer.getvalue()
    return File(data, ".arrow", texts, reasons, any_name=True)

  def arrayrecord(self) -> File:
    from array_record.python import array_record_module

    texts, reasons = [], Counter()
    with tempfile.NamedTemporaryFile() as file:
      writer = array_record_module.ArrayRecordWriter(
        file.name, self.rng.choice(("group_size:1", "group_size:4"))
      )
      for _ in range(self.rng.randrange(1, 6)):
        text = self.words().encode() * (self.rng.random() < 0.9)
        writer.write(text)
        if text:
          texts.append(text)
        else:
          reasons["empty"] += 1
      writer.close()
      data = pathlib.Path(file.name).read_bytes()
    return File(data, ".arrayrecord", texts, reasons, any_name=True)

  def warc(self) -> File:
    rng = self.rng
    texts, reasons, parts, counts = [], Counter(), [], []
    for _ in range(rng.randrange(1, 7)):
      kind = rng.choice(("conversion", "response", "warcinfo", "request"))
      content = text = self.words().encode()
      extra = ""
      if kind in ("response", "request"):
        extra = "WARC-Target-URI: http://example.org/\r\n"
        start = b"HTTP/1.1 200 OK" if kind == "response" else b"GET / HTTP/1.1"
        content = start + b"\r\n\r\n" + text
      head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\n{extra}"
        f"Content-Length: {len(content)}\r\n\r\n"
      )
      parts.append(head.encode() + content + b"\r\n\r\n")
      if kind in ("conversion", "response"):
        texts.append(text)
      else:
        reasons["no text record"] += 1
      counts.append(len(texts))
    return File(
      b"".join(parts),
      rng.choice((".warc", ".wet")),
      texts,
      reasons,
      any_name=True,
      streams=tuple(counts),
      pieces=tuple(parts),
    )

  def tar(self) -> File:
    rng = self.rng
    buffer, texts, reasons = io.BytesIO(), [], Counter()
    members, ends = 0, []
    with tarfile.open(fileobj=buffer, mode="w") as archive:
      for number in range(rng.randrange(1, 6)):
        kind = rng.random()
        member = tarfile.TarInfo(f"d/{number:04}")
        if kind < 0.1:
          member.type = tarfile.DIRTYPE
          archive.addfile(member)
          continue
        members += 1
        if kind < 0.2:
          member.type, member.linkname = tarfile.SYMTYPE, "d/x"
          reasons["not a regular file"] += 1
          archive.addfile(member)
        elif kind < 0.3:
          member.name = f"d/.hidden/{number}"
          reasons["hidden name"] += 1
          archive.addfile(member)
        else:
          file = rng.choice((self.text, self.jsonl, self.table, self.binary))()
          if rng.random() < 0.3:
            file = self.pack(file, damaged=False)
          member.name += file.suffix
          member.size = len(file.data)
          archive.addfile(member, io.BytesIO(file.data))
          texts += file.texts
          reasons += file.reasons
        ends.append((buffer.tell(), len(texts)))
      closing = buffer.tell()
    if not members:
      reasons["empty"] = 1
    data = buffer.getvalue()
    file = File(data, ".tar", texts, reasons, any_name=bool(ends))
    if ends and rng.random() < 0.3:
      cut = rng.randrange(512, closing + 400)
      file.data = data[:cut]
      file.sure = max([n for end, n in ends if end <= cut], default=0)
      file.reasons = Counter({"corrupt file": 1})
    elif rng.random() < 0.2:
      other = self.tar()
      if other.sure is None and members and other.reasons != {"empty": 1}:
        file.data += other.data
        file.texts = file.texts + other.texts
        file.reasons = file.reasons + other.reasons
    return file

  def binary(self) -> File:
    rng = self.rng
    data, reason = rng.choice(
      (
        (b"\x89PNG\r\n\x1a\n" + rng.randbytes(50), "not text"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj text", "not text"),
        (bytes(range(256)) * 3, "not text"),
        (b"\x7fELF" + bytes(60), "not text"),
        (b"name" + bytes(12) + b"more names of something", "not text"),
        (b"PK\x03\x04" + rng.randbytes(60), "unsupported archive"),
        (b"7z\xbc\xaf\x27\x1c" + rng.randbytes(60), "unsupported archive"),
        (b"\x04\x22\x4d\x18" + rng.randbytes(9), "unsupported compression"),
        (
          b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
          "pointer to a file",
        ),
        (b"/annex/objects/SHA256E-s99--abc.txt", "pointer to a file"),
      )
    )
    return File(data, ".txt", [], Counter({reason: 1}), any_name=True)

  # ----- around them --------------------------------------------------------

  def pack(self, file: File, damaged: bool = True) -> File:
    """Compressed, in one stream or more, with padding, perhaps damaged."""
    rng = self.rng
    suffix = rng.choice(tuple(PACKERS))
    packer = PACKERS[suffix]
    is_joined = file.pieces and suffix != ".lzma" and rng.random() < 0.6
    pieces = file.pieces if is_joined else (file.data,)
    counts = file.streams if is_joined else (len(file.texts),)
    padding = bytes(rng.choice((0, 0, 4, 512)) if suffix != ".lzma" else 0)
    parts = [packer(piece) + padding for piece in pieces]
    data = b"".join(parts)
    name = file.suffix + rng.choice(OTHER_NAMES[suffix])
    if file.suffix == ".tar" and rng.random() < 0.3:
      name = {".gz": ".tgz", ".bz2": ".tbz2", ".xz": ".txz"}.get(suffix, name)
    made = dataclasses.replace(
      file, data=data, suffix=name, streams=(), pieces=()
    )
    made.any_name = file.any_name and suffix != ".lzma"
    is_list = file.suffix == ".json" and file.any_name
    # What it is may be seen, and counted, before the damage is met; or may not
    # be seen any more, as of a JSON list whose first object is cut.
    made.loose = not file.texts or is_list
    if file.suffix == ".json":  # would say JSON lines now
      made.suffix = ".txt" + rng.choice(OTHER_NAMES[suffix])
    kind = rng.random()
    if not damaged or file.sure is not None or not file.data or kind > 0.3:
      return made
    ends = [sum(map(len, parts[: n + 1])) for n in range(len(parts))]
    keeps = bool(file.pieces)  # the documents before damage count
    if kind < 0.1 and len(data) > 40:
      cut = rng.randrange(20, len(data))
      made.data = data[:cut]
      made.sure = 0
      made.any_name = False
      whole = [n for n, end in enumerate(ends) if end - len(padding) <= cut]
      if keeps and whole:
        made.sure = counts[whole[-1]]
      between = [0, *(end - len(padding) for end in ends)]
      if any(0 <= cut - e <= len(padding) for e in between):
        made.loose = True  # between streams, where nothing is missing
    elif kind < 0.2 and len(data) > 40:
      at = rng.randrange(len(data))
      made.data = (
        data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
      )
      before = [n for n, end in enumerate(ends) if end <= at]
      made.sure = counts[before[-1]] if keeps and before else 0
      made.loose = True
      made.any_name = False
    else:
      made.data = data + b"something else after it"
      if not keeps:  # text, or a table, may be part of a larger one
        made.sure = 0
        if file.suffix == ".tar":
          made.loose = True
        if file.suffix in (".parquet", ".arrow", ".arrayrecord"):
          made.loose = True
        if not file.texts and file.reasons["corrupt file"] == 0:
          made.loose = True
      else:
        made.reasons = file.reasons + Counter({"corrupt file": 1})
        if file.reasons == Counter(empty=1):
          made.loose = True
    return made

  def makers(self) -> tuple[Callable[[], File], ...]:
    return (
      self.text,
      self.jsonl,
      self.array,
      self.table,
      self.parquet,
      self.arrow,
      self.arrayrecord,
      self.warc,
      self.tar,
      self.binary,
    )

  def file(self) -> File:
    often = (self.text, self.jsonl) * 3
    file = self.rng.choice((*often, *self.makers()))()
    if self.rng.random() < 0.4:
      file = self.pack(file)
      if self.rng.random() < 0.1:
        inner = dataclasses.replace(file, pieces=(), streams=())
        if inner.sure is None and inner.any_name:
          file = self.pack(inner)
          if file.sure is not None:
            file.loose, file.sure = True, 0
    return file

  def name(self, number: int, file: File) -> bytes:
    rng = self.rng
    stem = rng.choice(
      ("a", "data-00000-of-00009", "größer", "with space", "comma,name", "q?x",
       "new\nline", "[b]", "x.tar.bak", "~", "#", "%20", "a=b:c")
    )  # fmt: skip
    suffix = file.suffix
    if file.any_name and rng.random() < 0.4:
      suffix = rng.choice((".txt", "", ".json", ".data", ".1", file.suffix))
    if rng.random() < 0.1:
      suffix = suffix.upper()
    if rng.random() < 0.1 and suffix:
      suffix += "?download=true"
    raw = f"{number:02}{stem}{suffix}".encode()
    return raw[:2] + b"\xe9" + raw[2:] if rng.random() < 0.05 else raw

  # ----- trees --------------------------------------------------------------

  def tree(self, root: bytes, others: bool) -> dict[bytes, File]:
    """Makes a tree; returns its files by real path.

    Args: others: another user will read, so permissions can be taken.
    """
    rng = self.rng
    os.mkdir(root)
    os.mkdir(root + b"/in")
    os.mkdir(root + b"/out")
    directories = [root + b"/in", root + b"/out"]
    for number in range(rng.randrange(1, 6)):
      name = rng.choice((b"d%d", b".h%d", b"d%d.txt", b"\xff%d")) % number
      directories.append(rng.choice(directories) + b"/" + name)
      os.mkdir(directories[-1])
    files: dict[bytes, File] = {}
    for number in range(rng.randrange(1, 9)):
      file = self.file()
      name = self.name(number, file)
      if rng.random() < 0.08:
        name = b"." + name
      path = rng.choice(directories) + b"/" + name
      pathlib.Path(os.fsdecode(path)).write_bytes(file.data)
      files[path] = file
    # Who may not enter a directory does not see what links into it are.
    closes = others and rng.random() < 0.3
    for number in range(0 if closes else rng.randrange(6)):
      place = rng.choice(directories) + b"/link%d" % number
      kind = rng.random()
      if kind < 0.4:
        target = rng.choice(directories)
      elif kind < 0.7:
        target = rng.choice([*files, root + b"/nowhere"])
        place += os.path.basename(target).lstrip(b".")  # with the right end
      elif kind < 0.85:
        target = rng.choice((b".", b"..", b"../..", b"link%d" % (number + 1)))
      else:
        target = rng.choice(list(files))
        place += os.path.basename(target).lstrip(b".")
        os.link(target, place)
        files[place] = files[target]
        continue
      if kind < 0.7 and rng.random() < 0.5:
        target = os.path.relpath(target, os.path.dirname(place))
      os.symlink(target, place)
    if others:
      closed = [*files, *(directories[2:] if closes else ())]
      for path in rng.sample(closed, k=rng.randrange(2)):
        os.chmod(path, 0)
    return files


def split(text: bytes, separator: str | None) -> list[bytes]:
  """The documents of a text file, by looking at all of it."""
  if separator is None:
    return [text]
  if separator == "<|end|>":
    return text.split(b"<|end|>")
  lines = re.findall(rb"[^\n]*\n|[^\n]+\Z", text)
  if separator == "line":
    return [line.rstrip(b"\r\n") for line in lines if line.strip()]
  texts, held = [], []
  for line in [*lines, b"\n"]:
    if line.strip():
      held.append(line)
    elif held:
      text = b"".join(held)
      texts.append(text.removesuffix(b"\n").removesuffix(b"\r"))
      if not text.endswith(b"\n"):
        texts[-1] = text
      held = []
  return texts


# ----- the oracle of listing ------------------------------------------------


def _may_read(path: str, others: bool) -> bool:
  return not others or bool(os.stat(path).st_mode & 0o777)


def reachable(root: str, others: bool) -> tuple[dict[str, str], Counter]:
  """Real paths of files below a directory, and reasons of what is left out.

  Loops count as duplicates here: which of the two it is, is a matter of order.
  """
  reasons, files, seen, todo = Counter(), {}, set(), [os.path.realpath(root)]
  arrivals = num_files = 0
  seen.add(todo[0])
  while todo:
    here = todo.pop()
    if not _may_read(here, others):
      reasons["unreadable"] += 1
      continue
    for name in os.listdir(here):
      path = os.path.join(here, name)
      if name.startswith("."):
        reasons["hidden name"] += 1
      elif os.path.isdir(path):
        arrivals += 1
        real = os.path.realpath(path)
        if real not in seen:
          seen.add(real)
          todo.append(real)
      else:
        num_files += 1
        files[os.path.realpath(path)] = name
  doubles = arrivals - (len(seen) - 1) + num_files - len(files)
  if doubles:
    reasons["duplicate path"] = doubles
  return files, reasons


# ----- the comparison -------------------------------------------------------


def read(
  paths: list[str], field: str, separator: str | None
) -> tuple[list[tuple[str, list[bytes], Counter]], Counter]:
  """(path, texts, reasons) of every file, and reasons of the listing."""
  found, skips = sources.list_sources(paths)
  result = []
  for source in found:
    texts, reasons = [], Counter()
    for record in sources.read_source(source, field, separator):
      if isinstance(record, sources.Skip):
        reasons[record.reason] += 1
      else:
        texts.append(record.text)
    result.append((source.path, texts, reasons))
  left_out = Counter(skip.reason for skip in skips)
  left_out["duplicate path"] += left_out.pop("link loop", 0)
  return result, +left_out


def _serve(connection) -> None:
  """Reads as a user without rights, for a parent who has them all."""
  with tempfile.TemporaryDirectory() as directory:  # loads all libraries
    maker = Maker(0, "text", None)
    for number, make in enumerate(maker.makers()):
      file = make()
      path = pathlib.Path(directory, f"{number}{file.suffix}")
      path.write_bytes(file.data)
    read([directory], "text", None)
  os.setgroups([])
  os.setgid(NOBODY)
  os.setuid(NOBODY)
  while (task := connection.recv()) is not None:
    try:
      connection.send(read(*task))
    except Exception as error:
      connection.send(error)


class Reader:
  """`read`, by this user or by one without rights.

  Attributes: others: whether it is another, who may not read everything.
  """

  def __init__(self, others: bool):
    self.others = others
    if others:
      self._ours, theirs = multiprocessing.Pipe()
      self._process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(theirs,), daemon=True
      )
      self._process.start()

  def __call__(self, *task):
    if not self.others:
      return read(*task)
    self._ours.send(task)
    result = self._ours.recv()
    if isinstance(result, Exception):
      raise result
    return result

  def close(self) -> None:
    if self.others:
      self._ours.send(None)
      self._process.join()


def _check(
  found, files: dict[bytes, File], expected: dict[str, str], others: bool
) -> list[str]:
  """Disagreements on the files that were read."""
  wrong = []
  by_real = collections.defaultdict(list)
  for path, texts, reasons in found:
    by_real[os.path.realpath(path)].append((texts, reasons))
  if set(by_real) != set(expected):
    extra = sorted(set(by_real) - set(expected))
    missing = sorted(set(expected) - set(by_real))
    wrong.append(f"listed {extra} too much, {missing} too little")
  for real, results in by_real.items():
    if len(results) > 1:
      wrong.append(f"{real!r} is read {len(results)} times")
    file = files.get(os.fsencode(real))
    texts, reasons = results[0]
    if file is None or not _may_read(real, others):
      if texts or reasons != Counter(unreadable=1):
        wrong.append(f"{real!r}: {_short(texts)} {dict(reasons)}, unreadable")
    elif said := file.disagrees(texts, reasons):
      wrong.append(f"{real!r}: {said}")
  return wrong


def check_tree(seed: int, reader: Callable, directory: str) -> list[str]:
  """Makes a tree and reads it in some ways; returns what disagrees."""
  rng = random.Random(seed)
  field, separator = rng.choice(FIELDS), rng.choice(SEPARATORS)
  maker = Maker(rng.randrange(2**60), field, separator)
  root = os.path.join(directory, f"tree{seed}")
  files = maker.tree(os.fsencode(root), reader.others)
  top = os.path.join(root, "in")
  wrong = []
  try:
    expected, reasons = reachable(top, reader.others)
    for spec in (top, f"file://{top}", f"{top}/*", f"{top}/**", "**/*.txt"):
      wanted = expected
      if spec == "**/*.txt":
        spec = f"{top}/**/*.txt"
        wanted = {
          os.path.realpath(os.path.join(here, name)): name
          for here in _directories(top, reader.others)
          for name in os.listdir(here)
          if name.endswith(".txt") and not name.startswith(".")
          if not os.path.isdir(os.path.join(here, name))
        }
        below = [
          os.path.join(here, name)
          for here in _directories(top, reader.others)
          for name in os.listdir(here)
          if name.endswith(".txt") and not name.startswith(".")
          if os.path.isdir(os.path.join(here, name))
        ]
        for path in below:
          wanted |= reachable(path, reader.others)[0]
      try:
        found, left_out = reader([spec], field, separator)
      except ValueError as error:
        if wanted or "matches no file" not in str(error):
          wrong.append(f"{spec}: {type(error).__name__}: {error}")
        continue
      wrong += [
        f"{spec}: {line}"
        for line in _check(found, files, wanted, reader.others)
      ]
      if spec in (top, f"file://{top}") and left_out != reasons:
        wrong.append(f"{spec}: left out {dict(left_out)}, not {dict(reasons)}")
      elif not reasons["hidden name"] and left_out["hidden name"]:
        wrong.append(f"{spec}: hides {left_out['hidden name']} names")
    wrong += _check_url(seed, top, files, field, separator, expected)
  except Exception as error:
    wrong.append(f"{type(error).__name__}: {error}")
    if not wrong[:-1]:
      import traceback

      wrong.append(traceback.format_exc())
  for here, _, _ in os.walk(root):
    os.chmod(here, 0o700)
  shutil.rmtree(root)
  return [f"--seed={seed} ({field}, {separator!r}): {line}" for line in wrong]


def _directories(root: str, others: bool) -> set[str]:
  """Real paths of the directories that can be listed below one, and its own."""
  seen, todo = {os.path.realpath(root)}, [os.path.realpath(root)]
  while todo:
    here = todo.pop()
    if not _may_read(here, others):
      seen.discard(here)
      continue
    for name in os.listdir(here):
      path = os.path.join(here, name)
      real = os.path.realpath(path)
      if os.path.isdir(path) and not name.startswith(".") and real not in seen:
        seen.add(real)
        todo.append(real)
  return seen


def _check_url(seed, top, files, field, separator, expected) -> list[str]:
  """The same files behind a URL, without links and permissions."""
  memory = fsspec.filesystem("memory")
  place = f"/fuzz{seed}"
  wanted = {}
  for path, file in files.items():
    name = os.fsdecode(path)
    if not name.startswith(top + "/"):
      continue
    try:
      name.encode()
    except UnicodeEncodeError:
      continue
    inner = name[len(top) :]
    memory.pipe(place + inner, file.data)
    if not any(part.startswith(".") for part in inner.split("/")[1:]):
      wanted[f"memory://{place}{inner}"] = file
  if not wanted:
    return []
  wrong = []
  try:
    found, _ = read([f"memory://{place}"], field, separator)
    if {path for path, _, _ in found} != set(wanted):
      wrong.append(f"memory: listed {[p for p, _, _ in found]}")
    for path, texts, reasons in found:
      said = wanted[path].disagrees(texts, reasons) if path in wanted else None
      if said:
        wrong.append(f"{path}: {said}")
  finally:
    memory.rm(place, recursive=True)
  return wrong


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.fuzz_sources",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--trees", type=int, default=1000)
  parser.add_argument("--seed", type=int, default=0, help="of the first tree")
  args = parser.parse_args(argv)
  reader = Reader(others=os.getuid() == 0)
  directory = tempfile.mkdtemp(prefix="fuzz_sources")
  os.chmod(directory, 0o755)
  num_wrong = 0
  try:
    for number in range(args.trees):
      lines = check_tree(args.seed + number, reader, directory)
      num_wrong += bool(lines)
      for line in lines:
        print(line.encode("utf-8", "backslashreplace").decode(), flush=True)
      if (number + 1) % 500 == 0:
        print(f"{number + 1} trees, {num_wrong} disagree", file=sys.stderr)
  finally:
    reader.close()
    shutil.rmtree(directory, ignore_errors=True)
  print(f"{args.trees} trees, {num_wrong} disagree")
  return 1 if num_wrong else 0


if __name__ == "__main__":
  sys.exit(main())
