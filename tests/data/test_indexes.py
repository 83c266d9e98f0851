"""Indexes: what they depend on, when one is built, and by whom."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from toy_corpora import (
  CAPACITIES,
  SPLITTER,
  different,
  open_corpora,
  open_texts,
  texts,
  write,
)
from toy_splitter import SpaceSplitter

from aunet_jax.data import conversations, corpora, indexes, store

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(TESTS))


def built(tmp_path):
  return sorted((tmp_path / "cache").glob("*/index.json"))


def all_rows(corpus):
  rows = map(corpus.row, range(corpus.num_rows))
  return [[row[name].tolist() for name in sorted(row)] for row in rows]


# ----- what an index depends on ---------------------------------------------


class Named:
  def __init__(self, name):
    self.hash = name


def test_every_field_of_a_recipe_makes_another_index():
  recipe = indexes.Recipe(paths="a", splitter=SPLITTER, capacities=(8, 4, 2))
  others = {
    "paths": ("a", "b"),
    "splitter": Named("another"),
    "capacities": (8, 4, 1),
    "tokenizer": Named("tokens"),
    "text_field": "content",
    "separator": "line",
    "heldout_fraction": 0.5,
    "max_skip_fraction": 0.5,
    "keep_documents": True,
    "turns": conversations.Reader(None, "p", "c", SPLITTER, (8, 4, 2)),
  }
  fields = {field.name for field in dataclasses.fields(recipe)}
  assert fields - {"purpose"} == set(others)
  keys = {
    dataclasses.replace(recipe, **{name: value}).key
    for name, value in others.items()
  }
  assert len(keys | {recipe.key}) == len(others) + 1
  assert dataclasses.replace(recipe, purpose="to read").key == recipe.key


def test_another_text_field_is_another_corpus(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps({"text": "one", "body": "another"}))
  first, _ = open_corpora(tmp_path, str(path))
  second, _ = open_corpora(tmp_path, str(path), text_field="body")
  assert [t for _, t in first.documents()] == [b"one"]
  assert [t for _, t in second.documents()] == [b"another"]


def test_a_separator_cuts_text_files_and_makes_another_corpus(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("one\n\ntwo\n")
  first, _ = open_corpora(tmp_path, str(path))
  second, _ = open_corpora(tmp_path, str(path), separator="blank_line")
  assert [t for _, t in first.documents()] == [b"one\n\ntwo\n"]
  assert [t for _, t in second.documents()] == [b"one", b"two"]
  os.utime(path, (1, 1))  # the same text is compared with the same separator
  again, _ = open_corpora(tmp_path, str(path), separator="blank_line")
  assert again.fingerprint == second.fingerprint
  assert len(built(tmp_path)) == 2


# ----- sources that change --------------------------------------------------


def test_touched_sources_are_compared_and_not_indexed_again(tmp_path):
  path = write(tmp_path / "a.jsonl", texts(20))
  first, _ = open_corpora(tmp_path, path, heldout_fraction=0.3)
  os.utime(path, ns=(1, 1))
  for expected in (["comparing its text"], []):
    lines = []
    again, _ = open_corpora(tmp_path, path, lines, heldout_fraction=0.3)
    assert again.fingerprint == first.fingerprint
    assert len(built(tmp_path)) == 1
    assert not any("indexing" in line for line in lines)
    for part in expected:
      assert any(part in line for line in lines)


def test_text_of_the_same_size_is_another_corpus(tmp_path):
  path = write(tmp_path / "a.jsonl", texts(20, "x"))
  first, _ = open_corpora(tmp_path, path)
  write(tmp_path / "a.jsonl", texts(20, "y"))
  os.utime(path, ns=(1, 1))
  second, _ = open_corpora(tmp_path, path)
  assert second.fingerprint != first.fingerprint
  assert next(second.documents())[1] == b"y 0"


def test_sources_that_are_gone_leave_their_index(tmp_path):
  path = write(tmp_path / "a.jsonl", texts(20))
  held = write(tmp_path / "held.jsonl", texts(5, "held"))
  first, heldout = open_corpora(tmp_path, path, heldout=held)
  os.unlink(path)
  os.unlink(held)
  lines = []
  again, same = open_corpora(tmp_path, path, lines, heldout=held)
  assert again.fingerprint == first.fingerprint
  assert same.fingerprint == heldout.fingerprint
  assert any("matches no file" in line and "index" in line for line in lines)
  with pytest.raises(ValueError, match="matches no file"):  # no index of these
    open_corpora(tmp_path, path, text_field="other")


@pytest.mark.parametrize("mixture", [False, True])
def test_a_run_goes_on_with_the_index_it_began_with(tmp_path, mixture):
  one = write(tmp_path / "one.jsonl", texts(20, "one"))
  two = write(tmp_path / "two.jsonl", texts(30, "two"))
  held = write(tmp_path / "held.jsonl", texts(5, "held"))
  train = one
  if mixture:
    train = [{"path": one, "weight": 1}, {"path": two, "weight": 2}]
  first, heldout = open_corpora(tmp_path, train, heldout=held)
  begun = (first.fingerprint, heldout.fingerprint)
  for change in (
    lambda: write(tmp_path / "one.jsonl", texts(25, "three")),
    lambda: write(tmp_path / "held.jsonl", texts(9, "three")),
    lambda: os.unlink(one),
  ):
    change()
    lines = []
    again, same = open_corpora(tmp_path, train, lines, begun, heldout=held)
    assert (again.fingerprint, same.fingerprint) == begun
    assert not any("indexing" in line for line in lines)
  write(tmp_path / "one.jsonl", texts(25, "three"))
  new, _ = open_corpora(tmp_path, train, heldout=held)  # another run
  assert new.fingerprint != first.fingerprint


def test_a_run_goes_on_with_an_index_of_the_format_before(tmp_path):
  path = write(tmp_path / "a.jsonl", texts(20))
  first, _ = open_corpora(tmp_path, path)
  documents = list(first.documents())
  (index,) = built(tmp_path)
  directory = index.parent
  summary = store.read_json(directory / "train" / "summary.json")
  summary = {
    name: value
    for name, value in summary.items()
    if name not in ("files", "content", "checksum_of_checksums")
  }
  summary |= {"format": 2, "fingerprint": "as it was"}
  (directory / "train" / "summary.json").write_text(json.dumps(summary))
  (directory / "train" / "checksums.bin").unlink()
  (directory / "train" / "digests.bin").unlink()
  index.unlink()
  (directory / "skipped_counts.json").write_text('{"empty": 2}')
  directory.rename(tmp_path / "cache" / "0123456789abcdef")
  fingerprint = corpora.Corpus(
    (store.Store(tmp_path / "cache/0123456789abcdef/train", SPLITTER),),
    None,
    {},
  ).fingerprint
  lines = []
  again, _ = open_corpora(tmp_path, path, lines, (fingerprint, None))
  assert again.fingerprint == fingerprint
  assert again.skipped == {"empty": 2}
  assert list(again.documents()) == documents
  assert not any("indexing" in line for line in lines)
  new, _ = open_corpora(tmp_path, path, lines)  # another run
  assert any("indexing" in line for line in lines)
  assert new.fingerprint == first.fingerprint


def test_a_damaged_index_file_says_what_to_do(tmp_path):
  path = write(tmp_path / "a.jsonl", texts(20))
  open_corpora(tmp_path, path)
  (index,) = built(tmp_path)
  good = index.read_text()
  for content in ("", "[]", good[:-9], good.replace('"skipped": {}', '"s": 1')):
    index.write_text(content)
    with pytest.raises(ValueError, match="delete that directory to rebuild"):
      open_corpora(tmp_path, path)
  shutil.rmtree(index.parent)
  open_corpora(tmp_path, path)


# ----- the cache ------------------------------------------------------------


def test_a_write_that_fails_names_where(tmp_path, monkeypatch):
  def full(self):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(store.StoreWriter, "finish", full)
  path = write(tmp_path / "texts.jsonl", different(5))
  with pytest.raises(OSError, match="No space left on device: .*partial"):
    open_corpora(tmp_path, path)
  assert list((tmp_path / "cache").glob("*.partial")) == []


def test_the_cache_is_built_once_and_tells_what_it_holds(tmp_path):
  lines = []
  path = write(tmp_path / "texts.jsonl", different(50))
  first, _ = open_corpora(tmp_path, path, lines)
  assert any("indexed in" in line for line in lines)
  lines.clear()
  second, _ = open_corpora(tmp_path, path, lines)
  assert not any("index" in line for line in lines)
  assert first.fingerprint == second.fingerprint
  assert first.num_documents == 50
  assert first.num_bytes == sum(map(len, different(50)))
  assert first.splitter_hash == "spaces"
  pieces = sum(len(first.stores[0].pieces(i)) for i in range(first.num_rows))
  assert first.num_cuts == pieces - 50
  real = [first.row(i)["weights"].sum() for i in range(first.num_rows)]
  assert first.fill[0] == sum(real) / (first.num_rows * CAPACITIES[0])
  names = [name for name, _ in first.documents()]
  assert names[0] == f"{path}:1"
  again = pickle.loads(pickle.dumps(first))  # as worker processes get it
  np.testing.assert_array_equal(again.row(3)["bytes"], first.row(3)["bytes"])


def test_changed_files_rules_or_capacities_build_again(tmp_path):
  corpus, _ = open_texts(tmp_path, different(20))
  prints = {corpus.fingerprint}
  texts = different(20)
  texts[7] = "another text"
  prints.add(open_texts(tmp_path, texts)[0].fingerprint)

  class Other(SpaceSplitter):
    hash = "other"

  path = str(tmp_path / "texts.jsonl")  # as it is: now only the rest differs
  for splitter, capacities in (
    (Other(), CAPACITIES),
    (SPLITTER, (32, 8, 4)),
  ):
    corpus, _ = open_corpora(
      tmp_path, path, splitter=splitter, capacities=capacities
    )
    assert corpus.capacities == capacities
    assert corpus.splitter_hash == splitter.hash
    prints.add(corpus.fingerprint)
  assert len(prints) == 4


def test_a_file_deleted_after_indexing_does_not_matter(tmp_path):
  corpus, _ = open_texts(tmp_path, different(20))
  expected = all_rows(corpus)
  (tmp_path / "texts.jsonl").unlink()
  assert all_rows(corpus) == expected


@pytest.mark.parametrize(
  "name",
  ["text.bin", "pieces.bin", "rows.bin", "documents.bin", "summary.json"],
)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_damaged_cache_is_refused(tmp_path, name, keep):
  open_texts(tmp_path, different(20))
  (path,) = (tmp_path / "cache").glob(f"*/train/{name}")
  whole = path.read_bytes()
  path.write_bytes(whole[: int(keep * len(whole))])
  with pytest.raises(ValueError, match="delete that directory to rebuild"):
    open_corpora(tmp_path, train=str(tmp_path / "texts.jsonl"))


BUILD = textwrap.dedent("""
  import sys, pathlib
  from toy_splitter import SpaceSplitter
  from aunet_jax import config
  from aunet_jax.data import corpora

  def log(line):
    print(line, flush=True)
    if "skipped" in line and "--hang" in sys.argv:
      print("middle", flush=True)
      sys.stdin.read()

  cfg = config.DataConfig(
    train=sys.argv[1], heldout_fraction=0.0, max_skip_fraction=0.5
  )
  corpus, _ = corpora.open_corpora(
    cfg, SpaceSplitter(), (24, 8, 4), sys.argv[2], log
  )
  print(corpus.fingerprint)
