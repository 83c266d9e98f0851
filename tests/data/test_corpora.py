"""Corpora: which documents they hold, and what is said of the others."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

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

from aunet_jax import config
from aunet_jax.data import corpora

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
    open_corpora(tmp_path, items)


def test_heldout_depends_on_the_text_alone(tmp_path):
  texts = different(300)
  train, heldout = open_texts(tmp_path / "a", texts, heldout_fraction=0.2)
  again, same = open_texts(tmp_path / "b", texts[::-1], heldout_fraction=0.2)
  held = {text for _, text in heldout.documents()}
  assert held == {text for _, text in same.documents()}
  kept = {text for _, text in train.documents()}
  assert not held & kept
  assert held | kept == {text.encode() for text in texts}
  assert 0.1 < len(held) / len(texts) < 0.3


def test_named_heldout_leaves_training_whole(tmp_path):
  path = write(tmp_path / "other.jsonl", ["held out"])
  train, heldout = open_texts(
    tmp_path, different(20), heldout=path, heldout_fraction=0.5
  )
  assert train.num_documents == 20
  assert [text for _, text in heldout.documents()] == [b"held out"]


# ----- bad data -------------------------------------------------------------


def test_bad_records_are_counted_and_named(tmp_path):
  path = write(tmp_path / "texts.jsonl", different(300))
  with open(path, "a") as file:
    file.write('\n{"text": null}\n{"txet": "a"}\n{"text": ""}\n')
  lines = []
  corpus, _ = open_corpora(tmp_path, path, lines)
  expected = {"null text": 1, "no text field": 1, "empty": 1}
  assert corpus.skipped == expected
  assert corpus.num_documents == 300
  assert any(f"{path}:301: null text" in line for line in lines)
  assert any(f"{path}:302: no text field" in line for line in lines)
  again, _ = open_corpora(tmp_path, path)
  assert again.skipped == expected  # from the cache, too


@pytest.mark.parametrize("num_good", [20, 2000])
def test_too_many_bad_records_stop_the_run(tmp_path, num_good):
  path = write(tmp_path / "texts.jsonl", different(num_good))
  with open(path, "a") as file:
    file.write("\nnot JSON" * (num_good // 50 + 1))
  with pytest.raises(ValueError, match="data.max_skip_fraction=0.01") as error:
    open_corpora(tmp_path, train=path)
  assert f"{path}:{num_good + 1}: malformed JSON" in str(error.value)


def test_all_data_held_out_says_what_to_do(tmp_path):
  with pytest.raises(ValueError, match="data.heldout_fraction=0"):
    open_texts(tmp_path, ["one"], heldout_fraction=0.999999)


def test_the_python_corpus_is_there(tmp_path):
  train, heldout = corpora.open_corpora(
    config.DataConfig(), SPLITTER, (2048, 512, 128), tmp_path, [].append
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
    env={
      **os.environ,
      "PYTHONPATH": str(Path(__file__).parents[2]),
      "JAX_PLATFORMS": "cpu",
    },
  )
  num_bytes, num_cuts, fill, kilobytes = json.loads(
    result.stdout.splitlines()[-1]
  )
  assert num_bytes == size + 11
  assert num_cuts > 0 and fill > 0.97
  assert kilobytes * 1024 < 4 * size  # the text, and what importing takes
