"""Building an index: in one piece, or in parts with others.

Nothing is put in place before all of it is safely on disk. A build in one piece
that dies leaves nothing; of one in parts, what is finished is used by the next.
"""

import contextlib
import functools
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aunet_jax import terminal
from aunet_jax.data import (
  estimate,
  near_copies,
  parallel,
  parts,
  reading,
  sources,
  store,
)


def reasons(counts: dict[str, int]) -> str:
  """As "2 empty, 1 not UTF-8"."""
  return ", ".join(f"{number:,} {why}" for why, number in counts.items())


class Order(NamedTuple):
  """An index to build."""

  recipe: Any  # indexes.Recipe
  files: Sequence[sources.Source]
  skips: Sequence[sources.Skip]  # what their listing left out
  identity: dict  # what `index.json` says of the files
  cache_dir: pathlib.Path
  log: Callable[[str], None]
  find: Callable[[], pathlib.Path | None]  # it, where it is finished
  locked: Callable[[], contextlib.AbstractContextManager]  # against others

  @property
  def name(self) -> str:
    return ",".join(self.recipe.items)

  @property
  def listing(self) -> str:
    return self.identity["listing"]

  @property
  def size(self) -> int:
    """Bytes of the files as stored."""
    return sum(file.size for file in self.files)

  def free_name(self) -> pathlib.Path:
    final = self.cache_dir / f"{self.recipe.key}-{self.listing}"
    if final.exists():  # made of other text with the same names, sizes, dates
      return final.with_name(f"{final.name}-{time.time_ns():x}")
    return final


class How(NamedTuple):
  """Who builds an index that is missing."""

  num_workers: int = 1  # processes of this machine
  share: tuple[int, int] = (0, 1)  # which of how many shares of the parts
  # Bytes of files as stored that may be indexed; more is an error.
  most_bytes: float = math.inf
  refusal: str = ""  # which then says what to do


ALONE = How()


# ----- in one piece ---------------------------------------------------------


def _build(directory: pathlib.Path, order: Order) -> None:
  """Writes an index: `train` and, where documents fall to it, `heldout`."""
  recipe, log = order.recipe, order.log
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
      order.files,
      order.skips,
      recipe.field,
      tally,
      log,
      recipe.separator,
      recipe.turns,
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
  _write_index(directory, order, tally, dict(sides.near_copies))


def _write_index(
  directory: pathlib.Path,
  order: Order,
  tally: reading.Tally,
  near: dict[str, int],
  **more,
) -> None:
  store.write_json(
    directory / "index.json",
    {
      "format": store.FORMAT,
      **order.identity,
      "skipped": dict(tally.counts),
      "cut": {"documents": tally.cut_documents, "bytes": tally.cut_bytes},
      "near_copies": near,
      **more,
    },
  )


def _nothing(recipe: Any, tally: reading.Tally, num_heldout: int) -> str:
  """The message for sources without a document."""
  found = (
    f"no documents {recipe.purpose} in {','.join(recipe.items)}: "
    f"{tally.num_good} found, {num_heldout} of them held out, skipped: "
    f"{reasons(tally.counts) or 'none'}. Give more data"
  )
  if num_heldout:
    found += ", or data.heldout_fraction=0"
  return found + "."


def in_one_piece(order: Order) -> pathlib.Path:
  """Builds an index in this process, which holds the lock."""
  final, log = order.free_name(), order.log
  partial = order.cache_dir / f"{order.recipe.key}.partial"
  shutil.rmtree(partial, ignore_errors=True)  # of a build that died
  log(f"indexing {len(order.files):,} files, {order.size / 1e6:,.1f} MB, once")
  start = time.monotonic()
  partial.mkdir()
  try:
    _build(partial, order)
    parts.sync_directory(partial)
    partial.rename(final)
  except BaseException as error:
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(error, OSError) and error.errno and not error.filename:
      # Of a write that failed, the system does not say where.
      raise OSError(error.errno, error.strerror, str(partial)) from error
    raise
  parts.sync_directory(order.cache_dir)
  log(f"indexed in {time.monotonic() - start:.1f} s: {final}")
  return final


# ----- in parts -------------------------------------------------------------


class _Progress:
  """A line every few seconds, with the time that is left."""

  _SECONDS = 5.0

  def __init__(self, text_bytes: float, log):
    """Args: text_bytes: what is to be read, about; 0 = unknown."""
    self._total = text_bytes
    self._log = log
    self._start = self._last = time.monotonic()

  def show(self, num_bytes: int, num_documents: int) -> None:
    now = time.monotonic()
    if now - self._last < self._SECONDS or not num_bytes:
      return
    self._last = now
    rate = num_bytes / (now - self._start)
    line = (
      f"indexing: {num_documents:,} documents, {num_bytes / 1e6:,.0f} MB at "
      f"{rate / 1e6:.1f} MB/s"
    )
    if self._total:
      share = min(num_bytes / self._total, 1.0)
      left = max(self._total - num_bytes, 0) / rate
      line += f", {share:.0%}, {terminal.duration(left)} left"
    self._log(line)


