"""Sources of a config -> packed corpora, built once and cached.

The cache holds a directory for every index: the stores `train` and `heldout`,
and `index.json`, which says what it was made of. An index is built under a lock
and put in place by one rename, so a build that dies leaves nothing that is ever
used, and processes that share the directory build once. A run that goes on
asks for its index by fingerprint and never looks at the sources again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aunet_jax import config
from aunet_jax.data import packing, reading, sources, store
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.files import locked
from aunet_jax.splitting.splitter import Splitter

_MOST_COMBINATIONS = 100_000  # of indexes that are tried for a mixture


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
    return _fingerprint(parts, self.weights)

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


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What an index depends on, beside what its sources hold."""

  paths: str | tuple[str, ...]
  splitter: Splitter
  capacities: tuple[int, ...]
  tokenizer: Tokenizer | None = None
  text_field: str = "text"
  separator: str | None = None
  heldout_fraction: float = 0.0
  max_skip_fraction: float = 0.01
  keep_documents: bool = False  # see `packing.Packer`; held-out text always is
  purpose: str = "to train on"  # for messages

  @functools.cached_property
  def key(self) -> str:
    """Hash of every field that the index depends on."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    del fields["purpose"]
    fields["format"] = store.FORMAT
    fields["paths"] = [_absolute(path) for path in self.items]
    fields["splitter"] = self.splitter.hash
    fields["tokenizer"] = self.tokenizer and self.tokenizer.hash
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  @property
  def items(self) -> list[str]:
    """The paths one by one."""
    if isinstance(self.paths, str):
      return self.paths.split(",")
    return list(self.paths)


def _absolute(path: str) -> str:
  elsewhere = sources.is_url(path) or path.startswith("hf:")
  return path if elsewhere or path == "python" else os.path.abspath(path)


def _listing(files: Sequence[sources.Source], dates: bool) -> str:
  """Hash of the names and sizes of files, and of their dates."""
  digest = hashlib.blake2b(digest_size=8)
  for file in files:
    fields = file if dates else dataclasses.replace(file, modified="")
    digest.update(json.dumps(fields.identity(), sort_keys=True).encode())
  return digest.hexdigest()


def _sync_directory(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _build(
  directory: pathlib.Path,
  recipe: Recipe,
  files: Sequence[sources.Source],
  skips: Sequence[sources.Skip],
  log,
) -> None:
  """Writes an index: `train` and, where documents fall to it, `heldout`."""
  with contextlib.ExitStack() as stack:
    tally = stack.enter_context(
      reading.Tally(directory / "skipped.jsonl", recipe.max_skip_fraction, log)
    )

    def writer(name, keep_documents):
      return stack.enter_context(
        store.StoreWriter(
          directory / name,
          recipe.splitter,
          recipe.capacities,
          recipe.tokenizer,
          keep_documents,
        )
      )

    train = writer("train", recipe.keep_documents)
    heldout = writer("heldout", True)
    for record in reading.read_all(
      files, skips, recipe.text_field, tally, log, recipe.separator
    ):
      digest = reading.document_digest(record.text)
      held = reading.is_heldout(digest, recipe.heldout_fraction)
      (heldout if held else train).add(record.name, record.text, digest)
    if not train.num_documents:
      raise ValueError(_nothing(recipe, tally, heldout.num_documents))
    train.finish()
    heldout.finish()
  if not heldout.num_documents:
    shutil.rmtree(directory / "heldout")
  store.write_json(
    directory / "index.json",
    {
      "format": store.FORMAT,
      "made_of": recipe.items,
      "listing": _listing(files, dates=True),
      "listing_without_dates": _listing(files, dates=False),
      "skipped": dict(tally.counts),
    },
  )


def _nothing(recipe: Recipe, tally: reading.Tally, num_heldout: int) -> str:
  """The message for sources without a document."""
  found = (
    f"no documents {recipe.purpose} in {','.join(recipe.items)}: "
    f"{tally.num_good} found, {num_heldout} of them held out, skipped: "
    f"{_reasons(tally.counts) or 'none'}. Give more data"
  )
  if num_heldout:
    found += ", or data.heldout_fraction=0"
  return found + "."


def _read_index(directory: pathlib.Path) -> dict:
  """What index.json of an index says; of format 2, what can be known."""
  try:
    if (directory / "index.json").exists():
      return store.read_json(directory / "index.json")
    counts = json.loads((directory / "skipped_counts.json").read_text())
    return {"skipped": counts}
  except (OSError, ValueError) as error:
    raise store.damaged(directory, error) from error


class _Index(NamedTuple):
  """An index of the cache, opened."""

  train: store.Store
  heldout: store.Store | None
  skipped: Counter


def _open(directory: pathlib.Path, splitter: Splitter) -> _Index:
  """Raises: store.DamagedError."""
  heldout = directory / "heldout"
  return _Index(
    store.Store(directory / "train", splitter),
    store.Store(heldout, splitter) if heldout.exists() else None,
    Counter(_read_index(directory)["skipped"]),
  )


def _built(recipe: Recipe, cache_dir: pathlib.Path) -> list[pathlib.Path]:
  """Indexes of a recipe, the newest last."""
  found = cache_dir.glob(f"{recipe.key}-*/")
  return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def _same_text(
  index: pathlib.Path,
  recipe: Recipe,
  files: Sequence[sources.Source],
  skips: Sequence[sources.Skip],
  log,
) -> bool:
  """Whether files hold what an index was made of; reads them."""
  found = {"train": hashlib.blake2b(digest_size=16)}
  found["heldout"] = found["train"].copy()
  with reading.Tally(os.devnull, recipe.max_skip_fraction, log) as tally:
    for record in reading.read_all(
      files, skips, recipe.text_field, tally, log, recipe.separator
    ):
      digest = reading.document_digest(record.text)
      held = reading.is_heldout(digest, recipe.heldout_fraction)
      found["heldout" if held else "train"].update(digest)
  opened = _open(index, recipe.splitter)
  parts = {"train": opened.train, "heldout": opened.heldout}
  return all(
    part is None or part.summary["content"] == found[name].hexdigest()
    for name, part in parts.items()
  )


def _is_listed(recipe: Recipe, index: pathlib.Path) -> bool:
  """Whether sources have the names, sizes and dates of those of an index."""
  try:
    files, _ = sources.list_sources(recipe.paths)
  except (ValueError, OSError):
    return False
  known = _read_index(index).get("listing")  # of format 2, not known
  return known is None or known == _listing(files, dates=True)


def _index_of(recipe: Recipe, cache_dir: pathlib.Path, log) -> pathlib.Path:
  """The index of some sources as they are now; builds it where there is none.

  Where the sources are gone, the newest one that was made of them.
  """
  name = ",".join(recipe.items)
  try:
    files, skips = sources.list_sources(recipe.paths)
  except (ValueError, OSError) as error:
    built = _built(recipe, cache_dir)
    if not built:
      raise
    log(f"{name} cannot be read ({error}); using its index {built[-1]}")
    return built[-1]
  listing = _listing(files, dates=True)

  def find(key, value):
    for directory in _built(recipe, cache_dir):
      if _read_index(directory)[key] == value:
        return directory
    return None

  if found := find("listing", listing):
    return found
  cache_dir.mkdir(parents=True, exist_ok=True)
  lock = cache_dir / f"{recipe.key}.lock"
  with locked(lock, lambda: log(f"waiting for the process that builds {name}")):
    if found := find("listing", listing):
      return found
    undated = _listing(files, dates=False)
    if found := find("listing_without_dates", undated):
      log(f"dates of {name} have changed; comparing its text with the index")
      if _same_text(found, recipe, files, skips, log):
        said = _read_index(found) | {"listing": listing}
        store.write_json(found / "index.json", said)
        return found
    return _build_in_place(recipe, files, skips, listing, cache_dir, log)


def _build_in_place(
  recipe: Recipe, files, skips, listing: str, cache_dir: pathlib.Path, log
) -> pathlib.Path:
  final = cache_dir / f"{recipe.key}-{listing}"
  if final.exists():  # made of other text with the same names, sizes and dates
    final = cache_dir / f"{recipe.key}-{listing}-{time.time_ns():x}"
  partial = cache_dir / f"{recipe.key}.partial"
  shutil.rmtree(partial, ignore_errors=True)  # of a build that died
  size = sum(file.size for file in files)
  log(f"indexing {len(files):,} files, {size / 1e6:,.1f} MB, once")
  start = time.monotonic()
  partial.mkdir()
  try:
    _build(partial, recipe, files, skips, log)
    _sync_directory(partial)
    partial.rename(final)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  _sync_directory(cache_dir)
  log(f"indexed in {time.monotonic() - start:.1f} s: {final}")
  return final


# ----- opening --------------------------------------------------------------


def _fingerprint(
  parts: Sequence[str], weights: tuple[float, ...] | None
) -> str:
  text = json.dumps([list(parts), weights])
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _indexes_with(
  fingerprint: str,
  recipes: Sequence[Recipe],
  weights: tuple[float, ...] | None,
  cache_dir: pathlib.Path,
) -> list[pathlib.Path] | None:
  """The indexes, one a recipe, that make the corpus a run has begun with.

  Those of older formats count, too: their rows are what the run goes on with.
  """
  found = {}  # directory -> fingerprint
  for path in sorted(cache_dir.glob("*/train/summary.json")):
    with contextlib.suppress(ValueError, OSError):
      found[path.parents[1]] = store.read_json(path).get("fingerprint")

  def choices(recipe):
    own = [path for path in found if path.name.startswith(recipe.key + "-")]
    return own or [path for path in found if "-" not in path.name]

  combinations = itertools.product(*map(choices, recipes))
  for paths in itertools.islice(combinations, _MOST_COMBINATIONS):
    if _fingerprint([found[path] for path in paths], weights) == fingerprint:
      return list(paths)
  return None


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
  splitter: Splitter,
  capacities: Sequence[int],
  cache_dir: str | os.PathLike,
  log=print,
  begun_with: str | None = None,
  begun_with_heldout: str | None = None,
) -> tuple[Corpus, Corpus | None]:
  """The training and the held-out corpus of a config.

  The first call decodes and packs; later ones, and other processes that share
  `cache_dir`, open what it left. Processes that do not share it build the
  same rows each for itself: compare `fingerprint`.

  Args:
    splitter: gives levels; see `packing`.
    capacities: positions of every stage in a row.
    log: function of one line of text.
    begun_with, begun_with_heldout: fingerprints of the corpora of a run that
      goes on: where the cache has them, they are opened whatever became of the
      sources.
  Returns: held-out is None where `cfg.heldout` is None and no document falls
    to it.
  Raises: ValueError for sources that match no file, hold no document, or hold
    more bad records than `cfg.max_skip_fraction`.
  """
  packing.check_capacities(capacities, splitter)
  groups, weights = _mixture(cfg.train)
  cache_dir = pathlib.Path(cache_dir)
  recipe = Recipe(
    paths=(),
    splitter=splitter,
    capacities=tuple(capacities),
    tokenizer=None if cfg.tokenizer is None else Tokenizer(cfg.tokenizer),
    text_field=cfg.text_field,
    separator=cfg.separator,
    max_skip_fraction=cfg.max_skip_fraction,
    heldout_fraction=cfg.heldout_fraction if cfg.heldout is None else 0.0,
  )

  def find(recipes, weights, fingerprint):
    paths = fingerprint and _indexes_with(
      fingerprint, recipes, weights, cache_dir
    )
    if paths:
      for recipe, path in zip(recipes, paths, strict=True):
        if not _is_listed(recipe, path):
          log(
            f"{','.join(recipe.items)} has changed or is gone; the run goes on "
            f"with the index it began with, {path}"
          )
    else:
      paths = [_index_of(recipe, cache_dir, log) for recipe in recipes]
    return [_open(path, splitter) for path in paths]

  recipes = [dataclasses.replace(recipe, paths=_frozen(g)) for g in groups]
  built = find(recipes, weights, begun_with)
  skipped = sum((index.skipped for index in built), Counter())
  stores = tuple(index.train for index in built)
  train = Corpus(stores, weights, dict(skipped))
  _report("train", train, log)
  if cfg.heldout is None:
    parts = tuple(i.heldout for i in built if i.heldout is not None)
    if not parts:
      if cfg.heldout_fraction:
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
    recipe = dataclasses.replace(
      recipe,
      paths=_frozen(cfg.heldout),
      keep_documents=True,
      purpose="to hold out (data.heldout)",
    )
    (index,) = find([recipe], None, begun_with_heldout)
    heldout = Corpus((index.train,), None, dict(index.skipped))
    _report_overlap(train, heldout, cache_dir, log)
  _report("held out", heldout, log)
  return train, heldout


def open_text(
  paths: str | list[str],
  splitter: Splitter,
  capacities: Sequence[int],
  cache_dir: str | os.PathLike,
  text_field: str = "text",
  tokenizer: Tokenizer | None = None,
  log=print,
) -> Corpus:
  """Text to evaluate: every document that fits a row is in one piece.

  Raises: as `open_corpora`.
  """
  packing.check_capacities(capacities, splitter)
  recipe = Recipe(
    paths=_frozen(paths),
    splitter=splitter,
    capacities=tuple(capacities),
    tokenizer=tokenizer,
    text_field=text_field,
    keep_documents=True,
    purpose="to evaluate",
  )
  index = _open(_index_of(recipe, pathlib.Path(cache_dir), log), splitter)
  corpus = Corpus((index.train,), None, dict(index.skipped))
  _report("text", corpus, log)
  return corpus


def _frozen(paths: str | Sequence[str]) -> str | tuple[str, ...]:
  return paths if isinstance(paths, str) else tuple(paths)


def _report_overlap(
  train: Corpus, heldout: Corpus, cache_dir: pathlib.Path, log
) -> None:
  """Says how much held-out text is training text, too."""
  if not all("content" in s.summary for s in (*train.stores, *heldout.stores)):
    return  # an older format, which kept no digests
  known = cache_dir / f"{train.fingerprint}-{heldout.fingerprint}.overlap"
  try:  # kept, since a large corpus has hundreds of millions of digests
    found = store.read_json(known)
  except (OSError, ValueError):
    found = _overlap(train, heldout)
    store.write_json(known, found)
  if found["documents"]:
    log(
      f"warning: {found['documents']:,} of {heldout.num_documents:,} held-out "
      f"documents ({found['bytes'] / heldout.num_bytes:.1%} of their bytes) "
      f"are training text, too: held-out bits per byte will be too low."
    )


def _overlap(train: Corpus, heldout: Corpus) -> dict[str, int]:
  """Held-out documents that are training text, and their bytes."""
  parts = [block for part in heldout.stores for block in part.digests()]
  digests = np.concatenate(parts)
  sizes = np.concatenate([part.sizes() for part in heldout.stores])
  seen = np.zeros(len(digests), np.bool_)
  for part in train.stores:
    for block in part.digests():
      seen |= np.isin(digests, block)
  return {"documents": int(seen.sum()), "bytes": int(sizes[seen].sum())}
