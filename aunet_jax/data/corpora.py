"""Sources of a config -> packed corpora, built once and cached.

The cache is keyed by files, splitting rules, tokenizer and capacities, built
under a lock and put in place by one rename, so a build that dies leaves nothing
that is ever used, and processes that share the directory build once.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from aunet_jax import config
from aunet_jax.data import packing, reading, sources, store
from aunet_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Packed documents; rows by number.

  With `weights`, one per store and summing to 1, rows are drawn so that each
  store gives that share of the bytes.
  """

  stores: tuple[store.Store, ...]
  weights: tuple[float, ...] | None
  skipped: dict[str, int]  # records that gave no document, by reason

  @property
  def num_rows(self) -> int:
    return store.total(self.stores, "num_rows")

  @property
  def num_documents(self) -> int:
    return store.total(self.stores, "num_documents")

  @property
  def num_bytes(self) -> int:
    """Text bytes, BOS and EOS not counted."""
    return store.total(self.stores, "num_bytes")

  @property
  def bytes_per_unit(self) -> float:
    """Text bytes of a token; 1 where rows are of bytes."""
    if "num_tokens" not in self.stores[0].summary:
      return 1.0
    return self.num_bytes / store.total(self.stores, "num_tokens")

  @property
  def num_cuts(self) -> int:
    """Times a document goes on in another row."""
    return store.total(self.stores, "num_cuts")

  @property
  def capacities(self) -> tuple[int, ...]:
    return tuple(self.stores[0].summary["capacities"])

  @property
  def fill(self) -> tuple[float, ...]:
    """Share of the slots of all rows that are real, per stage."""
    used = np.sum([s.summary["used"] for s in self.stores], axis=0)
    slots = self.num_rows * np.array(self.capacities)
    return tuple((used / slots).tolist())

  @property
  def splitter_hash(self) -> str:
    return self.stores[0].summary["splitter_hash"]

  @property
  def fingerprint(self) -> str:
    """Hash of every document, the rules, the capacities and the weights."""
    parts = [s.summary["fingerprint"] for s in self.stores]
    text = json.dumps([parts, self.weights])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

  def row(self, index: int) -> dict[str, np.ndarray]:
    """int32 arrays (L,) of row `index`; see `packing.widen`."""
    return packing.widen(self.narrow_row(index))

  def narrow_row(self, index: int) -> dict[str, np.ndarray]:
    """Row `index` in small types; see `packing.fill_row`."""
    part, index = self._find(index)
    return part.row(index)

  def _find(self, index: int) -> tuple[store.Store, int]:
    if not 0 <= index < self.num_rows:
      raise IndexError(f"row {index} of {self.num_rows}")
    for part in self.stores:
      if index < part.num_rows:
        return part, index
      index -= part.num_rows
    raise AssertionError("the stores hold fewer rows than they say")

  def documents(self) -> Iterator[tuple[str, bytes]]:
    """(name, text) of every document, in the order of the sources."""
    for part in self.stores:
      yield from part.documents()


# ----- building -------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: pathlib.Path, log):
  """Holds a file lock, which ends with the process, however that ends."""
  with open(path, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f"waiting for the process that builds {path.with_suffix('')}")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _sync_directory(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _build(
  directory: pathlib.Path,
  files: Sequence[sources.Source],
  skips: Sequence[sources.Skip],
  cfg: config.DataConfig,
  heldout_fraction: float,
  splitter,
  capacities: Sequence[int],
  tokenizer: Tokenizer | None,
  log,
) -> None:
  """Writes the stores `train` and, where documents fall to it, `heldout`."""
  with contextlib.ExitStack() as stack:
    tally = stack.enter_context(
      reading.Tally(directory / "skipped.jsonl", cfg.max_skip_fraction, log)
    )
    writers = {
      name: stack.enter_context(
        store.StoreWriter(directory / name, splitter, capacities, tokenizer)
      )
      for name in ("train", "heldout")
    }
    for record in reading.read_all(
      files, skips, cfg.text_field, tally, log, cfg.separator
    ):
      digest = reading.document_digest(record.text)
      held = reading.is_heldout(digest, heldout_fraction)
      writer = writers["heldout" if held else "train"]
      writer.add(record.name, record.text, digest)
    if not writers["train"].num_documents:
      raise ValueError(
        f"no documents to train on: {tally.num_good} found, "
        f"{writers['heldout'].num_documents} of them held out, skipped: "
        f"{_reasons(tally.counts) or 'none'}. Give more data, or "
        f"data.heldout_fraction=0."
      )
    for writer in writers.values():
      writer.finish()
  if not writers["heldout"].num_documents:
    shutil.rmtree(directory / "heldout")
  (directory / "skipped_counts.json").write_text(json.dumps(tally.counts))


def _open_stores(
  paths: str | list[str],
  cfg: config.DataConfig,
  heldout_fraction: float,
  splitter,
  capacities: Sequence[int],
  tokenizer: Tokenizer | None,
  cache_dir: pathlib.Path,
  log,
) -> tuple[store.Store, store.Store | None, Counter]:
  """Builds the stores of some sources, or opens those built before."""
  files, skips = sources.list_sources(paths)
  identity = [
    store.FORMAT,
    [file.identity() for file in files],
    splitter.hash,
    list(capacities),
    cfg.text_field,
    heldout_fraction,
    cfg.max_skip_fraction,
  ]
  if tokenizer is not None:
    identity.append(tokenizer.hash)
  if cfg.separator is not None:
    identity.append(["separator", cfg.separator])
  key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8)
  final = cache_dir / key.hexdigest()
  cache_dir.mkdir(parents=True, exist_ok=True)
  if not final.exists():
    with _locked(final.with_suffix(".lock"), log):
      if not final.exists():
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a build that died
        size = sum(file.size for file in files)
        log(f"indexing {len(files):,} files, {size / 1e6:,.1f} MB, once")
        start = time.monotonic()
        partial.mkdir()
        try:
          _build(
            partial, files, skips, cfg, heldout_fraction, splitter, capacities,
            tokenizer, log,
          )  # fmt: skip
        except BaseException:
          shutil.rmtree(partial, ignore_errors=True)
          raise
        _sync_directory(partial)
        partial.rename(final)
        _sync_directory(cache_dir)
        log(f"indexed in {time.monotonic() - start:.1f} s: {final}")
  counts = json.loads((final / "skipped_counts.json").read_text())
  heldout = final / "heldout"
  return (
    store.Store(final / "train", splitter),
    store.Store(heldout, splitter) if heldout.exists() else None,
    Counter(counts),
  )


