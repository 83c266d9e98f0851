"""Corpora and loaders: exact epochs, exact resume, safe caches."""

import collections
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_splitter import SpaceSplitter

from aunet_jax import config
from aunet_jax.data.corpora import open_corpora
from aunet_jax.data.loader import evaluation_batches, make_loader

SPLITTER = SpaceSplitter()
CAPACITIES = (24, 8, 4)
TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(TESTS))


def _quiet(line):
  del line


def _write(directory, texts):
  """Documents that are all different, so that a batch tells which it has."""
  directory.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps({"text": text}) for text in texts]
  (directory / "texts.jsonl").write_text("\n".join(lines))
  return str(directory / "texts.jsonl")


def _texts(count, seed=0):
  """`count` texts that all differ, of one word to several rows."""
  rng = np.random.default_rng(seed)
  return [
    " ".join([f"{seed}{number:03d}"] * rng.integers(1, 20))
    for number in range(count)
  ]


def _open(tmp_path, texts=None, capacities=CAPACITIES, **settings):
  """Corpora of texts, or of `train=PATH`; nothing held out unless asked."""
  if texts is not None:
    settings["train"] = _write(tmp_path, texts)
  cfg = config.DataConfig(**{"heldout_fraction": 0.0, **settings})
  return open_corpora(cfg, SPLITTER, capacities, tmp_path / "cache", log=_quiet)


def _rows(batch):
  """Every row of a batch that holds text, as hashable bytes."""
  keys = [
    np.stack([batch[name][i] for name in sorted(batch)]).tobytes()
    for i in range(len(batch["bytes"]))
    if batch["weights"][i].any()
  ]
  return collections.Counter(keys)


def _take(loaders, num_batches):
  """Rows that a group of processes gets in so many steps."""
  rows = collections.Counter()
  for _ in range(num_batches):
    for loader in loaders:
      rows += _rows(next(loader))
  return rows


def _loaders(corpus, count, batch_size=4, seed=1, **settings):
  return [
    make_loader(
      corpus,
      seed=seed,
      batch_size=batch_size,
      share_index=index,
      share_count=count,
      **settings,
    )
    for index in range(count)
  ]


def _close(loaders):
  for loader in loaders:
    loader.close()


def _all_rows(corpus):
  return collections.Counter(
    np.stack([row[name] for name in sorted(row)]).tobytes()
    for row in map(corpus.row, range(corpus.num_rows))
  )


# ----- epochs and resume ----------------------------------------------------


