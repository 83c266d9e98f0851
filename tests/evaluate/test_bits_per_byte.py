"""Bits per byte of a corpus, against a sum over documents done by hand."""

import dataclasses
import gzip
import json
import lzma
import math

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import loss, network
from aunet_jax.aunet.network import AUNet
from aunet_jax.data import roles
from aunet_jax.evaluate import __main__ as evaluate_main
from aunet_jax.evaluate import bits_per_byte, score
from aunet_jax.workdir import load
from tests import toy_generator
from tests.toy_workdir import TEXTS, write_texts, write_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return write_workdir(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  return write_texts(tmp_path_factory.mktemp("texts"))


def nats_of_pieces(loaded, text, row_length, model=None) -> float:
  """Sum over a document alone in a row, cut as a row of that length does."""
  levels = loaded.splitter.levels(text)
  inputs = np.concatenate([[config_lib.BOS], np.frombuffer(text, np.uint8)])
  targets = np.concatenate([np.frombuffer(text, np.uint8), [config_lib.EOS]])
  levels = np.concatenate([[1], levels])
  total = 0.0
  apply = jax.jit((model or loaded.model).apply)
  for start in range(0, len(inputs), row_length):
    span = slice(start, start + row_length)
    logits_BLV = apply(
      {"params": loaded.params}, inputs[None, span], levels[None, span]
    )
    total += float(loss.cross_entropy(logits_BLV, targets[None, span]).sum())
  return total


def test_bits_per_byte_is_total_nats_over_total_bytes(workdir, texts):
  result = bits_per_byte.evaluate_workdir(
    str(workdir), str(texts), log=lambda _: 0
  )
  loaded = load.load(workdir)
  L = loaded.config.model.capacities[0]
  assert all(loaded.splitter.levels(text).sum() < 32 for text in TEXTS[:3])
  whole = sum(nats_of_pieces(loaded, text, L) for text in TEXTS[:3])
  # The long document closes its rows by words, not by bytes: 32 slots of
  # stage 2, one of them the first position of the piece.
  text = TEXTS[3]
  boundaries = np.flatnonzero(loaded.splitter.levels(text)) + 1
  assert result["cuts"] >= 1 and len(boundaries) > 32
  num_bytes = sum(map(len, TEXTS))
  assert result["bytes"] == num_bytes
  assert result["targets"] == num_bytes + len(TEXTS)  # one EOS a document
  assert result["bits_per_byte"] == pytest.approx(
    result["nats"] / math.log(2) / num_bytes
  )
  only_short = texts.parent / "short"
  only_short.mkdir(exist_ok=True)
  for i, short in enumerate(TEXTS[:3]):
    (only_short / f"{i}.txt").write_bytes(short)
  short_result = bits_per_byte.evaluate_workdir(
    str(workdir), str(only_short), log=lambda _: 0
  )
  assert short_result["nats"] == pytest.approx(whole, rel=1e-5)


def test_batch_size_does_not_change_the_figure(workdir, texts):
  figures = [
    bits_per_byte.evaluate_workdir(
      str(workdir), str(texts), batch_size=size, log=lambda _: 0
    )["nats"]
    for size in (8, 16)
  ]
  assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_official_scoring_leaves_out_the_final_norm(workdir, texts):
  loaded = load.load(workdir)
  bare = AUNet(dataclasses.replace(loaded.model.config, final_norm=False))
  only = texts.parent / "one"
  only.mkdir(exist_ok=True)
  (only / "0.txt").write_bytes(TEXTS[0])
  result = bits_per_byte.evaluate_workdir(
    str(workdir), str(only), official_scoring=True, log=lambda _: 0
  )
  expected = nats_of_pieces(loaded, TEXTS[0], 128, bare)
  assert result["nats"] == pytest.approx(expected, rel=1e-5)
  assert result["official_scoring"]


def test_int8_scores_the_rounded_matrices(workdir, texts):
  loaded = load.load(workdir)
  only = texts.parent / "one"
  only.mkdir(exist_ok=True)
  (only / "0.txt").write_bytes(TEXTS[0])
  exact, rounded = (
    bits_per_byte.evaluate_workdir(
      str(workdir), str(only), int8=int8, log=lambda _: 0
    )
    for int8 in (False, True)
  )
  params = network.round_params(loaded.params, loaded.config.model)
  expected = nats_of_pieces(loaded._replace(params=params), TEXTS[0], 128)
  assert rounded["nats"] == pytest.approx(expected, rel=1e-5)
  assert rounded["nats"] != exact["nats"]
  assert (exact["int8"], rounded["int8"]) == (False, True)


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_document_has_its_own_scores(workdir, texts, tmp_path, capsys):
  path = tmp_path / "scores.jsonl"
  flags = [f"--workdir={workdir}", f"--data={texts}", "--compressor_bytes=0"]
  assert evaluate_main.main([*flags, f"--per_document={path}"]) == 0
  result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
  assert result["compressors_bits_per_byte"] == {}
  rows = rows_of(path)
  assert [row["bytes"] for row in rows] == [len(text) for text in TEXTS]
  assert [row["windows"] for row in rows][:3] == [1, 1, 1]
  assert sum(row["windows"] for row in rows) == result["cuts"] + len(TEXTS)
  assert sum(row["nats"] for row in rows) == pytest.approx(result["nats"])
  loaded = load.load(workdir)
  for row, text in zip(rows[:3], TEXTS, strict=False):
    alone = nats_of_pieces(loaded, text, 128)
    assert row["nats"] == pytest.approx(alone, rel=1e-5)
    bits = row["nats"] / math.log(2) / row["bytes"]
    assert row["bits_per_byte"] == pytest.approx(bits)
  assert all(str(texts) in row["name"] for row in rows)


def test_a_stride_gives_every_byte_more_context(workdir, tmp_path, capsys):
  """Against a document scored in windows one by one."""
  text = b"some words and more of them, " * 12
  (tmp_path / "text.txt").write_bytes(text)
  loaded = load.load(workdir)
  capacities = loaded.model.config.capacities
  flags = [f"--workdir={workdir}", f"--data={tmp_path}"]
  assert evaluate_main.main([*flags, "--stride=16"]) == 0
  result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
  ids = np.array([config_lib.BOS, *text, config_lib.EOS])
  levels = np.array([1, *loaded.splitter.levels(text)])
  apply, nats, scored, start = jax.jit(loaded.model.apply), 0.0, 0, 0
  while scored < len(levels):
    deep = np.cumsum(levels[start + 1 :] > 0)
    stop = start + 1 + int((deep < capacities[1]).sum())
    stop = min(stop, start + capacities[0])
    row = np.zeros((3, 1, capacities[0]), np.int32)
    row[0, 0, : stop - start] = ids[start:stop]
    row[1, 0, : stop - start] = levels[start:stop]
    row[1, 0, 0], row[2, 0, : stop - start] = 1, 1
    logits = apply({"params": loaded.params}, *row)
    targets = np.zeros((1, capacities[0]), np.int32)
    targets[0, : stop - start] = ids[start + 1 : stop + 1]
    losses = np.asarray(loss.cross_entropy(logits, targets))[0]
    nats += losses[scored - start : stop - start].sum()
    scored, start = stop, start + 16
  assert result["nats"] == pytest.approx(nats, rel=1e-5)
  assert result["targets"] == len(text) + 1 and result["stride"] == 16
  disjoint = bits_per_byte.evaluate_workdir(
    str(workdir), str(tmp_path), log=lambda _: 0
  )
  assert disjoint["targets"] == result["targets"]
  assert disjoint["nats"] != pytest.approx(result["nats"], rel=1e-3)


def test_models_of_other_rows_see_the_same_contexts(workdir, tmp_path):
  """Documents that fit both rows, in numbers that fill them unevenly."""
  config = config_lib.parse_flags(["--config=tests/tiny.py"])
  params = load.load(workdir).params
  texts = tmp_path / "texts"
  texts.mkdir()
  for i in range(12):
    (texts / f"{i:02}.txt").write_bytes(b"a few words " * (i % 5 + 1))
  nats = []
  for name, capacities in (("short", (64, 24)), ("long", (160, 48))):
    other = dataclasses.replace(
      config, model=config.model.with_capacities(capacities)
    )
    load.save_params(tmp_path / name, other, params)
    result = bits_per_byte.evaluate_workdir(
      str(tmp_path / name), str(texts), log=lambda _: 0
    )
    assert result["cuts"] == 0 and result["documents"] == 12
    nats.append(result["nats"])
  assert nats[0] == pytest.approx(nats[1], rel=1e-5)


@pytest.mark.parametrize("max_bytes", [5, 1000, 1 << 20])
def test_compressors_see_no_more_than_they_are_given(max_bytes):
  text = [bytes(range(256)) * 3, b"words " * 99]

  class Corpus:
    def documents(self):
      return ((str(i), part) for i, part in enumerate(text))

  start = b"".join(text)[:max_bytes]
  found = bits_per_byte.compressor_bits_per_byte(Corpus(), max_bytes)
  assert found["gzip -9"] == 8 * len(gzip.compress(start, 9)) / len(start)
  packed = lzma.compress(start, preset=9)
  assert found["xz -9"] == 8 * len(packed) / len(start)


def test_no_bytes_have_no_bits():
  with pytest.raises(ValueError, match="at least one byte"):
    loss.bits_per_byte(1.0, 0)


RECORDS = [
  {"messages": [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Two, ä"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Three of them"},
  ]},
  {"messages": [
    {"role": "system", "content": "brief"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "so"},
  ]},
]  # fmt: skip


