"""All documents of a list of sources, with what was skipped counted.

Also which documents are held out: a matter of their text alone, so that it
does not change with the order, the number or the names of files.
"""

import hashlib
import json
import pathlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from aunet_jax.data import sources

_PROGRESS_SECONDS = 5.0


_EARLY_RECORDS = 1000  # records after which too many bad ones stop a build


_NOT_BAD = ("empty", "duplicate path")  # skipped, but no sign of bad data


class Tally:
  """Counts skipped records, says where they stand, stops at too many."""

  def __init__(self, path: pathlib.Path, max_fraction: float, log):
    self.counts = Counter()
    self.num_good = 0
    self._max_fraction = max_fraction
    self._log = log
    self._file = open(path, "w")
    self._examples = []

  def add(self, skip: sources.Skip) -> None:
    self.counts[skip.reason] += 1
    self._file.write(json.dumps(skip._asdict()) + "\n")
    if skip.reason in _NOT_BAD:
      return
    if self.counts[skip.reason] <= 3:
      line = f"{skip.where}: {skip.reason}: {skip.detail}"
      self._log(f"skipped {line}")
      self._examples.append(line)
    if self.num_good + self.counts.total() >= _EARLY_RECORDS:
      self.check()

  def check(self) -> None:
    bad = sum(n for why, n in self.counts.items() if why not in _NOT_BAD)
    if bad > self._max_fraction * (bad + self.num_good):
      raise ValueError(
        f"{bad} of {bad + self.num_good} records cannot be used, more than "
        f"data.max_skip_fraction={self._max_fraction} allows. Repair the "
        "data or raise the setting. First ones:\n  "
        + "\n  ".join(self._examples)
      )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._file.close()


class _Progress:
  """A line every few seconds while a long build runs."""

  def __init__(self, total_bytes: int, log):
    self._total = total_bytes
    self._log = log
    self._start = self._last = time.monotonic()

  def show(self, done: int, num_bytes: int, num_documents: int) -> None:
    now = time.monotonic()
    if now - self._last < _PROGRESS_SECONDS:
      return
    self._last = now
    rate = num_bytes / (now - self._start) / 1e6
    share = f"{done / self._total:.0%} of the files, " if self._total else ""
    self._log(
      f"indexing: {share}{num_documents:,} documents, "
      f"{num_bytes / 1e6:,.0f} MB at {rate:.1f} MB/s"
    )


def is_heldout(digest: bytes, fraction: float) -> bool:
  """Whether a document is held out, by a hash of its text alone."""
  return int.from_bytes(digest[:8], "little") < fraction * 2**64


def document_digest(text: bytes) -> bytes:
  return hashlib.blake2b(text, digest_size=16).digest()


def read_all(
  files: Sequence[sources.Source],
  skips: Sequence[sources.Skip],
  text_field: str,
  tally: Tally,
  log,
) -> Iterator[sources.Document]:
  """Every document once, in order; the rest goes to `tally`.

  Raises: ValueError, at the latest at the end, where `tally` has too many.
  """
  progress = _Progress(sum(file.size for file in files), log)
  for skip in skips:
    tally.add(skip)
  done = num_bytes = 0
  for file in files:
    for record in sources.read_source(file, text_field):
      if isinstance(record, sources.Skip):
        tally.add(record)
        continue
      yield record
      tally.num_good += 1
      num_bytes += len(record.text)
      progress.show(done, num_bytes, tally.num_good)
    done += file.size
  tally.check()
