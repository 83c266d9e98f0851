"""How much disk and time an index will take, from a sample of its sources."""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
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
_BYTES = 1 << 24  # of text, of each: many blocks that decoders read ahead


class Estimate(NamedTuple):
  """Per byte of files as stored, but the first."""

  stored_bytes: int  # of all files
  text: float  # bytes of text
  documents: float
  disk: float  # bytes that an index takes while it is built
  seconds: float  # of one process

  def of_text(self) -> int:
    return round(self.text * self.stored_bytes)


def _sample(file: sources.Source, recipe: Any) -> Iterator[tuple[Any, int]]:
  """Documents of the start of a file, and its bytes read up to each."""
  if file.kind == "hf":
    return
  with remote.open_stored(file.path) as stored:
    opened = formats.open_source(
      file, stored, recipe.field, recipe.separator, recipe.turns
    )
    left = _BYTES
    for record in formats.read(opened, file.kind, file.compression):
      if not isinstance(record, sources.Skip):
        left -= len(record.text)
        yield record, opened.position()
      if left <= 0:
        return


def estimate(
  files: Sequence[sources.Source], recipe: Any, scratch: pathlib.Path
) -> Estimate | None:
  """Indexes a sample in a temporary directory in `scratch`.

  Args: recipe: an indexes.Recipe.
  Returns: None where the sample holds no text.
  """
  numbers = np.linspace(0, len(files) - 1, _FILES).astype(int)
  stored = text = documents = 0
  near = recipe.heldout_fraction > 0
  seconds = timed_bytes = 0.0
  with contextlib.ExitStack() as stack:
    directory = pathlib.Path(
      stack.enter_context(tempfile.TemporaryDirectory(dir=scratch))
    )
    writer = stack.enter_context(
      store.StoreWriter(
        directory / "sample",
        recipe.splitter,
        recipe.capacities,
        recipe.tokenizer,
        recipe.keep_documents,
      )
    )
    for turn, number in enumerate(sorted(set(numbers.tolist()))):
      at, start = 0, time.monotonic()
      # What cannot be read is told of when it is its turn.
      with contextlib.suppress(OSError, ValueError):
        for record, position in _sample(files[number], recipe):
          at = position
          digest = reading.document_digest(record.text)
          if near:
            near_copies.sketch(record.text)
          writer.add(record.name, record.text, digest)
          text += len(record.text)
          documents += 1
      stored += at
      if turn:  # the first one waits for compilers and the like
        seconds += time.monotonic() - start
        timed_bytes += at
    if not text or not stored:
      return None
    writer.finish()
    disk = sum(p.stat().st_size for p in (directory / "sample").iterdir())
  if near:
    disk += documents * 8 * near_copies.NUM_BANDS
    disk += text * recipe.heldout_fraction
  return Estimate(
    stored_bytes=sum(file.size for file in files),
    text=text / stored,
    documents=documents / stored,
    disk=disk / stored,
    seconds=seconds / max(timed_bytes, 1),
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
