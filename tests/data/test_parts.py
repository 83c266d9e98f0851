"""Indexes in parts: who builds them, in what order, and what stops, is no
matter; what they hold is what one process would have found."""

import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_corpora import (
  CAPACITIES,
  IN_PARTS,
  SPLITTER,
  build_in_parts,
  content,
  open_corpora,
  write,
)

from aunet_jax.data import (
  blocks,
  estimate,
  packing,
  parts,
  store,
)
from aunet_jax.data.records import Source


def of_sizes(sizes):
  return [
    Source(str(n), "text", None, size, "") for n, size in enumerate(sizes)
  ]


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 50))
def test_parts_are_all_files_in_order_and_none_is_small(sizes, least):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parts, "PART_BYTES", least)
    patch.setattr(parts, "MOST_PARTS", 7)
    found = parts.cut(of_sizes(sizes))
  assert [file for part in found for file in part] == of_sizes(sizes)
  assert 1 <= len(found) <= 7
  for part in found[:-1]:
    total = sum(file.size for file in part)
    assert total >= least > total - part[-1].size or sum(sizes) > 7 * least


def opened(directory, lines=None, **settings):
  return open_corpora(
    directory, str(directory / "texts"), lines, **{**IN_PARTS, **settings}
  )


def everything(corpus):
  return list(corpus.documents())


def test_parts_hold_what_one_piece_holds(directory, monkeypatch):
  train, heldout = opened(directory)
  (index,) = (directory / "cache").glob("*/index.json")
  assert len(list((index.parent / "train").glob("0000?"))) == 4
  assert list((index.parent / "train").glob("*.near"))
  skipped = (index.parent / "skipped.jsonl").read_text()
  monkeypatch.setattr(parts, "PART_BYTES", 1 << 40)
  other = directory / "other"
  whole, whole_heldout = open_corpora(
    other, str(directory / "texts"), **IN_PARTS
  )
  (index,) = (other / "cache").glob("*/index.json")
  assert (index.parent / "skipped.jsonl").read_text() == skipped
  assert everything(train) == everything(whole)
  assert everything(heldout) == everything(whole_heldout)
  assert train.skipped == whole.skipped and train.skipped["malformed JSON"] == 3
  for one, other in ((train, whole), (heldout, whole_heldout)):
    assert one.num_bytes == other.num_bytes
    assert one.num_documents == other.num_documents
    np.testing.assert_array_equal(
      one.stores[0].sizes(), other.stores[0].sizes()
    )
    digests = [list(c.stores[0].digests()) for c in (one, other)]
    np.testing.assert_array_equal(*map(np.concatenate, digests))


def test_every_part_is_packed_on_its_own(directory):
  train, _ = opened(directory, heldout_fraction=0.0)
  expected, texts = [], dict(everything(train))
  for first in range(0, 8, 2):
    mine = [
      text
      for name, text in texts.items()
      if int(os.path.basename(name)[0]) in (first, first + 1)
    ]
    expected += packing.pack_documents(mine, SPLITTER, CAPACITIES)
  assert train.num_rows == len(expected)
  for number, row in enumerate(expected):
    found = train.row(number)
    for name, array in row.items():
      np.testing.assert_array_equal(found[name], array, err_msg=name)
  with pytest.raises(IndexError):
    train.row(train.num_rows)


def test_shares_make_the_same_files(directory):
  assert build_in_parts(directory)
  expected = content(directory)
  shutil.rmtree(directory / "cache")
  for number in (2, 0):
    assert not build_in_parts(directory, share=(number, 3))
  assert not list((directory / "cache").glob("*/index.json"))
  assert build_in_parts(directory, share=(1, 3))
  assert content(directory) == expected
  assert build_in_parts(directory, share=(0, 3))  # all is there


@pytest.mark.parametrize("seed", range(3))
def test_a_build_goes_on_where_it_was_stopped(directory, monkeypatch, seed):
  assert build_in_parts(directory)
  expected = content(directory)
  shutil.rmtree(directory / "cache")
  rng = np.random.default_rng(seed)

  class Killed(BaseException):
    pass

  def dying(real):
    def call(*args, **kwargs):
      nonlocal left
      left -= 1
      if left < 0:
        raise Killed
      return real(*args, **kwargs)

    return call

  monkeypatch.setattr(estimate, "_FILES", 1)
  monkeypatch.setattr(estimate, "_BYTES", 1)
  left = 0
  for module, name in (
    (blocks.Writer, "write"),
    (blocks.Writer, "finish"),
    (store, "write_json"),
    (shutil, "rmtree"),
    (parts, "sync_directory"),
  ):
    monkeypatch.setattr(module, name, dying(getattr(module, name)))
  deaths = 0
  while True:
    left = int(rng.integers(1, 300 + 300 * deaths))
    try:
      assert build_in_parts(directory)
      break
    except Killed:
      deaths += 1
  left = 1 << 40
  assert deaths
  assert content(directory) == expected


