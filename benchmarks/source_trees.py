"""Random trees of files that know what must be read from them.

Files of all kinds, sizes and names, right and wrong, compressed, joined, padded
and damaged, in a tree with links, loops and hidden names; for
`fuzz_sources.py`.
"""

import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute  # a cast loads it, and a user without rights may not
import pyarrow.ipc
import pyarrow.parquet

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
        return f"texts {short(texts)}, not {short(self.texts)}"
      if reasons != self.reasons:
        return f"reasons {dict(reasons)}, not {dict(self.reasons)}"
      return None
    if texts[: self.sure] != self.texts[: self.sure]:
      return f"texts {short(texts)}, not first {short(self.texts[: self.sure])}"
    if self.loose:
      return None
    if texts != self.texts[: len(texts)]:
      return f"texts {short(texts)} do not begin {short(self.texts)}"
    if reasons["corrupt file"] != 1:
      return f"reasons {dict(reasons)}, not one corrupt file"
    return None


def short(texts: list[bytes]) -> str:
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
