"""A packed corpus on disk: documents decoded once, rows found by number.

A store is a directory: `text.bin` holds the documents end to end,
`pieces.bin` every row's spans with the splitter's state at each, and small
index files tell where documents and rows begin. For a model that reads tokens,
`tokens.bin` holds the documents' tokens, made once, `token_documents.bin` where
each begins, and `token_bytes.bin` how many bytes every id is. Rows are read
with positioned reads rather than a memory map, so memory stays flat however
long a run is, and any thread or process may read any row.

`summary.json` has the size of every file and `checksums.bin` a checksum of
every block of them. Sizes, the summary and the checksums themselves are checked
when a store opens, blocks when they are first read, and every number of the
index against what it may be before it is used.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from aunet_jax import files
from aunet_jax.config import BOS, EOS
from aunet_jax.data import blocks, packing, roles

FORMAT = 3  # raise it when what the files hold, or the packing, changes
_UNCHECKED_FORMAT = 2  # had no checksums; a run that began with one goes on

_DIGESTS = 1 << 20  # read at a time

DamagedError = blocks.DamagedError


def piece_dtype(state_size: int) -> np.dtype:
  return np.dtype(
    [
      ("document", "<i8"),
      ("start", "<i8"),
      ("stop", "<i8"),
      ("state", "<i4", (state_size,)),
    ]
  )


def checksum(content: dict) -> int:
  """Of a JSON object, however it is laid out."""
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_json(path: pathlib.Path) -> dict:
  """An object that was written with its own `checksum`; without it.

  Raises: OSError, DamagedError.
  """
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise DamagedError(f"{path.name} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise DamagedError(f"{path.name} is no JSON object")
  unchecked = content.get("format") == _UNCHECKED_FORMAT
  if "checksum" in content or not unchecked:
    if content.pop("checksum", None) != checksum(content):
      raise DamagedError(f"{path.name} was changed")
  return content


class StoreWriter:
  """Packs documents as they come and writes a store.

  Used as a context, which closes the files; call `finish` before it ends.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    splitter,
    capacities,
    tokenizer=None,
    keep_documents: bool = False,
  ):
    """Args: tokenizer: None = rows of bytes. keep_documents: see `Packer`."""
    directory.mkdir(parents=True)
    self._directory = directory
    self._splitter = splitter
    self._capacities = tuple(capacities)
    self._keep_documents = keep_documents
    self._packer = packing.Packer(splitter, capacities, keep_documents)
    self._dtype = piece_dtype(len(splitter.start))
    self._tokenizer = tokenizer
    names = ["text.bin", "documents.bin", "digests.bin", "names.jsonl"]
    names += ["pieces.bin", "rows.bin"]
    if tokenizer is not None:
      names += ["tokens.bin", "token_documents.bin", "token_bytes.bin"]
    self._files = {name: blocks.Writer(directory / name) for name in names}
    self._content = hashlib.blake2b(digest_size=16)
    self.num_documents = self.num_bytes = self._num_tokens = 0
    self._num_rows = self._num_pieces = 0
    self._write_int("documents.bin", 0)
    self._write_int("rows.bin", 0)
    if tokenizer is not None:
      self._write_int("token_documents.bin", 0)
      table = tokenizer.num_bytes.astype("<i4")
      self._files["token_bytes.bin"].write(table.tobytes())

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    for file in self._files.values():
      file.close()

  def _write_int(self, name: str, value: int) -> None:
    self._files[name].write(value.to_bytes(8, "little"))

  def add(self, name: str, text: bytes, digest: bytes) -> None:
    """Takes a document; `digest` is a hash of its text."""
    self._files["text.bin"].write(text)
    self._files["names.jsonl"].write(json.dumps(name).encode() + b"\n")
    self._files["digests.bin"].write(digest[:8])
    self._content.update(digest)
    units = text
    if self._tokenizer is not None:
      units = self._tokenizer.encode(text)
      self._files["tokens.bin"].write(units.tobytes())
      self._num_tokens += len(units)
      self._write_int("token_documents.bin", self._num_tokens)
    self._write_rows(self._packer.add(self.num_documents, units))
    self.num_documents += 1
    self.num_bytes += len(text)
    self._write_int("documents.bin", self.num_bytes)

  def _write_rows(self, rows: Iterator[list[packing.Piece]]) -> None:
    for pieces in rows:
      array = np.array([tuple(piece) for piece in pieces], self._dtype)
      self._files["pieces.bin"].write(array.tobytes())
      self._num_rows += 1
      self._num_pieces += len(pieces)
      self._write_int("rows.bin", self._num_pieces)

  def finish(self) -> None:
    """Packs what is left and puts everything safely on disk."""
    self._write_rows(self._packer.finish())
    extra = {}
    if self._tokenizer is not None:
      extra = {
        "tokenizer_hash": self._tokenizer.hash,
        "bos": self._tokenizer.bos,
        "eos": self._tokenizer.eos,
        "token_dtype": self._tokenizer.dtype.str,
        "marks": self._tokenizer.marks.tolist(),
        "num_tokens": self._num_tokens,
      }
    sums = [file.finish() for file in self._files.values()]
    sums = np.concatenate(sums).tobytes()
    with contextlib.closing(
      blocks.Writer(self._directory / "checksums.bin")
    ) as file:
      file.write(sums)
      file.finish()
    identity = hashlib.blake2b(self._content.digest(), digest_size=16)
    how = [FORMAT, self._splitter.hash, self._capacities, self._keep_documents]
    if self._tokenizer is not None:
      how.append(self._tokenizer.hash)
    identity.update(json.dumps(how).encode())
    summary = {
      "format": FORMAT,
      "fingerprint": identity.hexdigest(),
      "content": self._content.hexdigest(),
      "splitter_hash": self._splitter.hash,
      "capacities": self._capacities,
      "keep_documents": self._keep_documents,
      "state_size": len(self._splitter.start),
      "num_rows": self._num_rows,
      "num_pieces": self._num_pieces,
      "num_documents": self.num_documents,
      "num_bytes": self.num_bytes,
      "num_cuts": self._num_pieces - self.num_documents,
      "used": self._packer.used_S.tolist(),
      **extra,
      "files": {name: file.size for name, file in self._files.items()},
      "checksum_of_checksums": zlib.crc32(sums),
    }
    write_json(self._directory / "summary.json", summary)


