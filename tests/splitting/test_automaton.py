"""The tables: minimal, named by a hash that does not move, and frozen."""

import json
import pathlib
import pickle

import numpy as np

from aunet_jax.splitting import automaton, unicode_table
from aunet_jax.splitting.splitter import Splitter

HERE = pathlib.Path(__file__).parents[1]


def test_tables_are_minimal():
  """No two rows answer every continuation alike: all pairs are told apart."""
  for names in ("word@1,word@2,word@4", "pretok", "anyscript@1"):
    tables = Splitter(names.split(",")).tables
    table = tables.rule_table.reshape(-1, tables.num_symbols)
    levels = table & automaton.MAX_LEVELS
    target = (table >> automaton.LEVEL_BITS) // tables.num_symbols
    apart = (levels[:, None] != levels[None]).any(axis=-1)
    for _ in range(len(table)):
      apart |= apart[target[:, None], target[None]].any(axis=-1)
    assert (apart | np.eye(len(table), dtype=bool)).all()


def test_the_hash_names_the_function():
  names = ["", "word@1", "word@2", "word@1,word@2", "pretok", "punct"]
  names += ["anyscript@1", "stride@4", "bytes"]
  hashes = {Splitter(n.split(",") if n else []).hash for n in names}
  assert len(hashes) == len(names)
  # The same function reached in two ways is the same function.
  assert Splitter(["bytes"]).hash == Splitter(["stride@1"]).hash
  assert Splitter(["word"]).hash == Splitter(["word@1"]).hash
  assert Splitter(["word@1", "word@2"]).hash != Splitter(["word@1"] * 2).hash


def test_the_hash_does_not_move():
  """A change here orphans every checkpoint: only for a new Unicode version."""
  recorded = json.loads((HERE / "golden" / "splitter_hashes.json").read_text())
  assert recorded["unicode_version"] == unicode_table.load_classes()[1]
  for names, value in recorded["hashes"].items():
    assert Splitter(names.split(",")).hash == value


def test_splitters_pickle():
  splitter = Splitter(["word@1", "word@2", "word@4"])
  again = pickle.loads(pickle.dumps(splitter))
  assert again.hash == splitter.hash and again.rules == splitter.rules
