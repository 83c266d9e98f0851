"""A packed corpus on disk: documents decoded once, rows found by number.

A store is a directory: `text.bin` holds the documents end to end,
`pieces.bin` every row's spans with the splitter's state at each (where it has
none, `levels.bin` holds the level of every byte), and small index files tell
where documents and rows begin. For a model that reads tokens, `tokens.bin`
holds the documents' tokens, made once, `token_documents.bin` where each begins,
and `token_bytes.bin` how many bytes every id is. Rows are read with positioned
reads rather than a memory map, so memory stays flat however long a run is,
and any thread or process may read any row.
"""

import hashlib
import json
import os
import pathlib
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from aunet_jax.data import packing

FORMAT = 2  # raise it when what the files hold, or the packing, changes


def _piece_dtype(state_size: int) -> np.dtype:
  return np.dtype(
    [
      ("document", "<i8"),
      ("start", "<i8"),
      ("stop", "<i8"),
      ("state", "<i4", (state_size,)),
    ]
  )


class StoreWriter:
  """Packs documents as they come and writes a store.

  Used as a context, which closes the files; call `finish` before it ends.
  """

  def __init__(
    self, directory: pathlib.Path, splitter, capacities, tokenizer=None
  ):
    """Args: tokenizer: None = rows of bytes."""
    directory.mkdir(parents=True)
    self._directory = directory
    self._splitter = splitter
    self._capacities = tuple(capacities)
    self._packer = packing.Packer(splitter, capacities)
    self._dtype = _piece_dtype(len(splitter.start))
    self._files = {
      name: open(directory / name, "wb")
      for name in (
        "text.bin",
        "documents.bin",
        "names.jsonl",
        "pieces.bin",
        "rows.bin",
      )
    }
    self._stores_levels = not packing.has_state(splitter)
    if self._stores_levels:
      self._files["levels.bin"] = open(directory / "levels.bin", "wb")
    self._tokenizer = tokenizer
    if tokenizer is not None:
      for name in ("tokens.bin", "token_documents.bin"):
        self._files[name] = open(directory / name, "wb")
      self._write_int("token_documents.bin", 0)
    self._content = hashlib.blake2b(digest_size=16)
    self.num_documents = self.num_bytes = self._num_tokens = 0
    self._num_rows = self._num_pieces = 0
    self._write_int("documents.bin", 0)
    self._write_int("rows.bin", 0)

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
    self._content.update(digest)
    levels = None
    if self._stores_levels:
      levels = self._splitter.levels(text)
      self._files["levels.bin"].write(levels.tobytes())
    units = text
    if self._tokenizer is not None:
      units = self._tokenizer.encode(text)
      self._files["tokens.bin"].write(units.tobytes())
      self._num_tokens += len(units)
      self._write_int("token_documents.bin", self._num_tokens)
    self._write_rows(self._packer.add(self.num_documents, units, levels))
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
        "num_tokens": self._num_tokens,
      }
      table = self._tokenizer.num_bytes.astype("<i4")
      (self._directory / "token_bytes.bin").write_bytes(table.tobytes())
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
    identity = hashlib.blake2b(self._content.digest(), digest_size=16)
    how = [FORMAT, self._splitter.hash, self._capacities]
    if self._tokenizer is not None:
      how.append(self._tokenizer.hash)
    identity.update(json.dumps(how).encode())
    summary = {
      "format": FORMAT,
      "fingerprint": identity.hexdigest(),
      "splitter_hash": self._splitter.hash,
      "capacities": self._capacities,
      "state_size": len(self._splitter.start),
      "num_rows": self._num_rows,
      "num_documents": self.num_documents,
      "num_bytes": self.num_bytes,
      "num_cuts": self._num_pieces - self.num_documents,
      "used": self._packer.used_S.tolist(),
      **extra,
    }
    path = self._directory / "summary.json"
    with open(path, "w") as file:
      json.dump(summary, file, indent=2)
      file.flush()
      os.fsync(file.fileno())


