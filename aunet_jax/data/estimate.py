"""How much disk and time an index will take, from a sample of its sources."""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aunet_jax.data import (
  formats,
  near_copies,
  reading,
  remote,
  sources,
  store,
)

_FILES = 8  # that are sampled, spread over all
_BYTES = 1 << 21  # of text, of each


class Estimate(NamedTuple):
  """Per byte of files as stored, but the first."""

  stored_bytes: int  # of all files
  text: float  # bytes of text
  documents: float
  disk: float  # bytes that an index takes while it is built
  seconds: float  # of one process

  def of_text(self) -> int:
    return round(self.text * self.stored_bytes)


def _sample(
  file: sources.Source, recipe: Any, take: Callable[[Any], None]
) -> np.ndarray:
  """Gives `take` documents of the start of a file.

  Returns: int64 (3,): bytes of the file, and of text, and documents, that
    belong together: a decoder that reads ahead has read more than it gave.
  """
  with remote.open_stored(file.path) as stored:
    opened = formats.open_source(
      file, stored, recipe.field, recipe.separator, recipe.turns
    )
    sizes, positions = [], []
    for record in formats.read(opened, file.kind, file.compression):
      if isinstance(record, sources.Skip):
        continue
      take(record)
      sizes.append(len(record.text))
      positions.append(opened.position())
      if sum(sizes) > _BYTES:
        break
    else:
      return np.array([file.size, sum(sizes), len(sizes)])
  between = positions[-1] - positions[0]
  if not between:
    return np.array([positions[-1], sum(sizes), len(sizes)])
  return np.array([between, sum(sizes[1:]), len(sizes) - 1])


def estimate(files: Sequence[sources.Source], recipe: Any) -> Estimate | None:
  """Indexes a sample in a temporary directory.

  Args: recipe: an indexes.Recipe.
  Returns: None where the sample holds no text.
  """
  chosen = np.linspace(0, len(files) - 1, _FILES).astype(int)
  found_3 = np.zeros(3, np.int64)  # see _sample
  near = recipe.heldout_fraction > 0
  seconds, timed = 0.0, 0
  with contextlib.ExitStack() as stack:
    directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    writer = stack.enter_context(
      store.StoreWriter(
        directory / "sample",
        recipe.splitter,
        recipe.capacities,
        recipe.tokenizer,
        recipe.keep_documents,
      )
    )

    def take(record):
      if near:
        near_copies.sketch(record.text)
      digest = reading.document_digest(record.text)
      writer.add(record.name, record.text, digest)

    for turn, number in enumerate(sorted(set(chosen.tolist()))):
      start, before = time.monotonic(), writer.num_bytes
      # What cannot be read is told of when it is its turn.
      with contextlib.suppress(OSError, ValueError):
        if files[number].kind != "hf":
          found_3 += _sample(files[number], recipe, take)
      if turn:  # the first one waits for compilers and the like
        seconds += time.monotonic() - start
        timed += writer.num_bytes - before
    stored, text, documents = found_3.tolist()
    if not text or not stored:
      return None
    writer.finish()
    size = sum(p.stat().st_size for p in (directory / "sample").iterdir())
  disk = size / writer.num_bytes * text
  if near:
    disk += documents * 8 * near_copies.NUM_BANDS
    disk += text * recipe.heldout_fraction
  return Estimate(
    stored_bytes=sum(file.size for file in files),
    text=text / stored,
    documents=documents / stored,
    disk=disk / stored,
    seconds=seconds / max(timed, 1) * text / stored,
  )


def check_disk(needed: float, directory: pathlib.Path, what: str) -> None:
  """Raises: ValueError where a directory has less room than is needed."""
  free = shutil.disk_usage(directory).free
  if needed > free:
    raise ValueError(
      f"the index of {what} will take about {needed / 1e9:,.1f} GB, and "
      f"{directory} has {free / 1e9:,.1f} GB free; make room there, or name "
      f"another directory (data.cache_dir; --index of prepare)."
    )
