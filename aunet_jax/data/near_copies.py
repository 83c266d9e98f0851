"""Near copies: documents that may be held out only with those much like them.

A document falls to the held-out side by a hash of its text. Where one much like
it trains, that would measure memory. So documents that fall there wait until
all are read, and those with a near copy among the others, or among documents
that have one, are given back to train.

Likeness is the share of common runs of five words, estimated by MinHash
(Broder 1997) as for FineWeb (arXiv 2406.17557, section 3.4): 112 hashes in 14
bands of 8, and documents that agree in a band are near copies. So 99% of the
pairs that share 85% of their runs are found, 92% at 80%, 56% at 70%, 5% at
half. Words are compared without case and punctuation; each character of a
script without spaces is a word.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from aunet_jax.compiled import compiled
from aunet_jax.data.reading import is_heldout

VERSION = 1  # raise it when other documents would be near copies

NUM_BANDS = 14
NUM_HASHES = 8 * NUM_BANDS
_BLOCK = 512  # documents whose bands are written together
_BLOCKS_AT_ONCE = 512


def _hash_factors() -> np.ndarray:
  """uint32 (2, NUM_HASHES): a hash takes value to value * odd + shift."""
  numbers = hashlib.shake_128(b"near copies").digest(8 * NUM_HASHES)
  factors_2H = np.frombuffer(numbers, "<u4").astype(np.uint32)
  factors_2H = factors_2H.reshape(2, NUM_HASHES)
  factors_2H[0] |= 1
  return factors_2H


def _byte_kinds() -> np.ndarray:
  """What a byte is in a word: 0 = between words, else itself in lower case."""
  kinds = np.zeros(256, np.uint8)
  for byte in range(256):
    if byte >= 0x80 or chr(byte).isalnum():
      kinds[byte] = ord(chr(byte).lower()) if byte < 0x80 else byte
  return kinds


_FACTORS = _hash_factors()
_KINDS = _byte_kinds()


@compiled
def _fill_bands(text_N, kinds_256, factors_2H, least_H, band_B):
  """Hashes the least hashes of all runs of five words into `band_B`.

  Four empty words come before the text, so the shortest has a run. Returns
  whether there is a word. Overwrites `least_H`.
  """
  prime, spread = np.uint64(0x100000001B3), np.uint64(0x9E3779B97F4A7C15)
  leaving = spread * spread * spread * spread * spread
  odd_H, shift_H = factors_2H[0], factors_2H[1]
  words = np.zeros(5, np.uint64)
  run, word, place = np.uint64(0), np.uint64(0), 0
  least_H[:] = np.uint32(0xFFFFFFFF)
  size = len(text_N)
  for at in range(size + 1):
    byte = text_N[at] if at < size else np.uint8(0)
    kind = kinds_256[byte]
    # A character of three bytes or more stands for a word.
    if word != 0 and (kind == 0 or byte >= 0xE0):
      run = run * spread + word - words[place] * leaving
      words[place] = word
      place = 0 if place == 4 else place + 1
      mixed = (run ^ (run >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
      value = np.uint32(mixed >> np.uint64(32))
      for index in range(len(least_H)):
        hashed = np.uint32(value * odd_H[index] + shift_H[index])
        least_H[index] = min(least_H[index], hashed)
      word = np.uint64(0)
    if kind != 0:
      word = (word ^ np.uint64(kind)) * prime + np.uint64(1)
  rows = len(least_H) // len(band_B)
  for band in range(len(band_B)):
    mixed = np.uint64(band)
    for index in range(band * rows, band * rows + rows):
      mixed = (mixed ^ np.uint64(least_H[index])) * spread
      mixed ^= mixed >> np.uint64(29)
    band_B[band] = mixed
  return run != 0


def sketch(text: bytes) -> np.ndarray:
  """uint64 (NUM_BANDS,): near copies agree in one, as a rule.

  A text without a word is only like an exact copy.
  """
  band_B = np.empty(NUM_BANDS, np.uint64)
  text_N = np.frombuffer(text, np.uint8)
  least_H = np.empty(NUM_HASHES, np.uint32)
  if not _fill_bands(text_N, _KINDS, _FACTORS, least_H, band_B):
    digest = hashlib.blake2b(text, digest_size=8).digest()
    band_B[:] = int.from_bytes(digest, "little")
  return band_B


class Sketches(NamedTuple):
  """Sketches in a file that is finished, read band by band."""

  path: pathlib.Path
  num: int

  def band(self, number: int) -> Iterator[np.ndarray]:
    """uint64 (N,) of the documents in order, some at a time."""
    for first in range(0, self.num, _BLOCK * _BLOCKS_AT_ONCE):
      blocks = np.memmap(self.path, np.uint64, mode="r")
      blocks = blocks.reshape(-1, NUM_BANDS, _BLOCK)[first // _BLOCK :]
      found = blocks[:_BLOCKS_AT_ONCE, number].reshape(-1)
      yield found[: self.num - first]


class SketchWriter:
  """Writes sketches one by one."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._file = open(path, "wb")
    self._block_BN = np.zeros((NUM_BANDS, _BLOCK), np.uint64)
    self.num = 0

  def add(self, band_B: np.ndarray) -> None:
    at = self.num % _BLOCK
    self._block_BN[:, at] = band_B
    self.num += 1
    if at == _BLOCK - 1:
      self._file.write(self._block_BN.data)

  def close(self) -> None:
    self._file.close()

  def finish(self) -> Sketches:
    """Ends the writing, with everything safely on disk."""
    if self.num % _BLOCK:
      self._file.write(self._block_BN.data)
    _close_safely(self._file)
    return Sketches(self._path, self.num)