def _mixture(train) -> tuple[list[list[str] | str], tuple[float, ...] | None]:
  """The groups of paths that `data.train` names, and their weights."""
  items = [train] if isinstance(train, str) else list(train)
  weighted = [not isinstance(item, str) for item in items]
  if not any(weighted):
    return [train if isinstance(train, str) else items], None
  for item in items:
    if isinstance(item, str) or set(item) != {"path", "weight"}:
      raise ValueError(
        f"data.train item {item!r} must be of the form "
        '{"path": ..., "weight": ...}, since others of the list have weights.'
      )
    if not item["weight"] > 0 or math.isinf(item["weight"]):
      raise ValueError(
        f"weight={item['weight']} of {item['path']} must be > 0 and finite."
      )
  total = sum(item["weight"] for item in items)
  return (
    [item["path"] for item in items],
    tuple(item["weight"] / total for item in items),
  )


def _reasons(counts: dict[str, int]) -> str:
  """As "2 empty, 1 not UTF-8"."""
  return ", ".join(f"{number:,} {why}" for why, number in counts.items())


def _report(name: str, corpus: Corpus, log) -> None:
  fill = ", ".join(f"{share:.1%}" for share in corpus.fill)
  log(
    f"{name}: {corpus.num_documents:,} documents, {corpus.num_bytes:,} bytes "
    f"in {corpus.num_rows:,} rows; slots filled per stage: {fill}; "
    f"documents continued in another row: {corpus.num_cuts:,}"
    + (
      f"; {corpus.bytes_per_unit:.3f} bytes a token"
      if "num_tokens" in corpus.stores[0].summary
      else ""
    )
    + (f"; skipped: {_reasons(corpus.skipped)}" if corpus.skipped else "")
  )


def open_corpora(
  cfg: config.DataConfig,
  splitter,
  capacities: Sequence[int],
  cache_dir: str | os.PathLike,
  log=print,
) -> tuple[Corpus, Corpus | None]:
  """The training and the held-out corpus of a config.

  The first call decodes and packs; later ones, and other processes that share
  `cache_dir`, open what it left. Processes that do not share it build the
  same rows each for itself: compare `fingerprint`.

  Args:
    splitter: gives levels; see `packing`.
    capacities: positions of every stage in a row.
    log: function of one line of text.
  Returns: held-out is None where `cfg.heldout` is None and no document falls
    to it.
  Raises: ValueError for sources that match no file, hold no document, or hold
    more bad records than `cfg.max_skip_fraction`.
  """
  packing.check_capacities(capacities, splitter)
  tokenizer = None if cfg.tokenizer is None else Tokenizer(cfg.tokenizer)
  groups, weights = _mixture(cfg.train)
  fraction = cfg.heldout_fraction if cfg.heldout is None else 0.0
  cache_dir = pathlib.Path(cache_dir)

  def build(paths, fraction):
    return _open_stores(
      paths, cfg, fraction, splitter, capacities, tokenizer, cache_dir, log
    )

  built = [build(paths, fraction) for paths in groups]
  skipped = sum((counts for _, _, counts in built), Counter())
  train = Corpus(tuple(part for part, _, _ in built), weights, dict(skipped))
  _report("train", train, log)
  if cfg.heldout is None:
    parts = tuple(part for _, part, _ in built if part is not None)
    if not parts:
      log("no document is held out; name some with data.heldout.")
      return train, None
    heldout = Corpus(parts, None, {})
  else:
    if not isinstance(cfg.heldout, str) and not all(
      isinstance(item, str) for item in cfg.heldout
    ):
      raise ValueError(
        f"data.heldout={cfg.heldout!r} must be a path or a list of paths; "
        "weights are for data.train."
      )
    part, _, counts = build(cfg.heldout, 0.0)
    heldout = Corpus((part,), None, dict(counts))
  _report("held out", heldout, log)
  return train, heldout