@given(
  lengths=st.lists(
    st.integers(0, 30) | st.integers(0, 1200), min_size=1, max_size=25
  ),
  capacities=st.sampled_from([CAPACITIES, (24, 24, 24), (40, 3, 1), (7, 7, 2)]),
  processes=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 4), (4, 2)]),
  stop=st.integers(0, 1000),
  seed=st.integers(0, 2**40),
)
@settings(max_examples=25, deadline=None)
def test_an_epoch_is_every_byte_once_across_a_stop_at_other_processes(
  tmp_path_factory, lengths, capacities, processes, stop, seed
):
  texts = [f"{i} ".ljust(n, "a")[:n] for i, n in enumerate(lengths)]
  tmp_path = tmp_path_factory.mktemp("epoch")
  if not any(texts):
    with pytest.raises(ValueError, match="no documents to train on"):
      _open(tmp_path, texts)
    return
  corpus, _ = _open(tmp_path, texts, capacities)
  num_batches = -(-corpus.num_rows // 4)
  stop = stop % (num_batches + 1)
  before, after = (_loaders(corpus, count, seed=seed) for count in processes)
  rows = _take(before, stop)
  states = [json.loads(json.dumps(loader.get_state())) for loader in before]
  assert all(state == states[0] for state in states)
  for loader in after:
    loader.set_state(states[0])
  rows += _take(after, num_batches - stop)
  assert rows == _all_rows(corpus)
  assert _take(after, num_batches) == rows  # the next epoch has the same rows
  _close(before + after)
  # Rows hold each position of each document once, and its target.
  (store,) = corpus.stores
  positions = collections.Counter(
    (piece.document, position)
    for index in range(corpus.num_rows)
    for piece in store.pieces(index)
    for position in range(piece.start, piece.stop)
  )
  kept = [text for text in texts if text]
  assert positions == collections.Counter(
    (number, position)
    for number, text in enumerate(kept)
    for position in range(len(text) + 1)
  )
  targets = collections.Counter()
  for index in range(corpus.num_rows):
    row = corpus.row(index)
    targets.update(row["targets"][row["weights"] > 0].tolist())
  expected = collections.Counter(b"".join(t.encode() for t in texts))
  expected[config.EOS] = sum(map(bool, texts))
  assert targets == expected


def test_epochs_are_shuffled_by_seed_and_differ(tmp_path):
  corpus, _ = _open(tmp_path, _texts(30))
  steps = -(-corpus.num_rows // 4)

  def order(seed):
    (loader,) = _loaders(corpus, 1, seed=seed)
    batches = [next(loader)["bytes"].tobytes() for _ in range(2 * steps)]
    loader.close()
    return batches[:steps], batches[steps:]

  first, second = order(1)
  assert first != second
  assert order(1) == (first, second)
  assert order(2)[0] != first


def test_resuming_gives_the_same_batches_in_the_same_order(tmp_path):
  corpus, _ = _open(tmp_path, _texts(30))
  (loader,) = _loaders(corpus, 1)
  for _ in range(7):
    next(loader)
  state = loader.get_state()
  expected = [next(loader) for _ in range(9)]
  loader.set_state(state)  # the same loader, rewound
  (other,) = _loaders(corpus, 1)
  other.set_state(state)
  for batch in expected:
    for again in (next(loader), next(other)):
      for name, array in batch.items():
        np.testing.assert_array_equal(again[name], array)
  _close([loader, other])


def test_worker_processes_change_nothing(tmp_path):
  corpus, _ = _open(tmp_path, _texts(40))
  (alone,) = _loaders(corpus, 1)
  expected = [next(alone) for _ in range(8)]
  state = None
  for num_workers in (1, 2):
    (loader,) = _loaders(corpus, 1, num_workers=num_workers)
    if state is not None:  # taken with another number of workers
      loader.set_state(state)
    for batch in expected[4:] if state else expected[:4]:
      again = next(loader)
      for name, array in batch.items():
        np.testing.assert_array_equal(again[name], array)
    state = loader.get_state()
    loader.close()
  alone.close()


@pytest.mark.slow  # it starts many processes
@pytest.mark.parametrize("before", [(1, 2), (2, 1), (4, 0)])
@pytest.mark.parametrize("after", [(1, 0), (2, 2), (4, 1)])
def test_an_epoch_across_other_processes_and_workers(tmp_path, before, after):
  corpus, _ = _open(tmp_path, _texts(60))
  num_batches = -(-corpus.num_rows // 8)
  first, second = (
    _loaders(corpus, count, batch_size=8, num_workers=num_workers)
    for count, num_workers in (before, after)
  )
  rows = _take(first, num_batches // 3)
  for loader in second:
    loader.set_state(first[-1].get_state())
  rows += _take(second, num_batches - num_batches // 3)
  _close(first + second)
  assert rows == _all_rows(corpus)


def test_another_corpus_seed_or_batch_size_refuses_a_state(tmp_path):
  corpus, _ = _open(tmp_path / "a", _texts(30))
  other, _ = _open(tmp_path / "b", _texts(31))
  (loader,) = _loaders(corpus, 1)
  state = loader.get_state()
  for changed in (
    _loaders(other, 1),
    _loaders(corpus, 1, seed=2),
    _loaders(corpus, 1, batch_size=8),
  ):
    with pytest.raises(ValueError, match="would repeat or skip text"):
      changed[0].set_state(state)


def test_processes_must_share_a_batch_evenly(tmp_path):
  corpus, _ = _open(tmp_path, _texts(5))
  with pytest.raises(ValueError, match="do not divide over the 3 groups"):
    make_loader(corpus, seed=0, batch_size=8, share_count=3)
  with pytest.raises(ValueError, match=r"must be in \[0, 2\)"):
    make_loader(corpus, seed=0, batch_size=8, share_index=2, share_count=2)


# ----- mixtures and held-out text -------------------------------------------


def test_a_mixture_gives_each_source_its_share_of_the_bytes(tmp_path):
  # Rows of the first hold 23 bytes; of the second, with more words, fewer.
  first = _write(tmp_path / "first", ["x" * 23] * 100)
  second = _write(tmp_path / "second", ["y y " * 20] * 60)
  items = [{"path": first, "weight": 3}, {"path": second, "weight": 1}]
  corpus, _ = _open(tmp_path, train=items)
  assert corpus.weights == (0.75, 0.25)
  (loader,) = _loaders(corpus, 1)
  counts = collections.Counter()
  for _ in range(200):
    counts.update(next(loader)["targets"].ravel().tolist())
  loader.close()
  xs, ys = counts[ord("x")], counts[ord("y")] + counts[ord(" ")]
  assert abs(xs / (xs + ys) - 0.75) < 0.02


def test_a_mixture_passes_over_each_source_exactly(tmp_path):
  small = _write(tmp_path / "small", _texts(9, seed=1))
  large = _write(tmp_path / "large", _texts(30, seed=2))
  items = [{"path": small, "weight": 0.5}, {"path": large, "weight": 0.5}]
  corpus, _ = _open(tmp_path, train=items)
  part = corpus.stores[0]
  own = _all_rows(dataclasses.replace(corpus, stores=(part,), weights=None))
  (loader,) = _loaders(corpus, 1, batch_size=1)
  seen = collections.Counter()
  while seen.total() < 3 * part.num_rows:
    for row in _rows(next(loader)):
      if row in own:
        seen[row] += 1
  loader.close()
  assert seen == collections.Counter({row: 3 * n for row, n in own.items()})


def test_a_mixture_resumes_at_other_processes(tmp_path):
  small = _write(tmp_path / "small", _texts(9, seed=1))
  large = _write(tmp_path / "large", _texts(30, seed=2))
  items = [{"path": small, "weight": 1}, {"path": large, "weight": 2}]
  corpus, _ = _open(tmp_path, train=items)
  (alone,) = _loaders(corpus, 1)
  expected = [_rows(next(alone)) for _ in range(12)]
  two, four = _loaders(corpus, 2), _loaders(corpus, 4)
  got = [_take(two, 1) for _ in range(5)]
  for loader in four:
    loader.set_state(two[1].get_state())
  got += [_take(four, 1) for _ in range(7)]
  assert got == expected
  _close([alone, *two, *four])


@pytest.mark.parametrize(
  ("items", "message"),
  [
    (["a", {"path": "b", "weight": 1}], "must be of the form"),
    ([{"path": "b", "wieght": 1}], "must be a path, or a list"),
    ([{"path": "b", "weight": 0}], "must be > 0"),
  ],
)
def test_a_wrong_mixture_says_so(tmp_path, items, message):
  with pytest.raises(ValueError, match=message):
    _open(tmp_path, train=items)


def test_heldout_depends_on_the_text_alone(tmp_path):
  texts = _texts(300)
  train, heldout = _open(tmp_path / "a", texts, heldout_fraction=0.2)
  again, same = _open(tmp_path / "b", texts[::-1], heldout_fraction=0.2)
  held = {text for _, text in heldout.documents()}
  assert held == {text for _, text in same.documents()}
  kept = {text for _, text in train.documents()}
  assert not held & kept
  assert held | kept == {text.encode() for text in texts}
  assert 0.1 < len(held) / len(texts) < 0.3


def test_named_heldout_leaves_training_whole(tmp_path):
  path = _write(tmp_path / "other", ["held out"])
  train, heldout = _open(
    tmp_path, _texts(20), heldout=path, heldout_fraction=0.5
  )
  assert train.num_documents == 20
  assert [text for _, text in heldout.documents()] == [b"held out"]


def test_evaluation_batches_are_every_row_once(tmp_path):
  corpus, _ = _open(tmp_path, _texts(30))
  assert corpus.num_rows % 8  # so that the last batch is not full
  for count in (1, 2, 4):
    rows = collections.Counter()
    lengths = set()
    for index in range(count):
      batches = list(
        evaluation_batches(
          corpus, batch_size=8, share_index=index, share_count=count
        )
      )
      lengths.add(len(batches))
      rows += sum(map(_rows, batches), collections.Counter())
    assert rows == _all_rows(corpus)
    assert lengths == {-(-corpus.num_rows // 8)}
  some = evaluation_batches(
    corpus, batch_size=4, max_bytes=corpus.num_bytes // 3
  )
  rows = sum(map(_rows, some), collections.Counter())
  assert rows <= _all_rows(corpus)
  assert abs(rows.total() - corpus.num_rows / 3) <= 1


# ----- the cache ------------------------------------------------------------


def test_the_cache_is_built_once_and_tells_what_it_holds(tmp_path):
  lines = []
  path = _write(tmp_path, _texts(50))
  cfg = config.DataConfig(train=path, heldout_fraction=0.0)
  arguments = (cfg, SPLITTER, CAPACITIES, tmp_path / "cache", lines.append)
  first, _ = open_corpora(*arguments)
  assert any("indexed in" in line for line in lines)
  lines.clear()
  second, _ = open_corpora(*arguments)
  assert not any("index" in line for line in lines)
  assert first.fingerprint == second.fingerprint
  assert first.num_documents == 50
  assert first.num_bytes == sum(map(len, _texts(50)))
  assert first.splitter_hash == "spaces"
  pieces = sum(len(first.stores[0].pieces(i)) for i in range(first.num_rows))
  assert first.num_cuts == pieces - 50
  real = [first.row(i)["weights"].sum() for i in range(first.num_rows)]
  assert first.fill[0] == sum(real) / (first.num_rows * CAPACITIES[0])
  names = [name for name, _ in first.documents()]
  assert names[0] == f"{path}:1"
  again = pickle.loads(pickle.dumps(first))  # as worker processes get it
  np.testing.assert_array_equal(again.row(3)["bytes"], first.row(3)["bytes"])


def test_changed_files_rules_or_capacities_build_anew(tmp_path):
  corpus, _ = _open(tmp_path, _texts(20))
  prints = {corpus.fingerprint}
  texts = _texts(20)
  texts[7] = "another text"
  prints.add(_open(tmp_path, texts)[0].fingerprint)

  class Other(SpaceSplitter):
    hash = "other"

  path = str(tmp_path / "texts.jsonl")  # as it is: now only the rest differs
  cfg = config.DataConfig(train=path, heldout_fraction=0.0)
  for splitter, capacities in (
    (Other(), CAPACITIES),
    (SPLITTER, (32, 8, 4)),
  ):
    corpus, _ = open_corpora(
      cfg, splitter, capacities, tmp_path / "cache", _quiet
    )
    assert corpus.capacities == capacities
    assert corpus.splitter_hash == splitter.hash
    prints.add(corpus.fingerprint)
  assert len(prints) == 4


def test_a_file_deleted_after_indexing_does_not_matter(tmp_path):
  corpus, _ = _open(tmp_path, _texts(20))
  expected = _all_rows(corpus)
  (tmp_path / "texts.jsonl").unlink()
  assert _all_rows(corpus) == expected


@pytest.mark.parametrize(
  "name",
  ["text.bin", "pieces.bin", "rows.bin", "documents.bin", "summary.json"],
)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_damaged_cache_is_refused(tmp_path, name, keep):
  _open(tmp_path, _texts(20))
  (path,) = (tmp_path / "cache").glob(f"*/train/{name}")
  whole = path.read_bytes()
  path.write_bytes(whole[: int(keep * len(whole))])
  with pytest.raises(ValueError, match="delete that directory to rebuild"):
    _open(tmp_path, train=str(tmp_path / "texts.jsonl"))


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
  path = _write(tmp_path, _texts(50))
  with open(path, "a") as file:
    file.write("\nnot JSON\n" + json.dumps({"text": "the last"}) + "\n")
  cfg = config.DataConfig(
    train=path, heldout_fraction=0.0, max_skip_fraction=0.5
  )
  corpus, _ = open_corpora(
    cfg, SPLITTER, CAPACITIES, tmp_path / "fresh", _quiet
  )
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


# ----- bad data -------------------------------------------------------------


def test_bad_records_are_counted_and_named(tmp_path):
  path = _write(tmp_path, _texts(300))
  with open(path, "a") as file:
    file.write('\n{"text": null}\n{"txet": "a"}\n{"text": ""}\n')
  lines = []
  cfg = config.DataConfig(train=path, heldout_fraction=0.0)
  corpus, _ = open_corpora(
    cfg, SPLITTER, CAPACITIES, tmp_path / "cache", lines.append
  )
  expected = {"null text": 1, "no text field": 1, "empty": 1}
  assert corpus.skipped == expected
  assert corpus.num_documents == 300
  assert any(f"{path}:301: null text" in line for line in lines)
  assert any(f"{path}:302: no text field" in line for line in lines)
  again, _ = open_corpora(cfg, SPLITTER, CAPACITIES, tmp_path / "cache", _quiet)
  assert again.skipped == expected  # from the cache, too


@pytest.mark.parametrize("num_good", [20, 2000])
def test_too_many_bad_records_stop_the_run(tmp_path, num_good):
  path = _write(tmp_path, _texts(num_good))
  with open(path, "a") as file:
    file.write("\nnot JSON" * (num_good // 50 + 1))
  with pytest.raises(ValueError, match="data.max_skip_fraction=0.01") as error:
    _open(tmp_path, train=path)
  assert f"{path}:{num_good + 1}: malformed JSON" in str(error.value)


def test_all_data_held_out_says_what_to_do(tmp_path):
  with pytest.raises(ValueError, match="data.heldout_fraction=0"):
    _open(tmp_path, ["one"], heldout_fraction=0.999999)


def test_the_python_corpus_is_there(tmp_path):
  cfg = config.DataConfig()
  train, heldout = open_corpora(
    cfg, SPLITTER, (2048, 512, 128), tmp_path, _quiet
  )
  assert train.num_bytes > 5_000_000
  assert 0 < heldout.num_bytes < 0.2 * train.num_bytes
  names = [name for name, _ in train.documents()]
  assert any(name.endswith("topics.py") for name in names)
  parts = {part for name in names for part in name.split("/")}
  assert not parts & {"site-packages", "test", "tests", "encodings"}


# ----- size -----------------------------------------------------------------

LARGE = textwrap.dedent("""
  import json, sys
  from aunet_jax import config
  from aunet_jax.data import corpora
  from aunet_jax.splitting import Splitter

  cfg = config.DataConfig(train=sys.argv[1], heldout_fraction=0.0)
  corpus, _ = corpora.open_corpora(
    cfg, Splitter(["word@1"]), (8192, 1700), sys.argv[2], print
  )
  # Not ru_maxrss, which keeps what the parent held when it started this.
  status = open('/proc/self/status').read()
  rss = int(status.split('VmHWM:')[1].split()[0])
  print(json.dumps([corpus.num_bytes, corpus.num_cuts, corpus.fill[1], rss]))
""")


@pytest.mark.slow  # it writes 400 MB
def test_a_document_of_200_mb(tmp_path):
  line = b"A line of plain text, one of very many, number %09d.\n"
  with open(tmp_path / "large.txt", "wb") as file:
    for block in range(400):
      numbers = range(block * 10_000, (block + 1) * 10_000)
      file.write(b"".join(line % number for number in numbers))
  (tmp_path / "small.txt").write_text("a small one")
  size = (tmp_path / "large.txt").stat().st_size
  assert size > 200_000_000
  result = subprocess.run(
    [sys.executable, "-c", LARGE, f"{tmp_path}/*.txt", tmp_path / "cache"],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"},
  )
  num_bytes, num_cuts, fill, kilobytes = json.loads(
    result.stdout.splitlines()[-1]
  )
  assert num_bytes == size + 11
  assert num_cuts > 0 and fill > 0.97
  assert kilobytes * 1024 < 4 * size  # the text, and what importing takes


def test_memory_stays_flat(tmp_path):
  # Freed memory goes back to the system or is used again: after many epochs
  # a loader holds what it held after the first.
  corpus, _ = _open(tmp_path, _texts(200))
  (loader,) = _loaders(corpus, 1, batch_size=32)

  def resident():
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1])

  for _ in range(200):
    next(loader)
  before = resident()
  for _ in range(800):
    next(loader)
  after = resident()
  loader.close()
  assert after < 1.05 * before