class Store:
  """Reads a finished store. Cheap to pickle: a worker opens it anew.

  Attributes:
    summary: counts of the whole: num_rows, num_documents, num_bytes, num_cuts,
      used (slots per stage), fingerprint, splitter_hash, capacities; of tokens
      also num_tokens, tokenizer_hash, bos, eos.
  """

  def __init__(self, directory: str | os.PathLike, splitter):
    self._directory = pathlib.Path(directory)
    self._splitter = splitter
    try:
      self._open_files()
    except (OSError, ValueError) as error:
      raise ValueError(
        f"the data index {self._directory} is damaged ({error}); delete that "
        f"directory to rebuild it."
      ) from error

  def _open_files(self) -> None:
    self.summary = json.loads((self._directory / "summary.json").read_text())
    self._text = self._open("text.bin")
    if not packing.has_state(self._splitter):
      self._levels = self._open("levels.bin")
    self._documents = self._map("documents.bin", "<i8")
    self._reads_tokens = "tokenizer_hash" in self.summary
    if self._reads_tokens:
      self._tokens = self._open("tokens.bin")
      self._token_dtype = np.dtype(self.summary["token_dtype"])
      self._token_documents = self._map("token_documents.bin", "<i8")
      self._token_bytes = self._map("token_bytes.bin", "<i4")
      found = os.fstat(self._tokens).st_size // self._token_dtype.itemsize
      if found != self.summary["num_tokens"]:
        raise ValueError(
          f"it holds {found} tokens, not {self.summary['num_tokens']}"
        )
    self._rows = self._map("rows.bin", "<i8")
    self._pieces = self._map(
      "pieces.bin", _piece_dtype(self.summary["state_size"])
    )
    for name, found, expected in (
      ("bytes", os.fstat(self._text).st_size, self.summary["num_bytes"]),
      ("documents", len(self._documents) - 1, self.summary["num_documents"]),
      ("rows", len(self._rows) - 1, self.summary["num_rows"]),
      ("pieces", len(self._pieces), int(self._rows[-1])),
    ):
      if found != expected:
        raise ValueError(f"it holds {found} {name}, not {expected}")

  def __reduce__(self):
    return Store, (self._directory, self._splitter)

  def _open(self, name: str) -> int:
    descriptor = os.open(self._directory / name, os.O_RDONLY)
    weakref.finalize(self, os.close, descriptor)
    return descriptor

  def _map(self, name: str, dtype) -> np.ndarray:
    # As a plain array, whose elements are much cheaper to take.
    return np.memmap(self._directory / name, dtype, mode="r").view(np.ndarray)

  @property
  def num_rows(self) -> int:
    return self.summary["num_rows"]

  def _read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Bytes [start, stop) of a document, less what lies past its end."""
    begin = int(self._documents[document])
    end = int(self._documents[document + 1])
    wanted = min(begin + stop, end) - begin - start
    text = os.pread(self._text, wanted, begin + start)
    return np.frombuffer(text, np.uint8)

  def _read_tokens(self, document: int, start: int, stop: int) -> np.ndarray:
    """As `_read`, of tokens."""
    begin = int(self._token_documents[document])
    end = int(self._token_documents[document + 1])
    wanted = min(begin + stop, end) - begin - start
    size = self._token_dtype.itemsize
    raw = os.pread(self._tokens, wanted * size, (begin + start) * size)
    return np.frombuffer(raw, self._token_dtype)

  def _read_levels(self, document: int, start: int, stop: int) -> np.ndarray:
    begin = int(self._documents[document]) + start
    return np.frombuffer(os.pread(self._levels, stop - start, begin), np.int8)

  def pieces(self, index: int) -> list[packing.Piece]:
    first, last = int(self._rows[index]), int(self._rows[index + 1])
    return [
      packing.Piece(int(p[0]), int(p[1]), int(p[2]), np.array(p[3]))
      for p in self._pieces[first:last]
    ]

  def row(self, index: int) -> dict[str, np.ndarray]:
    """The arrays of a row, 0 <= index < num_rows; see `packing.fill_row`."""
    length, pieces = self.summary["capacities"][0], self.pieces(index)
    if not self._reads_tokens:
      return packing.fill_row(
        pieces, self._read, self._read_levels, self._splitter, length
      )
    row = packing.fill_row(
      pieces,
      self._read_tokens,
      self._read_levels,
      self._splitter,
      length,
      self.summary["bos"],
      self.summary["eos"],
    )
    sizes = self._token_bytes[row["targets"]]
    row["target_bytes"] = np.where(row["documents"] > 0, sizes, 0)
    return row

  def documents(self) -> Iterator[tuple[str, bytes]]:
    """(name, text) of every document, in the order of the sources."""
    with open(self._directory / "names.jsonl", "rb") as names:
      for number, name in enumerate(names):
        size = int(self._documents[number + 1] - self._documents[number])
        text = self._read(number, 0, size)
        yield json.loads(name), text.tobytes()


def total(stores: Sequence[Store], name: str) -> int:
  """The sum of one count of the summaries."""
  return sum(store.summary[name] for store in stores)