""")


def _start_build(tmp_path, *arguments):
  path = os.pathsep.join([TESTS, ROOT])
  return subprocess.Popen(
    [
      sys.executable,
      "-c",
      BUILD,
      str(tmp_path / "texts.jsonl"),
      str(tmp_path / "cache"),
      *arguments,
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
  )


def _read_until(process, word):
  for line in process.stdout:
    if word in line:
      return
  raise AssertionError(f"the build ended without saying {word!r}")


def _write_with_fault(tmp_path):
  """Texts with a bad line late in the file, at which BUILD can wait."""
  path = write(tmp_path / "texts.jsonl", different(50))
  with open(path, "a") as file:
    file.write("\nnot JSON\n" + json.dumps({"text": "the last"}) + "\n")
  corpus, _ = open_corpora(tmp_path / "fresh", path, max_skip_fraction=0.5)
  assert corpus.num_documents == 51
  return corpus.fingerprint


def test_a_build_that_is_killed_leaves_nothing_that_is_used(tmp_path):
  fingerprint = _write_with_fault(tmp_path)
  killed = _start_build(tmp_path, "--hang")
  _read_until(killed, "middle")
  waiting = _start_build(tmp_path)
  _read_until(waiting, "waiting")
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  output, _ = waiting.communicate()
  assert output.split()[-1] == fingerprint
  assert not list((tmp_path / "cache").glob("*.partial"))


def test_of_two_processes_one_builds_and_one_waits(tmp_path):
  fingerprint = _write_with_fault(tmp_path)
  builder = _start_build(tmp_path, "--hang")
  _read_until(builder, "middle")
  waiting = _start_build(tmp_path)
  _read_until(waiting, "waiting")
  assert waiting.poll() is None
  output, _ = builder.communicate()  # which ends the wait in the middle
  assert output.split()[-1] == fingerprint
  output, _ = waiting.communicate()
  assert output.split()[-1] == fingerprint
  assert "index" not in output
