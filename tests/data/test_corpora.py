"""The cache of indexes: which one is opened, and when one is built."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from toy_splitter import SpaceSplitter

from aunet_jax import config
from aunet_jax.data import corpora, store

SPLITTER = SpaceSplitter()
CAPACITIES = (24, 8, 4)


def write(path, texts):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps({"text": text}) for text in texts]
  path.write_text("\n".join(lines))
  return str(path)


def texts(count, word="x"):
  return [f"{word} {number}" * (1 + number % 5) for number in range(count)]


def open_corpora(tmp_path, train, lines=None, begun=(None, None), **settings):
  cfg = config.DataConfig(train=train, **{"heldout_fraction": 0.0, **settings})
  log = [].append if lines is None else lines.append
  return corpora.open_corpora(
    cfg, SPLITTER, CAPACITIES, tmp_path / "cache", log, *begun
  )


def indexes(tmp_path):
  return sorted((tmp_path / "cache").glob("*/index.json"))


# ----- what an index depends on ---------------------------------------------


class Named:
  def __init__(self, name):
    self.hash = name


def test_every_field_of_a_recipe_makes_another_index():
  recipe = corpora.Recipe(paths="a", splitter=SPLITTER, capacities=(8, 4, 2))
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
  assert len(indexes(tmp_path)) == 2


# ----- sources that change --------------------------------------------------


def test_touched_sources_are_compared_and_not_indexed_again(tmp_path):
  path = write(tmp_path / "a.jsonl", texts(20))
  first, _ = open_corpora(tmp_path, path, heldout_fraction=0.3)
  os.utime(path, ns=(1, 1))
  for expected in (["comparing its text"], []):
    lines = []
    again, _ = open_corpora(tmp_path, path, lines, heldout_fraction=0.3)
    assert again.fingerprint == first.fingerprint
    assert len(indexes(tmp_path)) == 1
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
  (index,) = indexes(tmp_path)
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
  (index,) = indexes(tmp_path)
  good = index.read_text()
  for content in ("", "[]", good[:-9], good.replace('"skipped": {}', '"s": 1')):
    index.write_text(content)
    with pytest.raises(ValueError, match="delete that directory to rebuild"):
      open_corpora(tmp_path, path)
  shutil.rmtree(index.parent)
  open_corpora(tmp_path, path)


# ----- held-out text --------------------------------------------------------


def test_empty_heldout_text_is_called_that(tmp_path):
  path = write(tmp_path / "a.jsonl", texts(20))
  (tmp_path / "empty.txt").write_text("")
  with pytest.raises(ValueError, match="no documents to hold out") as error:
    open_corpora(tmp_path, path, heldout=str(tmp_path / "empty.txt"))
  assert "empty.txt" in str(error.value)


def test_heldout_text_that_is_training_text_is_reported(tmp_path):
  path = write(tmp_path / "a.jsonl", ["aaaa", "bb", "c"])
  held = write(tmp_path / "held.jsonl", ["bb", "dddddd"])
  lines = []
  open_corpora(tmp_path, path, lines, heldout=held)
  (line,) = [line for line in lines if "training text" in line]
  assert "1 of 2 held-out documents (25.0% of their bytes)" in line
  other = write(tmp_path / "other.jsonl", ["e", "f"])
  lines = []
  open_corpora(tmp_path, path, lines, heldout=other)
  assert not any("training text" in line for line in lines)


def test_heldout_documents_that_fit_a_row_are_in_one_piece(tmp_path):
  some = [" ".join("abcd"[: n % 4 + 1] * (n % 7 + 1)) for n in range(60)]
  path = write(tmp_path / "a.jsonl", some)
  held = write(tmp_path / "held.jsonl", some)
  train, heldout = open_corpora(tmp_path, path, heldout=held)
  (fraction, part) = open_corpora(tmp_path, path, heldout_fraction=0.5)
  alone = corpora.open_text(
    path, SPLITTER, CAPACITIES, tmp_path / "cache", log=[].append
  )
  assert train.num_cuts > 0 and fraction.num_cuts > 0
  for corpus in (heldout, part, alone):
    sizes = [
      np.array(
        [len(text) + 1]
        + [1 + (SPLITTER.levels(text) >= i).sum() for i in (1, 2)]
      )
      for _, text in corpus.documents()
    ]
    cut = [(size > CAPACITIES).any() for size in sizes]
    pieces = [0] * corpus.num_documents
    for index in range(corpus.num_rows):
      for piece in corpus.stores[0].pieces(index):
        pieces[piece.document] += 1
    assert [count > 1 for count in pieces] == cut
