"""Indexes: packed sources in a cache, each built once.

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
import os
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from aunet_jax.data import (
  conversations,
  near_copies,
  reading,
  sources,
  store,
)
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.files import locked
from aunet_jax.splitting.splitter import Splitter

_MOST_COMBINATIONS = 100_000  # of indexes that are tried for a mixture


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
  turns: conversations.Reader | None = None  # None: records are plain text
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
    del fields["turns"]
    if self.turns is not None:
      fields["turns"] = self.turns.identity()
    fields["tokenizer"] = self.tokenizer and self.tokenizer.hash
    if self.heldout_fraction:
      fields["near_copies"] = near_copies.VERSION
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  @property
  def field(self) -> str:
    """What a record must have."""
    return self.text_field if self.turns is None else self.turns.field

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


def reasons(counts: dict[str, int]) -> str:
  """As "2 empty, 1 not UTF-8"."""
  return ", ".join(f"{number:,} {why}" for why, number in counts.items())


# ----- building -------------------------------------------------------------


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
    sides = stack.enter_context(
      near_copies.Sides(directory / "waiting", recipe.heldout_fraction)
    )
    for record in reading.read_all(
      files, skips, recipe.field, tally, log, recipe.separator, recipe.turns
    ):
      digest = reading.document_digest(record.text)
      if not sides.waits(record.name, record.text, digest):
        train.add(record.name, record.text, digest)
    for name, text, digest, trains in sides.decided():
      (train if trains else heldout).add(name, text, digest)
      del text
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
      "cut": {"documents": tally.cut_documents, "bytes": tally.cut_bytes},
      "near_copies": dict(sides.near_copies),
    },
  )


def _nothing(recipe: Recipe, tally: reading.Tally, num_heldout: int) -> str:
  """The message for sources without a document."""
  found = (
    f"no documents {recipe.purpose} in {','.join(recipe.items)}: "
    f"{tally.num_good} found, {num_heldout} of them held out, skipped: "
    f"{reasons(tally.counts) or 'none'}. Give more data"
  )
  if num_heldout:
    found += ", or data.heldout_fraction=0"
  return found + "."


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
  except BaseException as error:
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(error, OSError) and error.errno and not error.filename:
      # Of a write that failed, the system does not say where.
      raise OSError(error.errno, error.strerror, str(partial)) from error
    raise
  _sync_directory(cache_dir)
  log(f"indexed in {time.monotonic() - start:.1f} s: {final}")
  return final


# ----- finding --------------------------------------------------------------


def _read_index(directory: pathlib.Path) -> dict:
  """What index.json of an index says; of format 2, what can be known."""
  try:
    if (directory / "index.json").exists():
      return store.read_json(directory / "index.json")
    counts = json.loads((directory / "skipped_counts.json").read_text())
    return {"skipped": counts}
  except (OSError, ValueError) as error:
    raise store.damaged(directory, error) from error


class Index(NamedTuple):
  """An index of the cache, opened."""

  train: store.Store
  heldout: store.Store | None
  skipped: Counter
  cut: Counter  # documents that lost the left of a prompt, and the bytes
  near_copies: Counter  # documents and bytes that train since one of them does


def opened(directory: pathlib.Path, splitter: Splitter) -> Index:
  """Raises: store.DamagedError."""
  heldout = directory / "heldout"
  said = _read_index(directory)
  return Index(
    store.Store(directory / "train", splitter),
    store.Store(heldout, splitter) if heldout.exists() else None,
    Counter(said["skipped"]),
    Counter(said.get("cut", {})),
    Counter(said.get("near_copies", {})),  # older ones did not look for them
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
  its = opened(index, recipe.splitter)
  given_back = set(its.train.last_digests(its.near_copies["documents"]))
  found = {"train": hashlib.blake2b(digest_size=16)}
  found["heldout"] = found["train"].copy()
  last = []  # of the training documents
  with reading.Tally(os.devnull, recipe.max_skip_fraction, log) as tally:
    for record in reading.read_all(
      files, skips, recipe.field, tally, log, recipe.separator, recipe.turns
    ):
      digest = reading.document_digest(record.text)
      if not reading.is_heldout(digest, recipe.heldout_fraction):
        found["train"].update(digest)
      elif digest[:8] in given_back:
        last.append(digest)
      else:
        found["heldout"].update(digest)
  found["train"].update(b"".join(last))
  parts = {"train": its.train, "heldout": its.heldout}
  return all(
    part is None or part.summary["content"] == found[name].hexdigest()
    for name, part in parts.items()
  )


def is_listed(recipe: Recipe, index: pathlib.Path) -> bool:
  """Whether sources have the names, sizes and dates of those of an index."""
  try:
    files, _ = sources.list_sources(recipe.paths)
  except (ValueError, OSError):
    return False
  known = _read_index(index).get("listing")  # of format 2, not known
  return known is None or known == _listing(files, dates=True)


def find_or_build(recipe: Recipe, cache_dir: pathlib.Path, log) -> pathlib.Path:
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


def fingerprint_of(
  parts: Sequence[str], weights: tuple[float, ...] | None
) -> str:
  text = json.dumps([list(parts), weights])
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def begun_with(
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
    # Older versions named indexes otherwise.
    return own + [path for path in found if path not in own]

  combinations = itertools.product(*map(choices, recipes))
  for paths in itertools.islice(combinations, _MOST_COMBINATIONS):
    if fingerprint_of([found[path] for path in paths], weights) == fingerprint:
      return list(paths)
  return None
