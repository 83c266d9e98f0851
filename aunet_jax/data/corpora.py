"""Sources of a config -> packed corpora: rows by number.

What the sources hold is packed once into an index of the cache; see `indexes`.
"""

import dataclasses
import math
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aunet_jax import config, files
from aunet_jax.data import (
  building,
  conversations,
  indexes,
  joined,
  near_copies,
  packing,
  store,
)
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.splitting.splitter import Splitter


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Packed documents; rows by number.

  With `weights`, one per store and summing to 1, rows are drawn so that each
  store gives that share of the bytes.
  """

  stores: tuple[store.Store | joined.Joined, ...]
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
    return indexes.fingerprint_of(parts, self.weights)

  def row(self, index: int) -> dict[str, np.ndarray]:
    """int32 arrays (L,) of row `index`; see `packing.widen`."""
    return packing.widen(self.narrow_row(index))

  def narrow_row(self, index: int) -> dict[str, np.ndarray]:
    """Row `index` in small types; see `packing.fill_row`."""
    part, index = self._find(index)
    return part.row(index)

  def _find(self, index: int) -> tuple[store.Store | joined.Joined, int]:
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


# ----- opening --------------------------------------------------------------


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
    + (
      f"; skipped: {building.reasons(corpus.skipped)}" if corpus.skipped else ""
    )
  )


def _report_cuts(built: Sequence[indexes.Index], log) -> None:
  cut = sum((index.cut for index in built), Counter())
  if cut:
    log(
      f"longer than a row: {cut['documents']:,} records lost "
      f"{cut['bytes']:,} bytes on the left of their prompts"
    )


class Recipes(NamedTuple):
  train: list[indexes.Recipe]
  weights: tuple[float, ...] | None
  heldout: indexes.Recipe | None  # None = a share of what trains


def recipes_of(
  cfg: config.DataConfig, splitter: Splitter, capacities: Sequence[int]
) -> Recipes:
  packing.check_capacities(capacities, splitter)
  groups, weights = _mixture(cfg.train)
  tokenizer = None if cfg.tokenizer is None else Tokenizer(cfg.tokenizer)
  recipe = indexes.Recipe(
    paths=(),
    splitter=splitter,
    capacities=tuple(capacities),
    tokenizer=tokenizer,
    text_field=cfg.text_field,
    separator=cfg.separator,
    max_skip_fraction=cfg.max_skip_fraction,
    heldout_fraction=cfg.heldout_fraction if cfg.heldout is None else 0.0,
    turns=conversations.make_reader(cfg, splitter, capacities, tokenizer),
    keep_documents=cfg.format != "text",  # what is learned is told by a whole
  )
  train = [dataclasses.replace(recipe, paths=_frozen(g)) for g in groups]
  if cfg.heldout is None:
    return Recipes(train, weights, None)
  if not isinstance(cfg.heldout, str) and not all(
    isinstance(item, str) for item in cfg.heldout
  ):
    raise ValueError(
      f"data.heldout={cfg.heldout!r} must be a path or a list of paths; "
      "weights are for data.train."
    )
  heldout = dataclasses.replace(
    recipe,
    paths=_frozen(cfg.heldout),
    keep_documents=True,
    purpose="to hold out (data.heldout)",
  )
  return Recipes(train, weights, heldout)


def build_indexes(
  cfg: config.DataConfig,
  splitter: Splitter,
  capacities: Sequence[int],
  cache_dir: str | os.PathLike,
  how: building.How,
  log=print,
) -> bool:
  """Builds the indexes of a config that the cache lacks.

  Returns: whether all are there; see `building.How.share`.
  Raises: as `open_corpora`.
  """
  recipes = recipes_of(cfg, splitter, capacities)
  cache = files.local(cache_dir, "data.cache_dir")
  every = [*recipes.train, *filter(None, [recipes.heldout])]
  found = [indexes.find_or_build(one, cache, log, how) for one in every]
  return None not in found


def open_corpora(
  cfg: config.DataConfig,
  splitter: Splitter,
  capacities: Sequence[int],
  cache_dir: str | os.PathLike,
  log=print,
  begun_with: str | None = None,
  begun_with_heldout: str | None = None,
  how: building.How = building.ALONE,
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
    how: who builds what the cache lacks; alone of its share.
  Returns: held-out is None where `cfg.heldout` is None and no document falls
    to it.
  Raises: ValueError for sources that match no file, hold no document, or hold
    more bad records than `cfg.max_skip_fraction`.
  """
  recipes = recipes_of(cfg, splitter, capacities)
  weights = recipes.weights
  cache_dir = files.local(cache_dir, "data.cache_dir")

  def find(recipes, weights, fingerprint):
    paths = fingerprint and indexes.begun_with(
      fingerprint, recipes, weights, cache_dir
    )
    if paths:
      for recipe, path in zip(recipes, paths, strict=True):
        if not indexes.is_listed(recipe, path):
          log(
            f"{','.join(recipe.items)} has changed or is gone; the run goes on "
            f"with the index it began with, {path}"
          )
    else:
      paths = [
        indexes.find_or_build(recipe, cache_dir, log, how) for recipe in recipes
      ]
    return [indexes.opened(path, splitter) for path in paths]

  built = find(recipes.train, weights, begun_with)
  skipped = sum((index.skipped for index in built), Counter())
  stores = tuple(index.train for index in built)
  train = Corpus(stores, weights, dict(skipped))
  _report("train", train, log)
  _report_cuts(built, log)
  if recipes.heldout is None:
    parts = tuple(i.heldout for i in built if i.heldout is not None)
    copies = sum((index.near_copies for index in built), Counter())
    if copies:
      num_heldout = store.total(parts, "num_documents")
      log(near_copies.report(copies, num_heldout))
    if not parts:
      if cfg.heldout_fraction:
        log("no document is held out; name some with data.heldout.")
      return train, None
    heldout = Corpus(parts, None, {})
    if copies and len(built) > 1:  # each source looks at its own alone
      _report_overlap(train, heldout, cache_dir, log)
  else:
    (index,) = find([recipes.heldout], None, begun_with_heldout)
    _report_cuts([index], log)
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
  separator: str | None = None,
  turns: conversations.Reader | None = None,
) -> Corpus:
  """Text to evaluate: every document that fits a row is in one piece.

  Args: turns: then the records are conversations.
  Raises: as `open_corpora`.
  """
  packing.check_capacities(capacities, splitter)
  recipe = indexes.Recipe(
    paths=_frozen(paths),
    splitter=splitter,
    capacities=tuple(capacities),
    tokenizer=tokenizer,
    text_field=text_field,
    separator=separator,
    turns=turns,
    keep_documents=True,
    purpose="to evaluate",
  )
  cache = files.local(cache_dir, "data.cache_dir")
  path = indexes.find_or_build(recipe, cache, log)
  index = indexes.opened(path, splitter)
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