def test_answers_of_conversations_cost_what_score_says(tmp_path):
  talker = toy_generator.talker()
  data = config_lib.DataConfig(train="x.jsonl", format="chat")
  config = config_lib.Config(model=talker.config, data=data)
  load.save_params(tmp_path / "run", config, talker.params)
  lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
  (tmp_path / "a.jsonl").write_text(lines)
  rows = []
  result = bits_per_byte.evaluate_workdir(
    str(tmp_path / "run"), str(tmp_path / "a.jsonl"), log=lambda _: 0,
    answers=True, on_document=rows.append,
  )  # fmt: skip
  nats, ends, num_bytes = [], [], []
  for record in RECORDS:
    turns = [roles.turn_of(m["role"], m["content"]) for m in record["messages"]]
    pairs = [
      pair
      for n, turn in enumerate(turns) if turn.role == "assistant"
      for prompt in [roles.encode_prompt(turns[:n])]
      for pair in [(prompt, turn.text), (prompt + turn.text, roles.END_TEXT)]
    ]  # fmt: skip
    scores = score.score(talker.config, talker.params, talker.splitter, pairs)
    nats.append(-sum(one.nats for one in scores))
    ends.append(-sum(one.nats for one in scores[1::2]))
    num_bytes.append(sum(len(text) for _, text in pairs[::2]))
  assert [row["bytes"] for row in rows] == num_bytes == [7 + 13, 2]
  assert [row["nats"] for row in rows] == pytest.approx(nats, rel=1e-5)
  bits = sum(nats) / math.log(2) / sum(num_bytes)
  assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
  bits -= sum(ends) / math.log(2) / sum(num_bytes)
  assert result["bits_per_byte_without_eos"] == pytest.approx(bits, rel=1e-5)
  assert result["answers"] and result["compressors_bits_per_byte"] == {}