def _close_safely(file) -> None:
  file.flush()
  os.fsync(file.fileno())
  file.close()


class Held(NamedTuple):
  name: str
  text: bytes
  digest: bytes
  trains: bool  # since a near copy of it does


class Waited(NamedTuple):
  """A directory of documents that wait, and the sketches of all others."""

  directory: pathlib.Path
  waiting: Sketches
  training: Sketches

  @classmethod
  def of(
    cls, directory: pathlib.Path, num_waiting: int, num_training: int
  ) -> "Waited":
    return cls(
      directory,
      Sketches(directory / "waiting.sketches", num_waiting),
      Sketches(directory / "training.sketches", num_training),
    )

  def held(self, near_N: np.ndarray) -> Iterator[Held]:
    """The documents in order. Args: near_N: see `near_training`."""
    with (
      open(self.directory / "waiting.texts", "rb") as texts,
      open(self.directory / "waiting.jsonl") as names,
    ):
      for line, trains in zip(names, near_N, strict=True):
        name, size, digest = json.loads(line)
        text = texts.read(size)
        yield Held(name, text, bytes.fromhex(digest), bool(trains))
        del text


class Sides:
  """Puts every document on one side: training, or held out.

  Used as a context. Give it every document with `waits`; then `decided` gives
  those that waited, or `finish` leaves them for later.

  Attributes:
    near_copies: documents, and bytes of them, that train since a near copy
      does; known when `decided` ends.
  """

  def __init__(self, directory: pathlib.Path, fraction: float):
    """Args: directory: to make. fraction: see `is_heldout`."""
    self._fraction = fraction
    self._directory = directory
    self.near_copies = Counter()
    directory.mkdir(parents=True)
    with contextlib.ExitStack() as stack:

      def opened(make, name, *mode):
        file = make(directory / name, *mode)
        return stack.enter_context(contextlib.closing(file))

      self._training = opened(SketchWriter, "training.sketches")
      self._waiting = opened(SketchWriter, "waiting.sketches")
      self._texts = opened(open, "waiting.texts", "wb")
      self._names = opened(open, "waiting.jsonl", "w")
      self._stack = stack.pop_all()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._stack.close()

  def waits(self, name: str, text: bytes, digest: bytes) -> bool:
    """Keeps a document that may be held out; any other is to train on."""
    waits = is_heldout(digest, self._fraction)
    if self._fraction:
      (self._waiting if waits else self._training).add(sketch(text))
    if waits:
      self._texts.write(text)
      self._names.write(json.dumps([name, len(text), digest.hex()]) + "\n")
    return waits

  def finish(self) -> Waited:
    """Ends the taking, with everything safely on disk."""
    waiting, training = self._waiting.finish(), self._training.finish()
    _close_safely(self._texts)
    _close_safely(self._names)
    return Waited(self._directory, waiting, training)

  def decided(self) -> Iterator[Held]:
    """The documents that waited, in order; removes the directory."""
    waited = self.finish()
    near_N = near_training([waited.waiting], [waited.training])
    for held in waited.held(near_N):
      if held.trains:
        self.near_copies.update(documents=1, bytes=len(held.text))
      yield held
      del held
    shutil.rmtree(self._directory)


def report(near_copies: Counter, num_heldout: int) -> str:
  """Says what is in training since a near copy of it is.

  Args: num_heldout: documents that are held out.
  """
  count = near_copies["documents"]
  return (
    f"near copies: {count:,} of {count + num_heldout:,} documents that would "
    f"be held out ({near_copies['bytes']:,} bytes) train instead, since a near "
    f"copy of each does."
  )


class _InBand(NamedTuple):
  """What one band tells of the documents that wait."""

  near_N: np.ndarray  # bool: agrees with one that trains
  again: np.ndarray  # numbers of documents that agree with an earlier one
  first: np.ndarray  # the number of that one


def _in_band(
  waiting: Sequence[Sketches], training: Sequence[Sketches], band: int
) -> _InBand:
  all_N = np.concatenate([b for file in waiting for b in file.band(band)])
  keys, first, key_N = np.unique(all_N, return_index=True, return_inverse=True)
  seen = np.zeros(len(keys), np.bool_)
  for file in training:
    for block in file.band(band):
      at = np.minimum(np.searchsorted(keys, block), len(keys) - 1)
      seen[at[keys[at] == block]] = True
  again = np.flatnonzero(first[key_N] != np.arange(len(all_N)))
  return _InBand(seen[key_N], again, first[key_N[again]])


def near_training(
  waiting: Sequence[Sketches], training: Sequence[Sketches], run=map
) -> np.ndarray:
  """bool (N,): whether a chain of near copies leads to training.

  Args:
    waiting, training: of the documents of every part, in order.
    run: as `map`; it may work on several bands at once.
  """
  near_N = np.zeros(sum(file.num for file in waiting), np.bool_)
  if not len(near_N):
    return near_N
  look = functools.partial(_in_band, waiting, training)
  ones, others = [], []
  for found in run(look, range(NUM_BANDS)):
    near_N |= found.near_N
    ones.append(found.again)
    others.append(found.first)
  if not near_N.any():
    return near_N
  # Half a second to import, for corpora that hold near copies.
  from scipy.sparse import coo_array
  from scipy.sparse.csgraph import connected_components

  edges = np.concatenate(ones), np.concatenate(others)
  pairs = coo_array(
    (np.ones(len(edges[0]), np.bool_), edges), [len(near_N)] * 2
  )
  count, group_N = connected_components(pairs, directed=False)
  near_G = np.zeros(count, np.bool_)
  near_G[group_N[near_N]] = True
  return near_G[group_N]