def test_finished_parts_are_not_built_again(directory, monkeypatch):
  assert not build_in_parts(directory, share=(1, 2))
  real, again = parts._build, []

  def build(task):
    again.append(task.number)
    real(task)

  monkeypatch.setattr(parts, "_build", build)
  assert build_in_parts(directory)
  assert again == [0, 2]


def test_what_a_part_left_is_checked(directory):
  assert not build_in_parts(directory, share=(1, 2))
  (texts,) = (directory / "cache").glob("*.partial/waiting/00001/*.texts")
  texts.write_bytes(texts.read_bytes()[:-1])
  with pytest.raises(blocks.DamagedError, match="partial is damaged.*delete"):
    build_in_parts(directory)


def test_skips_count_over_all_parts(directory, monkeypatch):
  def found(fraction):
    shutil.rmtree(directory / "cache", ignore_errors=True)
    return opened(directory, max_skip_fraction=fraction)[0]

  messages = []
  for least in (parts.PART_BYTES, 1 << 40):
    monkeypatch.setattr(parts, "PART_BYTES", least)
    # 3 of 123 records: far more than that of the part of the last.
    assert found(3 / 123).skipped["malformed JSON"] == 3
    with pytest.raises(ValueError, match="3 of 123 records") as error:
      found(2.9 / 123)
    messages.append(str(error.value))
  assert messages[0] == messages[1]


def test_parts_without_anything_to_train_on(directory):
  for number in (2, 3):  # one part: what it holds is held out, or nothing
    (directory / "texts" / f"{number}.jsonl").write_text("\n" * 4000)
  train, _ = opened(directory)
  assert train.num_documents and train.row(train.num_rows - 1)
  with pytest.raises(ValueError, match="no documents to train on.*fraction=0"):
    opened(directory, heldout_fraction=1 - 1e-12)


def test_touched_files_are_compared_part_by_part(directory, monkeypatch):
  train, heldout = opened(directory)
  path = directory / "texts" / "3.jsonl"
  os.utime(path, ns=(1, 1))
  monkeypatch.setattr(parts, "PART_BYTES", 1)  # of another version
  lines = []
  again, same = opened(directory, lines)
  assert any("comparing its text" in line for line in lines)
  assert (again.fingerprint, same.fingerprint) == (
    train.fingerprint,
    heldout.fingerprint,
  )
  assert len(list((directory / "cache").glob("*/index.json"))) == 1
  text = path.read_text()
  path.write_text(text.replace("word1", "word2"))
  os.utime(path, ns=(2, 2))
  assert opened(directory)[0].fingerprint != train.fingerprint


def test_a_run_goes_on_with_its_index_in_parts(directory):
  train, heldout = opened(directory)
  begun = train.fingerprint, heldout.fingerprint
  shutil.rmtree(directory / "texts")
  lines = []
  again, same = open_corpora(
    directory, str(directory / "texts"), lines, begun, **IN_PARTS
  )
  assert (again.fingerprint, same.fingerprint) == begun
  assert not any("indexing" in line for line in lines)
  again, _ = opened(directory)  # another run, where the text is not
  assert again.fingerprint == train.fingerprint


def test_what_lies_unfinished_of_other_files_is_named(directory):
  assert not build_in_parts(directory, share=(0, 2))
  write(directory / "texts" / "9.jsonl", ["one more"])
  lines = []
  opened(directory, lines)
  assert any("unfinished index" in line for line in lines)


def test_one_who_comes_when_all_is_joined_builds_nothing(
  directory, monkeypatch
):
  tasks, real = [], parts.join

  def join(given, pool):
    tasks.extend(given)
    return real(given, pool)

  monkeypatch.setattr(parts, "join", join)
  assert build_in_parts(directory)
  before = content(directory)
  monkeypatch.setattr(parts, "_build", None)
  work = tasks[0].work
  assert parts.build(tasks[0], wait=False) == 0  # its directory is gone
  (index,) = (directory / "cache").glob("*/index.json")
  index.parent.rename(work)  # as before the last step, but for the marks
  assert parts.build(tasks[1], wait=False) == 1
  (work / "parts").mkdir()
  assert parts.build(tasks[2], wait=True) == 2
  shutil.rmtree(work / "parts")
  work.rename(index.parent)
  assert content(directory) == before
