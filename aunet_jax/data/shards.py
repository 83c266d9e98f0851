"""Any source to shuffled shards of documents, in one pass."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

import numpy as np

from aunet_jax.data import near_copies, planner, reading, sources
from aunet_jax.data.reading import log_to_stderr as log
from aunet_jax.files import Lock

SAMPLE_ROWS = 2000  # rows of text that a plan is made from


_MARK = "being_written.lock"  # in a directory of ours that is not finished
_OURS = {
  _MARK, "train", "heldout", "train.scratch", "heldout.scratch", "waiting",
  "skipped.jsonl", "index.json",
}  # fmt: skip


# ----- the shards -----------------------------------------------------------


class _Split:
  """The documents of one split, end to end in a scratch file."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._file = open(path, "wb")
    self.sizes: list[int] = []

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._file.close()

  def add(self, text: bytes) -> None:
    self._file.write(text)
    self.sizes.append(len(text))

  def _read(self, numbers: np.ndarray, total: float) -> Iterator[bytes]:
    """The documents, up to `total` bytes of them."""
    self._file.flush()
    sizes = np.array(self.sizes, np.int64)
    offsets = np.cumsum(sizes) - sizes
    # A buffered file reads on after the 2 GiB that one system call gives.
    with open(self.path, "rb") as text:
      for number in numbers:
        text.seek(int(offsets[number]))
        size = int(min(sizes[number], total))
        total -= size
        yield text.read(size)
        if total <= 0:
          return

  def sample(self, num_bytes: int, seed: int) -> list[bytes]:
    """Random documents of about so many bytes."""
    order = np.random.default_rng(seed).permutation(len(self.sizes))
    return list(self._read(order, num_bytes))

  def write_shards(
    self, directory: pathlib.Path, shard_bytes: int, seed: int
  ) -> list[dict]:
    """Writes the documents in a random order; returns a line per shard."""
    from array_record.python import array_record_module

    sizes = np.array(self.sizes, np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    total = int(sizes.sum())
    count = -(-total // shard_bytes)
    shard_of = (np.cumsum(sizes[order]) - 1) * count // total
    # One document may be larger than several shards, which would stay empty.
    full, shard_of = np.unique(shard_of, return_inverse=True)
    count = len(full)
    directory.mkdir()
    shards = []
    for shard in range(count):
      mine = order[shard_of == shard]
      name = f"{shard:05d}-of-{count:05d}.arrayrecord"
      writer = array_record_module.ArrayRecordWriter(
        str(directory / name), "group_size:1"
      )
      for text in self._read(mine, math.inf):
        writer.write(text)
      writer.close()
      shards.append(
        {
          "file": f"{directory.name}/{name}",
          "documents": len(mine),
          "bytes": int(sizes[mine].sum()),
        }
      )
    return shards


def write(args: argparse.Namespace, splitter, rules: list[str]) -> dict:
  """Makes the output directory; returns what index.json says.

  Raises: ValueError where the input or the output cannot be used.
  """
  output = pathlib.Path(args.output)
  if output.exists():
    raise ValueError(f"--output={output} exists; remove it or name another.")
  partial = output.with_name(output.name + ".partial")
  start = time.monotonic()
  with _scratch(partial) as directory:
    index = _write_into(directory, args, splitter, rules)
    (directory / _MARK).unlink()
    directory.rename(output)
  log(f"wrote {output} in {time.monotonic() - start:.1f} s")
  return index


@contextlib.contextmanager
def _scratch(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory for as long as it is used, unless it was renamed.

  One that a killed run left is used again; one of somebody else's never is.

  Raises: ValueError where something else has that name.
  """
  if os.path.lexists(path):
    ours = not path.is_symlink() and path.is_dir() and (path / _MARK).is_file()
    if not ours or {entry.name for entry in path.iterdir()} - _OURS:
      raise ValueError(
        f"{path} is in the way, and not of this command alone; move it, or "
        f"name another --output."
      )
  path.mkdir(parents=True, exist_ok=True)
  with contextlib.closing(Lock(path / _MARK)) as lock:
    if not lock.take(wait=False):
      raise ValueError(f"another process is writing {path}; wait for it.")
    try:
      _remove_ours(path, but=_MARK)
      yield path
    finally:
      if path.is_dir():
        _remove_ours(path)
        with contextlib.suppress(OSError):  # not empty: something was put in
          path.rmdir()


def _remove_ours(path: pathlib.Path, but: str | None = None) -> None:
  for entry in path.iterdir():
    if entry.name == but or entry.name not in _OURS:
      continue
    if entry.is_dir() and not entry.is_symlink():
      shutil.rmtree(entry)
    else:
      entry.unlink()


def _write_into(
  directory: pathlib.Path, args: argparse.Namespace, splitter, rules
) -> dict:
  files, skips = sources.list_sources(args.input)
  with (
    reading.Tally(
      directory / "skipped.jsonl", args.max_skip_fraction, log
    ) as tally,
    _Split(directory / "train.scratch") as train,
    _Split(directory / "heldout.scratch") as heldout,
    near_copies.Sides(directory / "waiting", args.heldout_fraction) as sides,
  ):
    splits = {"train": train, "heldout": heldout}
    counters = {
      name: planner.SegmentCounter(splitter.num_levels) for name in splits
    }

    def add(name, text):
      splits[name].add(text)
      counters[name].add(planner.level_blocks(splitter, text))

    for record in reading.read_all(
      files, skips, args.text_field, tally, log, args.separator
    ):
      digest = reading.document_digest(record.text)
      if not sides.waits(record.name, record.text, digest):
        add("train", record.text)
    for _, text, _, trains in sides.decided():
      add("train" if trains else "heldout", text)
      del text
    if not tally.num_good:
      raise ValueError(f"{args.input} holds no documents to write.")
    index = {
      "input": args.input,
      "seed": args.seed,
      "rules": rules,
      "splitter_hash": splitter.hash,
      "skipped": dict(tally.counts),
      "near_copies": dict(sides.near_copies),
      "splits": {},
    }
    if sides.near_copies:
      log(near_copies.report(sides.near_copies, len(heldout.sizes)))
    for name, split in splits.items():
      if not split.sizes:
        log(f"no document falls to {name}; there is no {name} directory.")
        continue
      log(f"writing {len(split.sizes):,} documents of {name}")
      shards = split.write_shards(directory / name, args.shard_bytes, args.seed)
      index["splits"][name] = {
        "documents": len(split.sizes),
        "bytes": sum(split.sizes),
        "stages": counters[name].summary(rules),
        "shards": shards,
      }
    index["plan"] = None
    if sum(train.sizes) >= planner.MIN_ROWS * args.row_bytes:
      documents = train.sample(SAMPLE_ROWS * args.row_bytes, args.seed)
      plan = planner.recommend(documents, splitter, args.row_bytes)
      index["plan"] = dataclasses.asdict(plan)
  for split in splits.values():
    split.path.unlink()
  (directory / "index.json").write_text(json.dumps(index, indent=2))
  return index
