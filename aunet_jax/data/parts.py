"""A large index built in parts, by any number of processes and machines.

The files of the sources are cut into parts by their sizes alone (`cut`), so the
index is the same, bit for bit, whoever builds it. All parts lie in one work
directory:

  train/00012            the store of the documents of part 12 that train
  waiting/00012          its documents that may be held out, and sketches
  parts/00012.json       last: the part is finished; what was counted
  train/00012.near       of those that may be held out, near copies
  heldout/00012          the others
  parts/00012.sides.json last: these two are finished

Where a `.json` of `parts` is missing, what lies there of its part is of a
process that works on it and holds its lock, or of one that died: then it is
built again. When all are finished, `join` writes the summaries of the stores
and `index.json`; a directory with that is an index, but for its name.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from aunet_jax.data import (
  joined,
  near_copies,
  parallel,
  reading,
  sources,
  store,
)
from aunet_jax.files import Lock

# Of files as stored, that a part has at least: small, since processes wait for
# the one that has the last part. An index without "part_bytes" was cut at OLD.
PART_BYTES = 1 << 26
OLD_PART_BYTES = 1 << 28
MOST_PARTS = 512  # a row's part is kept open, see `joined`

_ADVANCE_BYTES = 1 << 20  # of text, between two reports


def cut(
  files: Sequence[sources.Source], least: int | None = None
) -> list[list[sources.Source]]:
  """The files of every part, in order; at least one part.

  Args: least: bytes of a part; None = PART_BYTES.
  """
  total = sum(file.size for file in files)
  enough = max(least or PART_BYTES, -(-total // MOST_PARTS))
  parts, size = [[]], 0
  for file in files:
    if size >= enough:
      parts.append([])
      size = 0
    parts[-1].append(file)
    size += file.size
  return parts


class Task(NamedTuple):
  """A part to build; as workers get it."""

  work: pathlib.Path
  number: int
  recipe: Any  # indexes.Recipe
  files: Sequence[sources.Source]

  @property
  def name(self) -> str:
    return f"{self.number:05d}"

  @property
  def mark(self) -> pathlib.Path:
    return self.work / "parts" / f"{self.name}.json"

  @property
  def sides_mark(self) -> pathlib.Path:
    return self.work / "parts" / f"{self.name}.sides.json"

  def writer(self, side: str, name: str, keep: bool) -> store.StoreWriter:
    recipe = self.recipe
    return store.StoreWriter(
      self.work / side / name,
      recipe.splitter,
      recipe.capacities,
      recipe.tokenizer,
      keep,
    )


def sync_directory(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


# ----- reading a part -------------------------------------------------------


def documents(
  task: Task, tally: reading.Tally
) -> Iterator[tuple[sources.Document, bytes]]:
  """The documents of a part and their digests; reports how far it is."""
  recipe, num_bytes, count = task.recipe, 0, 0
  for record in reading.read_all(
    task.files,
    (),
    recipe.field,
    tally,
    lambda line: None,
    recipe.separator,
    recipe.turns,
  ):
    num_bytes += len(record.text)
    count += 1
    yield record, reading.document_digest(record.text)
    del record
    if num_bytes >= _ADVANCE_BYTES:
      parallel.advance(num_bytes, count)
      num_bytes = count = 0
  parallel.advance(num_bytes, count)


def _joined(work: pathlib.Path) -> bool:
  """Whether others have finished all parts, and joined them."""
  return (work / "index.json").exists() or not work.exists()


def build(task: Task, wait: bool) -> int | None:
  """Builds a part, unless it is finished.

  Args: wait: for another process that builds it.
  Returns: its number, or None where another process builds it.
  """
  try:
    lock = Lock(task.mark.with_suffix(".lock"))
  except FileNotFoundError:
    if not _joined(task.work):
      raise
    return task.number
  with contextlib.closing(lock):
    if not lock.take(wait):
      return None
    # In this order: others who join remove the mark after they say so.
    if not task.mark.exists() and not _joined(task.work):
      try:
        _build(task)
      except OSError as error:
        if error.errno and not error.filename:
          # Of a write that failed, the system does not say where.
          where = str(task.work)
          raise OSError(error.errno, error.strerror, where) from error
        raise
  return task.number


def _build(task: Task) -> None:
  work, name, recipe = task.work, task.name, task.recipe
  for side in ("train", "waiting"):
    shutil.rmtree(work / side / name, ignore_errors=True)
  waiting = hashlib.blake2b(digest_size=16)
  skipped = task.mark.with_suffix(".skipped")
  with (
    reading.Tally(skipped, 1.0, lambda line: None) as tally,
    task.writer("train", name, recipe.keep_documents) as train,
    near_copies.Sides(
      work / "waiting" / name, recipe.heldout_fraction
    ) as sides,
  ):
    for record, digest in documents(task, tally):
      if sides.waits(record.name, record.text, digest):
        waiting.update(digest)
      else:
        train.add(record.name, record.text, digest)
      del record
    train.finish()
    waited = sides.finish()
  for path in (work / "train" / name, waited.directory, work / "parts"):
    sync_directory(path)
  store.write_json(
    task.mark,
    {
      "tally": tally.state(),
      "num_train": train.num_documents,
      "num_waiting": waited.waiting.num,
      "num_sketches": waited.training.num,
      "waiting_content": waiting.hexdigest(),
      "sizes": [[p.name, p.stat().st_size] for p in _scratch(task)],
    },
  )


def _scratch(task: Task) -> list[pathlib.Path]:
  """What a finished part leaves for the join."""
  found = sorted((task.work / "waiting" / task.name).iterdir())
  return [*found, task.mark.with_suffix(".skipped")]


def said(task: Task) -> dict:
  """What was counted in a finished part.

  Raises: DamagedError where what it left is not as it was written.
  """
  try:
    content = store.read_json(task.mark)
    sizes = [[p.name, p.stat().st_size] for p in _scratch(task)]
    if sizes != content["sizes"]:
      raise store.DamagedError(f"part {task.name} is not as it was written")
  except (OSError, ValueError) as error:
    raise store.damaged(task.work, error) from error
  return content


def holds(task: Task, train: pathlib.Path, waiting_content: str) -> bool:
  """Whether the files of a part hold what it was made of; reads them.

  Args: train: its store. waiting_content: as its mark said.
  """
  found = {False: hashlib.blake2b(digest_size=16)}
  found[True] = found[False].copy()
  with reading.Tally(os.devnull, 1.0, lambda line: None) as tally:
    for record, digest in documents(task, tally):
      waits = reading.is_heldout(digest, task.recipe.heldout_fraction)
      found[waits].update(digest)
      del record
  content = store.read_json(train / "summary.json")["content"]
  expected = [content, waiting_content]
  return [found[False].hexdigest(), found[True].hexdigest()] == expected


# ----- joining --------------------------------------------------------------


def _decide(near_N: np.ndarray, task: Task) -> dict:
  """Puts the documents of a part that wait on their sides.

  Args: near_N: of those documents; see `near_copies.near_training`.
  """
  if task.sides_mark.exists():
    return store.read_json(task.sides_mark)
  names = {True: ("train", f"{task.name}.near"), False: ("heldout", task.name)}
  for side, name in names.values():
    shutil.rmtree(task.work / side / name, ignore_errors=True)
  copies: Counter[str] = Counter()
  with contextlib.ExitStack() as stack:
    keeps = {True: task.recipe.keep_documents, False: True}
    writers = {
      trains: stack.enter_context(task.writer(*names[trains], keeps[trains]))
      for trains in set(near_N.tolist())
    }
    waited = near_copies.Waited.of(task.work / "waiting" / task.name, 0, 0)
    for held in waited.held(near_N):
      writers[held.trains].add(held.name, held.text, held.digest)
      parallel.advance(len(held.text), 1)
      if held.trains:
        copies.update(documents=1, bytes=len(held.text))
      del held
    for writer in writers.values():
      writer.finish()
  for trains in writers:
    side, name = names[trains]
    sync_directory(task.work / side / name)
  result = {
    "near": True in writers,
    "heldout": False in writers,
    "near_copies": dict(copies),
  }
  store.write_json(task.sides_mark, result)
  return result


class Joined(NamedTuple):
  """What the parts hold in all."""

  num_train: int
  num_heldout: int
  near_copies: dict[str, int]
  waiting_contents: list[str]  # of every part; see `holds`


def join(tasks: Sequence[Task], pool: parallel.Pool) -> Joined:
  """Makes the stores `train` and `heldout` of parts that are all finished.

  Raises: DamagedError.
  """
  parts = [said(task) for task in tasks]
  waited = [
    near_copies.Waited.of(
      task.work / "waiting" / task.name,
      part["num_waiting"],
      part["num_sketches"],
    )
    for task, part in zip(tasks, parts, strict=True)
  ]
  near_N = near_copies.near_training(
    [w.waiting for w in waited], [w.training for w in waited], pool.map
  )
  ends = np.cumsum([w.waiting.num for w in waited])
  near = np.split(near_N, ends[:-1])
  sides = list(pool.map(_decide_one, list(zip(near, tasks, strict=True))))
  names = [
    task.name
    for task, part in zip(tasks, parts, strict=True)
    if part["num_train"]
  ]
  decided = list(zip(tasks, sides, strict=True))
  names += [f"{task.name}.near" for task, side in decided if side["near"]]
  heldout = [task.name for task, side in decided if side["heldout"]]
  work = tasks[0].work
  for side, stores in (("train", names), ("heldout", heldout)):
    if stores:
      joined.join(work / side, stores)
      sync_directory(work / side)
  copies = sum((Counter(side["near_copies"]) for side in sides), Counter())
  num_near = copies["documents"]
  return Joined(
    num_train=sum(part["num_train"] for part in parts) + num_near,
    num_heldout=len(near_N) - num_near,
    near_copies=dict(copies),
    waiting_contents=[part["waiting_content"] for part in parts],
  )


def _decide_one(pair: tuple[np.ndarray, Task]) -> dict:
  return _decide(*pair)


def merged_tally(
  tasks: Sequence[Task],
  skips: Sequence[sources.Skip],
  path: pathlib.Path,
  max_fraction: float,
) -> reading.Tally:
  """What was skipped in all parts, written to `path`; closed."""
  with reading.Tally(path, max_fraction, lambda line: None) as tally:
    tally.add_left_out(skips)
    for task in tasks:
      tally.merge(store.read_json(task.mark)["tally"])
  with open(path, "ab") as whole:
    for task in tasks:
      with open(task.mark.with_suffix(".skipped"), "rb") as part:
        shutil.copyfileobj(part, whole)
  return tally
