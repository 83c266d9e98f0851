"""All documents of a list of sources, with what was skipped counted.

Also which documents are held out: a matter of their text alone, so that it
does not change with the order, the number or the names of files.
"""

import array
import functools
import hashlib
import json
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from aunet_jax.data import sources

_PROGRESS_SECONDS = 5.0


_EARLY_RECORDS = 1000  # records after which too many bad ones stop a build


def log_to_stderr(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def printable(text: str) -> str:
  """A file's name or the like, with what no terminal shows as escapes."""
  return "".join(
    c
    if c.isprintable()
    else c.encode("unicode_escape", "surrogatepass").decode()
    for c in text
  )


class SkipLog:
  """Counts skipped records, and logs the first ones of every reason."""

  def __init__(self, log):
    self.counts = Counter()
    self.first: list[sources.Skip] = []  # of every reason that loses text
    self._log = log

  def add(self, skip: sources.Skip) -> None:
    self.counts[skip.reason] += 1
    if skip.reason not in sources.HARMLESS:
      self._show(skip)

  def _show(self, skip: sources.Skip) -> None:
    if sum(skip.reason == shown.reason for shown in self.first) < 3:
      self.first.append(skip)
      self._log(f"skipped {self.examples[-1]}")

  @property
  def examples(self) -> list[str]:
    """A line for each of the first skips."""
    return [
      printable(f"{skip.where}: {skip.reason}: {skip.detail}")
      for skip in self.first
    ]

  def summary(self) -> str:
    """As "2 empty, 1 malformed JSON"."""
    return ", ".join(f"{count:,} {why}" for why, count in self.counts.items())

  def finish(self) -> None:
    """Logs the counts, where anything was lost."""
    if self.examples:
      self._log(f"skipped in all: {self.summary()}")


class _Sizes:
  """How large undamaged files are, stored and as text; 16 bytes a file."""

  def __init__(self):
    self._stored, self._text = array.array("q"), array.array("q")

  def add(self, stored_bytes: int, num_bytes: int) -> None:
    self._stored.append(stored_bytes)
    self._text.append(num_bytes)

  def extend(self, other: "_Sizes") -> None:
    self._stored += other._stored
    self._text += other._text

  def state(self) -> list[list[int]]:
    return [self._stored.tolist(), self._text.tolist()]

  @classmethod
  def of(cls, state: list[list[int]]) -> "_Sizes":
    sizes = cls()
    sizes._stored.extend(state[0])
    sizes._text.extend(state[1])
    return sizes

  @functools.cached_property
  def _sums(self) -> tuple[np.ndarray, np.ndarray, float]:
    """Sorted texts, the sum of each and all above it, text to stored."""
    text = np.sort(np.array(self._text, np.int64))
    above = np.cumsum(text[::-1])[::-1]
    ratio = text.sum() / max(sum(self._stored), 1) if len(text) else 1.0
    return text, above, ratio

  def missing(self, stored_bytes: int, num_bytes: int) -> int:
    """Text that is likely missing from a file that gave `num_bytes`."""
    text, above, ratio = self._sums
    first = np.searchsorted(text, num_bytes, side="right")
    if first < len(text):
      by_others = above[first] / (len(text) - first) - num_bytes
    else:
      by_others = num_bytes
    return round(max(by_others, stored_bytes * ratio - num_bytes))


class Tally(SkipLog):
  """Counts skipped records, says where they are, stops at too many.

  Too many are those above `max_fraction` of the records, or of the bytes of
  text. What is missing from a file that ends early or cannot be opened is
  estimated as what the undamaged files of its kind that hold more than was read
  of it hold more, on average, or from its size.
  """

  def __init__(self, path: pathlib.Path, max_fraction: float, log):
    """Args: max_fraction: 1.0 never stops, as for a part of the sources."""
    super().__init__(log)
    self.num_good = self.num_bytes = 0
    self.cut_documents = self.cut_bytes = 0  # that lost the left of a prompt
    self._max_fraction = max_fraction
    self._lost_bytes = 0  # as far as it is known
    self._short = []  # (kind, bytes stored, text read) of files that end early
    self._complete: dict[object, _Sizes] = {}  # of undamaged files, by kind
    self._file = open(path, "w")

  def add(self, skip: sources.Skip) -> None:
    super().add(skip)
    self._file.write(json.dumps(skip._asdict()) + "\n")
    self._lost_bytes += skip.lost_bytes or 0
    if self.num_good + self.counts.total() >= _EARLY_RECORDS:
      self._check_records()

  def add_left_out(self, skips: Sequence[sources.Skip]) -> None:
    """Takes in what the listing of sources left out."""
    for skip in skips:
      self.add(skip)
      if skip.lost_bytes is None:  # a directory
        self.add_file(None, 0, 0, ends_early=True)

  def add_file(
    self, kind, stored_bytes: int, num_bytes: int, ends_early: bool
  ) -> None:
    """Takes in that a file gave `num_bytes` of text.

    Args: kind: what makes files alike. ends_early: more is lost than `add` was
      told.
    """
    if ends_early:
      self._short.append((kind, stored_bytes, num_bytes))
    elif num_bytes:  # images and the like tell nothing of texts
      self._complete.setdefault(kind, _Sizes()).add(stored_bytes, num_bytes)

  def state(self) -> dict:
    """All that was counted, in JSON types; see `merge`."""
    return {
      "counts": dict(self.counts),
      "first": self.first,
      "num_good": self.num_good,
      "num_bytes": self.num_bytes,
      "cut_documents": self.cut_documents,
      "cut_bytes": self.cut_bytes,
      "lost_bytes": self._lost_bytes,
      "short": self._short,
      "complete": [[k, sizes.state()] for k, sizes in self._complete.items()],
    }

  def merge(self, state: dict) -> None:
    """Takes in what the tally of a part of the sources counted."""
    self.counts.update(state["counts"])
    for fields in state["first"]:
      self._show(sources.Skip(*fields))
    self.num_good += state["num_good"]
    self.num_bytes += state["num_bytes"]
    self.cut_documents += state["cut_documents"]
    self.cut_bytes += state["cut_bytes"]
    self._lost_bytes += state["lost_bytes"]
    # JSON makes lists of the tuples that kinds are.
    self._short += [(tuple(kind), *rest) for kind, *rest in state["short"]]
    for kind, sizes in state["complete"]:
      known = self._complete.setdefault(tuple(kind), _Sizes())
      known.extend(_Sizes.of(sizes))

  def check(self) -> None:
    """Raises: ValueError where too much was skipped."""
    self._check_records()
    known, every = self._complete, _Sizes()
    for sizes in known.values():
      every.extend(sizes)
    lost = sum(
      known.get(kind, every).missing(stored_bytes, num_bytes)
      for kind, stored_bytes, num_bytes in self._short
    )
    self._check_bytes(self._lost_bytes + lost, 0)

  def check_early(self, expected_bytes: int) -> None:
    """As `check`, for what is known before all of `expected_bytes` are read."""
    self._check_bytes(self._lost_bytes, expected_bytes)

  def check_parts(self, share: float) -> None:
    """As `check`, once about `share` of the sources was merged, in any order.

    It stops at what is too much for all of them, not for those alone.
    """
    self._check_bytes(self._lost_bytes, int(self.num_bytes / share))
    records = self.num_good + self.counts.total()
    self._check_records(int(records / share))

  def _check_bytes(self, lost: int, expected_bytes: int) -> None:
    total = max(lost + self.num_bytes, expected_bytes)
    if lost > self._max_fraction * total:
      raise ValueError(
        f"about {lost:,} of {total:,} bytes of text are lost, more than "
        f"{self._remedy()}"
      )

  def _check_records(self, expected: int = 0) -> None:
    bad = sum(
      n for why, n in self.counts.items() if why not in sources.HARMLESS
    )
    if bad > self._max_fraction * max(bad + self.num_good, expected):
      raise ValueError(
        f"{bad} of {bad + self.num_good} records cannot be used, more than "
        f"{self._remedy()}"
      )

  def _remedy(self) -> str:
    return (
      f"data.max_skip_fraction={self._max_fraction} allows. Repair the "
      "data or raise the setting. First ones:\n  " + "\n  ".join(self.examples)
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
  separator: str | None = None,
  turns=None,
) -> Iterator[sources.Document]:
  """Every document once, in order; the rest goes to `tally`.

  Raises: ValueError, at the latest at the end, where `tally` has too many.
  """
  total = sum(file.size for file in files)
  progress = _Progress(total, log)
  tally.add_left_out(skips)
  done = 0
  for file in files:
    before, ends_early = tally.num_bytes, False
    for record in sources.read_source(file, text_field, separator, turns):
      if isinstance(record, sources.Skip):
        tally.add(record)
        ends_early |= record.lost_bytes is None
        continue
      num_bytes = len(record.text)
      tally.cut_documents += record.cut_bytes > 0
      tally.cut_bytes += record.cut_bytes
      yield record
      del record
      tally.num_good += 1
      tally.num_bytes += num_bytes
      progress.show(done, tally.num_bytes, tally.num_good)
    done += file.size
    read = tally.num_bytes - before
    kind = file.kind, file.compression
    tally.add_file(kind, file.size, read, ends_early)
    if done:
      tally.check_early(tally.num_bytes * total // done)
  tally.check()
