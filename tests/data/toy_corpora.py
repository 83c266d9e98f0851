"""Small corpora for the tests of the data pipeline."""

import json

import numpy as np
from toy_splitter import SpaceSplitter

from aunet_jax import config
from aunet_jax.data import building, corpora

SPLITTER = SpaceSplitter()
CAPACITIES = (24, 8, 4)


def write(path, texts):
  """A JSONL file of texts; returns its name."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
  return str(path)


def texts(count, word="x"):
  """`count` short texts, some of which are alike."""
  return [f"{word} {number}" * (1 + number % 5) for number in range(count)]


def different(count, seed=0):
  """`count` texts that all differ, of one word to several rows."""
  rng = np.random.default_rng(seed)
  return [
    " ".join([f"{seed}{number:03d}"] * rng.integers(1, 20))
    for number in range(count)
  ]


def open_corpora(
  tmp_path,
  train,
  lines=None,
  begun=(None, None),
  splitter=SPLITTER,
  capacities=CAPACITIES,
  **settings,
):
  """Corpora of `data.train`; nothing is held out unless asked."""
  cfg = config.DataConfig(train=train, **{"heldout_fraction": 0.0, **settings})
  log = [].append if lines is None else lines.append
  return corpora.open_corpora(
    cfg, splitter, capacities, tmp_path / "cache", log, *begun
  )


def open_texts(tmp_path, some, **settings):
  return open_corpora(
    tmp_path, write(tmp_path / "texts.jsonl", some), **settings
  )


# Of the sources that conftest.py makes.
IN_PARTS = {"heldout_fraction": 0.3, "max_skip_fraction": 0.5}


def build_in_parts(directory, **how):
  """Builds the index of `directory`; whether all of it is there."""
  cfg = config.DataConfig(train=str(directory / "texts"), **IN_PARTS)
  return corpora.build_indexes(
    cfg, SPLITTER, CAPACITIES, directory / "cache", building.How(**how), print
  )


def content(directory):
  """Every file below the cache but locks, by name."""
  cache = directory / "cache"
  return {
    str(path.relative_to(cache)): path.read_bytes()
    for path in cache.rglob("*")
    if path.is_file() and path.suffix != ".lock"
  }