def write_json(path: pathlib.Path, content: dict) -> None:
  """Writes what `read_json` reads."""
  content = {**content, "checksum": checksum(content)}
  files.write_whole(path, json.dumps(content, indent=2))


def damaged(index: pathlib.Path, error: Exception) -> DamagedError:
  """Args: index: the directory that holds the stores."""
  return DamagedError(
    f"the data index {index} is damaged ({error}); delete that directory to "
    f"rebuild it."
  )


class Store:
  """Reads a finished store. Cheap to pickle: a worker opens its own.

  Attributes:
    summary: counts of all of it: num_rows, num_documents, num_bytes, num_cuts,
      used (slots per stage), fingerprint, splitter_hash, capacities; of tokens
      also num_tokens, tokenizer_hash, bos, eos.
  Raises: DamagedError, from every method: a file is not as it was written.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    splitter,
    index: pathlib.Path | None = None,
  ):
    """Args: index: the directory to delete where a file is damaged; None = the
    one above."""
    self._directory = pathlib.Path(directory)
    self._index = self._directory.parent if index is None else index
    self._splitter = splitter
    try:
      self._open_files()
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise damaged(self._index, error) from error

  def _open_files(self) -> None:
    self.summary = summary = read_json(self._directory / "summary.json")
    self._reads_tokens = "tokenizer_hash" in summary
    known = summary["format"]
    if known == FORMAT:
      sizes = summary["files"]
      sums = self._read_checksums(sizes)
    elif known == _UNCHECKED_FORMAT:
      sizes, sums = self._sizes_of_format_2(), {}
    else:
      raise DamagedError(
        f"its format {known} is not {FORMAT}, of another version of aunet_jax"
      )

    def open_file(name):
      path = self._directory / name
      return blocks.Reader(path, sizes[name], sums.get(name))

    self._text = open_file("text.bin")
    self._names = open_file("names.jsonl")
    self._documents = blocks.Table(open_file("documents.bin"), "<i8")
    self._rows = blocks.Table(open_file("rows.bin"), "<i8")
    self._pieces = blocks.Table(
      open_file("pieces.bin"), piece_dtype(len(self._splitter.start))
    )
    if known == FORMAT:
      self._digests = blocks.Table(open_file("digests.bin"), "<u8")
    if self._reads_tokens:
      dtype = np.dtype(summary["token_dtype"])
      self._tokens = blocks.Table(open_file("tokens.bin"), dtype)
      self._token_documents = blocks.Table(
        open_file("token_documents.bin"), "<i8"
      )
      table = blocks.Table(open_file("token_bytes.bin"), "<i4")
      self._token_bytes = table.read(0, len(table))
      if len(table) != summary["eos"] + 1 or summary["bos"] > summary["eos"]:
        raise DamagedError("it does not know the bytes of every token")
    for name, found, expected in (
      ("documents", len(self._documents) - 1, summary["num_documents"]),
      ("rows", len(self._rows) - 1, summary["num_rows"]),
    ):
      if found != expected:
        raise DamagedError(f"it holds {found} {name}, not {expected}")

  def _read_checksums(self, sizes: dict) -> dict[str, np.ndarray]:
    path = self._directory / "checksums.bin"
    counts = {name: -(-size // blocks.BLOCK) for name, size in sizes.items()}
    reader = blocks.Reader(path, 4 * sum(counts.values()), None)
    raw = reader.read(0, reader.size)
    if zlib.crc32(raw) != self.summary["checksum_of_checksums"]:
      raise DamagedError(f"{path.name} was changed")
    parts = np.split(raw.view("<u4"), np.cumsum(list(counts.values()))[:-1])
    return dict(zip(counts, parts, strict=True))

  def _sizes_of_format_2(self) -> dict[str, int]:
    summary = self.summary
    rows = blocks.Reader(
      self._directory / "rows.bin", 8 * (summary["num_rows"] + 1), None
    )
    last = summary["num_rows"]
    num_pieces = int(blocks.Table(rows, "<i8").read(last, last + 1)[0])
    itemsize = piece_dtype(summary["state_size"]).itemsize
    sizes = {
      "text.bin": summary["num_bytes"],
      "names.jsonl": os.stat(self._directory / "names.jsonl").st_size,
      "documents.bin": 8 * (summary["num_documents"] + 1),
      "rows.bin": rows.size,
      "pieces.bin": num_pieces * itemsize,
    }
    if self._reads_tokens:
      itemsize = np.dtype(summary["token_dtype"]).itemsize
      sizes["tokens.bin"] = summary["num_tokens"] * itemsize
      sizes["token_documents.bin"] = sizes["documents.bin"]
      sizes["token_bytes.bin"] = 4 * (summary["eos"] + 1)
    return sizes

  def __reduce__(self):
    return Store, (self._directory, self._splitter, self._index)

  @property
  def num_rows(self) -> int:
    return self.summary["num_rows"]

  @contextlib.contextmanager
  def _naming_itself(self):
    try:
      yield
    except DamagedError as error:
      raise damaged(self._index, error) from error

  def pieces(self, index: int) -> list[packing.Piece]:
    """The pieces of a row, in order."""
    with self._naming_itself():
      return self._read_pieces(index)

  def _read_pieces(self, index: int) -> list[packing.Piece]:
    first, last = self._rows.read(index, index + 2).tolist()
    found = self._pieces.read(first, last)
    # As Python's numbers, which cost least for the few pieces of most rows.
    pieces, room = [], self.summary["capacities"][0]
    for (document, start, stop, _), state in zip(
      found.tolist(), found["state"], strict=True
    ):
      room -= stop - start
      if not 0 <= start < stop or room < 0:
        raise DamagedError(f"row {index} has a piece that cannot be")
      pieces.append(packing.Piece(document, start, stop, state))
    return pieces

  def _span(self, bounds: blocks.Table, document: int) -> tuple[int, int]:
    if not 0 <= document < self.summary["num_documents"]:
      raise DamagedError(f"there is no document {document}")
    begin, end = bounds.read(document, document + 2).tolist()
    if not 0 <= begin <= end:
      raise DamagedError(f"document {document} cannot be at {begin} to {end}")
    return begin, end

  def _units(self, piece: packing.Piece) -> np.ndarray:
    """Bytes, or tokens, of a piece; see `packing.fill_row`."""
    if self._reads_tokens:
      bounds, units = self._token_documents, self._tokens
    else:
      bounds, units = self._documents, self._text
    begin, end = self._span(bounds, piece.document)
    if piece.stop > end - begin + 1:
      raise DamagedError(f"document {piece.document} ends before {piece.stop}")
    start = begin + packing.start_to_read(piece)
    return units.read(start, min(begin + piece.stop, end))

  def row(self, index: int) -> dict[str, np.ndarray]:
    """The arrays of a row, 0 <= index < num_rows; see `packing.fill_row`."""
    length = self.summary["capacities"][0]
    with self._naming_itself():
      pieces = self._read_pieces(index)
      units = [self._units(piece) for piece in pieces]
    bos, eos = self.summary.get("bos", BOS), self.summary.get("eos", EOS)
    if self._reads_tokens and any((text >= bos).any() for text in units):
      raise damaged(self._index, DamagedError("a token has no text"))
    marks = np.array(self.summary.get("marks", roles.ALL))
    try:
      row = packing.fill_row(
        pieces, units, self._splitter, length, bos, eos, marks
      )
    except ValueError as error:  # of the splitter: a state there cannot be
      raise damaged(self._index, error) from error
    if not self._reads_tokens:
      return row
    sizes = self._token_bytes[row["targets"]]
    counted = row.get("weights", row["documents"]) > 0
    if self._splitter.has_roles:  # END is no text
      counted &= row["targets"] != marks[-1]
    row["target_bytes"] = np.where(counted, sizes, 0)
    return row

  def documents(self) -> Iterator[tuple[str, bytes]]:
    """(name, text) of every document, in the order of the sources."""
    # Buffered files fill a document's bytes once, however large it is.
    with (
      open(self._directory / "names.jsonl", "rb") as names,
      open(self._directory / "text.bin", "rb") as text,
    ):
      at = 0
      for number in range(self.summary["num_documents"]):
        with self._naming_itself():
          begin, end = self._span(self._documents, number)
          self._text.check(begin, end)
          line = names.readline()
          self._names.check(at, at + len(line))
          at += len(line)
        yield json.loads(line), text.read(end - begin)

  def digests(self) -> Iterator[np.ndarray]:
    """First 8 bytes of every document's digest, uint64, in blocks."""
    for at in range(0, len(self._digests), _DIGESTS):
      with self._naming_itself():
        end = min(at + _DIGESTS, len(self._digests))
        block = self._digests.read(at, end)
      yield block

  def last_digests(self, count: int) -> list[bytes]:
    """First 8 bytes of the digests of the last `count` documents."""
    if not count:
      return []
    with self._naming_itself():
      end = len(self._digests)
      return [d.tobytes() for d in self._digests.read(end - count, end)]

  def sizes(self) -> np.ndarray:
    """Bytes of every document, int64."""
    with self._naming_itself():
      return np.diff(self._documents.read(0, len(self._documents)))


def total(stores: Sequence[Store], name: str) -> int:
  """The sum of one count of the summaries."""
  return sum(store.summary[name] for store in stores)