def _plan(order: Order, tasks: Sequence[parts.Task], how: How) -> float:
  """Says what the parts that are missing will take; checks the disk.

  Returns: the text that is to be read here, in bytes; 0 = unknown.
  """
  (index, count), log = how.share, order.log
  left = [task for task in tasks if not task.mark.exists()]
  mine = [task for task in left if task.number % count == index]
  stored = [sum(f.size for f in t.files) for t in (*left, *mine)]
  stored_left, stored_mine = sum(stored[: len(left)]), sum(stored[len(left) :])
  done = len(tasks) - len(left)
  say = f"{len(tasks)} parts" + (f", {done} of them finished" if done else "")
  about = None
  if left:
    about = estimate.estimate(order.files, order.recipe)
  if about is None:
    log(f"{say}; what is left cannot be estimated" if left else say)
    return 0.0
  estimate.check_disk(about.disk * stored_left, order.cache_dir, order.name)
  seconds = about.seconds * stored_mine / how.num_workers
  log(
    f"{say}; in all about {about.of_text() / 1e9:,.2f} GB of text, "
    f"{about.documents * about.stored_bytes:,.0f} documents, "
    f"{about.disk * about.stored_bytes / 1e9:,.2f} GB of disk; "
    f"{terminal.duration(seconds)} for the {len(mine)} parts to build here "
    f"(processes: {how.num_workers})"
  )
  return about.text * stored_mine


def _build_parts(
  order: Order, tasks: Sequence[parts.Task], how: How, pool: parallel.Pool
) -> None:
  """Builds the parts of this share; returns when they are finished."""
  (index, count), log = how.share, order.log
  mine = [task for task in tasks if task.number % count == index]
  stored = {t.number: sum(f.size for f in t.files) or 1 for t in tasks}
  done, most = 0, order.recipe.max_skip_fraction
  with reading.Tally(os.devnull, most, log) as tally:
    tally.add_left_out(order.skips)
    left = [task for task in mine if not task.mark.exists()]
    for wait in (False, True):
      found = pool.run(functools.partial(parts.build, wait=wait), left)
      by_number = {task.number: task for task in left}
      for number in found:
        if number is None:
          continue
        task = by_number.pop(number)
        with contextlib.suppress(FileNotFoundError):  # others have joined them
          tally.merge(store.read_json(task.mark)["tally"])
          done += stored[number]
          tally.check_parts(done / sum(stored.values()))
      left = list(by_number.values())
      if not left:
        break
      log(f"waiting for {len(left)} parts that other processes build")


def in_parts(
  order: Order, groups: Sequence[Sequence[sources.Source]], how: How
) -> pathlib.Path | None:
  """Builds an index with all other processes that do; see `parts`.

  Args: groups: the files of every part.
  Returns: None where parts of other shares are not finished.
  """
  recipe, log, cache_dir = order.recipe, order.log, order.cache_dir
  # Parts cut otherwise, by another version, are of no use here.
  work = cache_dir / f"{recipe.key}.{order.listing}.{len(groups)}.partial"
  tasks = [
    parts.Task(work, number, recipe, group)
    for number, group in enumerate(groups)
  ]
  with order.locked():
    if found := order.find():
      return found
    for other in cache_dir.glob(f"{recipe.key}.*.partial"):
      if other != work:
        log(
          f"{other} is an unfinished index of the same paths with other files; "
          f"delete it if no other process builds it"
        )
    (work / "parts").mkdir(parents=True, exist_ok=True)
  log(f"indexing {len(order.files):,} files, {order.size / 1e6:,.1f} MB, once")
  start = time.monotonic()
  joined = work / "index.json"
  with parallel.Pool(how.num_workers) as pool, contextlib.ExitStack() as stack:
    if not joined.exists():
      pool.on_tick = _Progress(_plan(order, tasks, how), log).show
      _build_parts(order, tasks, how, pool)
    stack.enter_context(order.locked())
    if found := order.find():
      return found
    if not joined.exists():
      if missing := sum(not task.mark.exists() for task in tasks):
        log(
          f"{missing} of {len(tasks)} parts are of other shares; the share "
          f"that ends last joins them"
        )
        return None
      _join(work, order, tasks, pool)
    for scratch in ("parts", "waiting"):
      shutil.rmtree(work / scratch, ignore_errors=True)
    final = order.free_name()
    work.rename(final)
    # One who came late may have made its lock again.
    shutil.rmtree(final / "parts", ignore_errors=True)
    parts.sync_directory(cache_dir)
  log(f"indexed in {time.monotonic() - start:.1f} s: {final}")
  return final


def _join(
  work: pathlib.Path,
  order: Order,
  tasks: Sequence[parts.Task],
  pool: parallel.Pool,
) -> None:
  most = order.recipe.max_skip_fraction
  skipped = work / "skipped.jsonl"
  tally = parts.merged_tally(tasks, order.skips, skipped, most)
  tally.check()
  order.log(f"joining {len(tasks)} parts")
  pool.on_tick = lambda num_bytes, num_documents: None
  found = parts.join(tasks, pool)
  if not found.num_train:
    raise ValueError(_nothing(order.recipe, tally, found.num_heldout))
  waiting = found.waiting_contents
  _write_index(
    work, order, tally, found.near_copies, waiting=waiting,
    part_bytes=parts.PART_BYTES,
  )  # fmt: skip
  parts.sync_directory(work)
