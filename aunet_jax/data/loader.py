"""Batches of packed rows: a Grain pipeline over corpora.

`corpora.open_corpora` decodes and packs the sources of a config once.
`make_loader` reads rows by number: a global shuffle by seed, epochs of exactly
one pass, and a state of one number that means the same at any number of
processes and workers. docs/data.md states what an epoch, a mixture and a resume
promise.
"""

import math
import os
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from aunet_jax.data import packing, parallel
from aunet_jax.data.corpora import Corpus


class _Rows:
  """Rows as Grain reads them; those past the last are empty."""

  def __init__(self, corpus: Corpus, num_rows: int):
    self._corpus = corpus
    self._num_rows = num_rows

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)
    parallel.end_with_parent()  # only workers unpickle rows

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if index < self._corpus.num_rows:
      return self._corpus.narrow_row(int(index))
    row = self._corpus.narrow_row(0)
    return {name: np.zeros_like(array) for name, array in row.items()}


def check_memory(num_rows: int, length: int) -> None:
  """Raises: ValueError where a batch takes more than half of this machine."""
  size = num_rows * length * 4 * len(packing.field_names())
  there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if size > there / 2:
    raise ValueError(
      f"{num_rows:,} rows of {length:,} positions take {size / 1e9:,.1f} GB a "
      f"batch, and this machine has {there / 1e9:,.1f} GB of memory; use a "
      f"smaller batch size or capacity of stage 1."
    )


def _check_share(batch_size: int, index: int, count: int) -> None:
  if batch_size < 1 or batch_size % count:
    raise ValueError(
      f"batch_size={batch_size} rows do not divide over the {count} groups of "
      f"processes that read them; use a multiple of {count}."
    )
  if not 0 <= index < count:
    raise ValueError(f"share_index={index} must be in [0, {count}).")


def _rows_dataset(corpus: Corpus, seed: int, batch_size: int):
  """All rows, shuffled, epoch after epoch, as an endless MapDataset."""
  if corpus.weights is None:
    num_rows = -(-corpus.num_rows // batch_size) * batch_size
    rows = grain.MapDataset.source(_Rows(corpus, num_rows))
    return rows.shuffle(seed=seed).repeat()
  parts, rates = [], []
  for number, part in enumerate(corpus.stores):
    alone = Corpus((part,), None, {})
    rows = grain.MapDataset.source(_Rows(alone, alone.num_rows))
    parts.append(rows.shuffle(seed=(seed + number) % 2**32).repeat())
    rates.append(corpus.weights[number] * alone.num_rows / alone.num_bytes)
  total = sum(rates)
  return grain.MapDataset.mix(parts, weights=[rate / total for rate in rates])


class Loader:
  """Batches without end; see `make_loader`."""

  def __init__(self, iterator, identity: dict):
    self._iterator = iterator
    self._identity = identity

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return packing.widen(next(self._iterator))

  def get_state(self) -> dict:
    """Where the stream is: the same on all processes, JSON values only."""
    state = self._iterator.get_state()
    return {**self._identity, "next_row": int(state["global_next_index"])}

  def set_state(self, state: dict) -> None:
    """Continues a stream, at any number of processes and workers.

    Raises: ValueError where the state is of another stream.
    """
    for name, value in self._identity.items():
      if state.get(name) != value:
        raise ValueError(
          f"the checkpoint's data has {name}={state.get(name)!r} but this run "
          f"{value!r}; resuming would repeat or skip text. Restore the data, "
          "rules, capacities, seed and batch size of that run."
        )
    self._iterator.set_state({"global_next_index": state["next_row"]})

  def close(self) -> None:
    """Stops worker processes and threads; the loader gives no more batches."""
    self._iterator.close()
    self._iterator = iter(())  # frees what Grain read ahead, before exit


def make_loader(
  corpus: Corpus,
  *,
  seed: int,
  batch_size: int,
  share_index: int = 0,
  share_count: int = 1,
  num_workers: int = 0,
) -> Loader:
  """An endless stream of batches, dicts of int32 arrays (B_local, L).

  Args:
    seed: of the shuffle; each epoch has its own order.
    batch_size: rows over all processes, which must share them evenly.
    share_index, share_count: which part of each batch this process reads;
      processes that hold the same rows read the same part.
    num_workers: processes that read rows; 0 = threads of this one. A script
      that asks for some must guard its entry with `__name__ == "__main__"`.
  Raises: ValueError where share_count does not divide batch_size, or a batch
    does not fit this machine.
  """
  _check_share(batch_size, share_index, share_count)
  check_memory(batch_size // share_count, corpus.capacities[0])
  workers = None
  if num_workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags
    workers = grain.MultiprocessingOptions(num_workers)
  threads = min(4, os.cpu_count() or 1)
  iterator = iter(
    grain.experimental.ElasticIterator(
      _rows_dataset(corpus, seed % 2**32, batch_size),
      batch_size,
      grain.sharding.ShardOptions(share_index, share_count),
      read_options=grain.ReadOptions(threads, prefetch_buffer_size=threads),
      multiprocessing_options=workers,
    )
  )
  identity = {
    "fingerprint": corpus.fingerprint,
    "seed": seed,
    "batch_size": batch_size,
  }
  return Loader(iterator, identity)


def evaluation_batches(
  corpus: Corpus,
  *,
  batch_size: int,
  share_index: int = 0,
  share_count: int = 1,
  max_bytes: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Every row once, in order, as batches of int32 arrays (B_local, L).

  Empty rows fill the last batch, so all processes get as many batches.

  Args: max_bytes: about how much text to take, as rows spread evenly over the
    corpus; None = all of it.
  """
  _check_share(batch_size, share_index, share_count)
  check_memory(batch_size // share_count, corpus.capacities[0])
  num_rows = corpus.num_rows
  if max_bytes is not None:
    share = min(1.0, max_bytes / corpus.num_bytes)
    num_rows = max(1, math.ceil(num_rows * share))
  chosen = np.arange(num_rows) * corpus.num_rows // num_rows
  rows = _Rows(corpus, corpus.num_rows + 1)
  local = batch_size // share_count
  for first in range(0, num_rows, batch_size):
    mine = first + share_index * local + np.arange(local)
    numbers = [chosen[i] if i < num_rows else corpus.num_rows for i in mine]
    batch = [rows[number] for number in numbers]
    yield packing.widen(
      {name: np.stack([row[name] for row in batch]) for name in batch[0]}
    )
