"""Stores of the parts of an index, read as one.

A large index is built in parts, see `parts`, each a store. Their `summary.json`
has the sums, and which stores there are; a store is opened when a row of it is
first asked for.
"""

import bisect
import hashlib
import itertools
import json
import pathlib
import resource
from collections.abc import Iterator, Sequence

import numpy as np

from aunet_jax.data import blocks, store

_SUMS = ("num_rows", "num_pieces", "num_documents", "num_bytes", "num_cuts")
_SAME = (
  "format", "splitter_hash", "capacities", "keep_documents", "state_size",
  "tokenizer_hash", "bos", "eos", "token_dtype", "marks",
)  # fmt: skip
_FILES_OF_STORE = 9  # that it may have open


def _hash(parts: Sequence[str]) -> str:
  text = json.dumps(["joined", *parts])
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def join(directory: pathlib.Path, names: Sequence[str]) -> None:
  """Writes the summary of the stores `names` of a directory, in that order."""
  summaries = [
    store.read_json(directory / name / "summary.json") for name in names
  ]
  first = summaries[0]
  sums = [*_SUMS, *(["num_tokens"] if "num_tokens" in first else [])]
  parts = [
    {"name": name, "num_rows": s["num_rows"], "fingerprint": s["fingerprint"]}
    for name, s in zip(names, summaries, strict=True)
  ]
  summary = {
    **{name: first[name] for name in _SAME if name in first},
    **{name: sum(s[name] for s in summaries) for name in sums},
    "used": np.sum([s["used"] for s in summaries], axis=0).tolist(),
    "fingerprint": _hash([s["fingerprint"] for s in summaries]),
    "content": _hash([s["content"] for s in summaries]),
    "parts": parts,
  }
  store.write_json(directory / "summary.json", summary)


def open_store(directory: pathlib.Path, splitter) -> "store.Store | Joined":
  """A store, of one part or of many. Raises: DamagedError."""
  try:
    summary = store.read_json(directory / "summary.json")
  except (OSError, ValueError) as error:
    raise store.damaged(directory.parent, error) from error
  if "parts" not in summary:
    return store.Store(directory, splitter)
  return Joined(directory, splitter)


def _allow_files(count: int) -> None:
  """Lets this process open `count` files more, as far as the system does."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY:
    wanted = soft + count
    if hard != resource.RLIM_INFINITY:
      wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Joined:
  """Reads many stores as one; has what `store.Store` has."""

  def __init__(self, directory: pathlib.Path, splitter):
    """Raises: DamagedError."""
    self._directory = pathlib.Path(directory)
    self._splitter = splitter
    self._opened: dict[int, store.Store] = {}
    try:
      self.summary = store.read_json(self._directory / "summary.json")
      self._parts = self.summary["parts"]
      rows = [part["num_rows"] for part in self._parts]
      if sum(rows) != self.summary["num_rows"]:
        raise store.DamagedError(f"its parts hold {sum(rows)} rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise store.damaged(self._directory.parent, error) from error
    self._ends = list(itertools.accumulate(rows))
    _allow_files(_FILES_OF_STORE * len(rows))

  def __reduce__(self):
    return Joined, (self._directory, self._splitter)

  @property
  def num_rows(self) -> int:
    return self.summary["num_rows"]

  def _part(self, number: int) -> store.Store:
    if number not in self._opened:  # two threads may open it; one stays
      part, index = self._parts[number], self._directory.parent
      path = self._directory / part["name"]
      opened = store.Store(path, self._splitter, index)
      if opened.summary["fingerprint"] != part["fingerprint"]:
        error = blocks.DamagedError(f"{path} is of another index")
        raise store.damaged(index, error)
      self._opened.setdefault(number, opened)
    return self._opened[number]

  def _find(self, index: int) -> tuple[store.Store, int]:
    number = bisect.bisect_right(self._ends, index)
    first = self._ends[number - 1] if number else 0
    return self._part(number), index - first

  def pieces(self, index: int):
    """See `Store.pieces`; documents are numbered within a part."""
    part, row = self._find(index)
    return part.pieces(row)

  def row(self, index: int) -> dict[str, np.ndarray]:
    """See `Store.row`."""
    part, row = self._find(index)
    return part.row(row)

  def _all(self) -> Iterator[store.Store]:
    return map(self._part, range(len(self._parts)))

  def documents(self) -> Iterator[tuple[str, bytes]]:
    """See `Store.documents`."""
    for part in self._all():
      yield from part.documents()

  def digests(self) -> Iterator[np.ndarray]:
    """See `Store.digests`."""
    for part in self._all():
      yield from part.digests()

  def sizes(self) -> np.ndarray:
    """See `Store.sizes`."""
    return np.concatenate([part.sizes() for part in self._all()])
