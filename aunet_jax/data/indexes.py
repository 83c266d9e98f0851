"""Indexes: packed sources in a cache, each built once.

The cache holds a directory for every index: the stores `train` and `heldout`,
and `index.json`, which says what it was made of. An index is built under a lock
and put in place by one rename, so a build that dies leaves nothing that is ever
used, and processes that share the directory build once. A large one is built in
parts, which they share, and which a later build goes on with; see `parts`. A
run that goes on asks for its index by fingerprint and never looks at the
sources again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from aunet_jax.data import (
  building,
  conversations,
  joined,
  near_copies,
  parts,
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

  train: store.Store | joined.Joined
  heldout: store.Store | joined.Joined | None
  skipped: Counter
  cut: Counter  # documents that lost the left of a prompt, and the bytes
  near_copies: Counter  # documents and bytes that train since one of them does


def opened(directory: pathlib.Path, splitter: Splitter) -> Index:
  """Raises: store.DamagedError."""
  heldout = directory / "heldout"
  said = _read_index(directory)
  return Index(
    joined.open_store(directory / "train", splitter),
    joined.open_store(heldout, splitter) if heldout.exists() else None,
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
  said = _read_index(index)
  waiting = said.get("waiting")
  if waiting is not None:
    groups = parts.cut(files, said.get("part_bytes", parts.OLD_PART_BYTES))
    tasks = [
      parts.Task(index, number, recipe, group)
      for number, group in enumerate(groups)
    ]
    return len(tasks) == len(waiting) and all(
      parts.holds(task, index / "train" / task.name, content)
      for task, content in zip(tasks, waiting, strict=True)
    )
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
  stores = {"train": its.train, "heldout": its.heldout}
  return all(
    part is None or part.summary["content"] == found[name].hexdigest()
    for name, part in stores.items()
  )


def is_listed(recipe: Recipe, index: pathlib.Path) -> bool:
  """Whether sources have the names, sizes and dates of those of an index."""
  try:
    files, _ = sources.list_sources(recipe.paths)
  except (ValueError, OSError):
    return False
  known = _read_index(index).get("listing")  # of format 2, not known
  return known is None or known == _listing(files, dates=True)


def find_or_build(
  recipe: Recipe,
  cache_dir: pathlib.Path,
  log,
  how: building.How = building.ALONE,
) -> pathlib.Path | None:
  """The index of some sources as they are now; builds it where there is none.

  Where the sources are gone, the newest one that was made of them.

  Returns: None where parts of other shares are not finished.
  Raises: ValueError where there is none and `how` refuses to build it.
  """
  name = ",".join(recipe.items)
  built = _built(recipe, cache_dir)
  try:
    files, skips = sources.list_sources(recipe.paths)
    if built and not files:  # a glob in a directory that is gone
      raise ValueError("; ".join(f"{s.where}: {s.detail}" for s in skips[:3]))
  except (ValueError, OSError) as error:
    if not built:
      raise
    log(f"{name} cannot be read ({error}); using its index {built[-1]}")
    return built[-1]
  identity = {
    "made_of": recipe.items,
    "listing": _listing(files, dates=True),
    "listing_without_dates": _listing(files, dates=False),
  }

  def find(key="listing"):
    for directory in _built(recipe, cache_dir):
      if _read_index(directory)[key] == identity[key]:
        return directory
    return None

  if found := find():
    return found
  cache_dir.mkdir(parents=True, exist_ok=True)
  lock = functools.partial(
    locked,
    cache_dir / f"{recipe.key}.lock",
    lambda: log(f"waiting for the process that builds {name}"),
  )
  order = building.Order(
    recipe, files, skips, identity, cache_dir, log, find, lock
  )
  with lock():
    if found := find():
      return found
    if found := find("listing_without_dates"):
      log(f"dates of {name} have changed; comparing its text with the index")
      if _same_text(found, recipe, files, skips, log):
        said = _read_index(found) | {"listing": identity["listing"]}
        store.write_json(found / "index.json", said)
        return found
    if order.size > how.most_bytes:
      raise ValueError(
        f"{cache_dir} has no index of {name} ({order.size / 1e9:,.1f} GB). "
        f"{how.refusal}"
      )
    groups = parts.cut(files)
    if len(groups) == 1:
      return building.in_one_piece(order)
  return building.in_parts(order, groups, how)


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
