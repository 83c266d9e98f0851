"""Bits per byte of a corpus, against a sum over documents done by hand."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import loss, network, quantize, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.evaluate import __main__ as evaluate_main
from aunet_jax.evaluate import bits_per_byte
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.workdir import layout, load

TEXTS = [
  b"One short document.",
  "Ein zweites, mit Umlauten: äöü, und 123 Zahlen.\n".encode(),
  b"\xff\xfe not UTF-8 \x80",
  b"word " * 60,  # longer than a row: cut
]


def new_params(config: config_lib.ModelConfig, key: jax.Array) -> dict:
  init = jax.jit(network.init_params, static_argnums=0)
  return sharding.unbox(init(config, key))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A workdir with an untrained tiny model."""
  config = config_lib.parse_flags(["--config=tests/tiny.py"])
  params = new_params(config.model, jax.random.key(3))
  folder = tmp_path_factory.mktemp("run")
  load.save_params(folder, config, params)
  return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  for i, text in enumerate(TEXTS):
    (folder / f"{i}.txt").write_bytes(text)
  return folder


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
  params = quantize.round_params(loaded.params, "multi_linear")
  expected = nats_of_pieces(loaded._replace(params=params), TEXTS[0], 128)
  assert rounded["nats"] == pytest.approx(expected, rel=1e-5)
  assert rounded["nats"] != exact["nats"]
  assert (exact["int8"], rounded["int8"]) == (False, True)


def test_the_last_line_is_json(workdir, texts, capsys):
  assert evaluate_main.main([f"--workdir={workdir}", f"--data={texts}"]) == 0
  result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
  assert result["documents"] == len(TEXTS)
  assert set(result["compressors_bits_per_byte"]) == {"gzip -9", "xz -9"}


@pytest.mark.parametrize(
  ("workdir_flag", "data_flag", "message"),
  [
    ("/no/such/workdir", None, "no such workdir: /no/such/workdir"),
    (None, "/no/such/data", "/no/such/data"),
    ("tests", None, "tests is not a workdir"),
  ],
)
def test_bad_input_is_named(
  workdir, texts, capsys, workdir_flag, data_flag, message
):
  flags = [
    f"--workdir={workdir_flag or workdir}",
    f"--data={data_flag or texts}",
  ]
  assert evaluate_main.main(flags) == 2
  error = capsys.readouterr().err
  assert message in error and "Traceback" not in error


def test_a_changed_splitting_table_is_refused(workdir):
  host = {"splitter_hash": "0123"}
  with pytest.raises(layout.CheckpointError, match="split text differ"):
    load.check_splitter(host, Splitter(["word@1"]))


def test_no_bytes_have_no_bits():
  with pytest.raises(ValueError, match="at least one byte"):
    loss.bits_per_byte(1.0, 0)
