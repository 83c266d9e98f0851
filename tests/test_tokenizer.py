"""Models of tokens: exact bytes, honest bits per byte, one tokenizer a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aunet_jax import (
  checkpoint,
  config,
  data,
  evaluate,
  generate,
  packing,
  scaling_plan,
  tokenizer,
  train,
)
from aunet_jax.splitting import Splitter
from aunet_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = "The words of a small text, and 42 numbers: naïve, 你好. " * 40


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  path.write_text(tokenizer.train([TEXT.encode()], 290, 10**6))
  return path


@pytest.fixture(scope="module")
def tokens(path) -> Tokenizer:
  return Tokenizer(path)


@given(
  text=st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(str.encode),
    st.lists(
      st.sampled_from(
        [b"The words", b"\xff", b"\xe4\xbd", b" ", b"<|endoftext|>"]
      )
    ).map(b"".join),
  )
)
@settings(max_examples=200, deadline=None)
def test_tokens_are_the_exact_bytes(tokens, text):
  ids = tokens.encode(text)
  assert tokens.decode(ids) == text
  assert tokens.num_bytes[ids].sum() == len(text)
  assert ids.dtype == tokens.dtype and (ids < tokens.size).all()


def test_the_same_text_makes_the_same_file(path):
  again = tokenizer.train([TEXT.encode()], 290, 10**6)
  assert again == path.read_text()
  assert len(Tokenizer(path).encode(TEXT.encode())) < len(TEXT) / 1.5


def test_names_of_special_tokens_in_a_text_are_text(tmp_path, path):
  values = json.loads(path.read_text())
  values["added_tokens"] = [
    {
      "id": 290,
      "content": "<|end|>",
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": True,
    }
  ]
  special = tmp_path / "special.json"
  special.write_text(json.dumps(values))
  made = Tokenizer(special)
  assert made.size == 291
  ids = made.encode(b"a <|end|> b")
  assert 290 not in ids and made.decode(ids) == b"a <|end|> b"


def test_a_tokenizer_that_changes_text_is_refused(tmp_path, path):
  values = json.loads(path.read_text())
  values["normalizer"] = {"type": "Lowercase"}
  lower = tmp_path / "lower.json"
  lower.write_text(json.dumps(values))
  with pytest.raises(ValueError, match="comes back as"):
    Tokenizer(lower).encode(b"The words")


@pytest.mark.parametrize(
  "content, match",
  [
    (None, "No such file"),
    ("{}", "is no tokenizer.json"),
    (
      '{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},'
      '"unk_token":"a"}}',
      "1 of the 256 bytes",
    ),
  ],
)
def test_what_is_no_byte_level_tokenizer_is_named(tmp_path, content, match):
  bad = tmp_path / "bad.json"
  if content is not None:
    bad.write_text(content)
  with pytest.raises(ValueError, match=match):
    Tokenizer(bad)


def test_the_command_makes_a_tokenizer(tmp_path, capsys):
  text, made = tmp_path / "text.txt", tmp_path / "new" / "tokenizer.json"
  text.write_text(TEXT)
  args = [f"--data={text}", f"--output={made}"]
  assert tokenizer.main([*args, "--vocab_size=270"]) == 0
  assert "model.vocab_size=272" in capsys.readouterr().out
  assert Tokenizer(made).size == 270
  for wrong, message in (
    ("--vocab_size=9", "must hold the 256 bytes"),
    ("--vocab_size=99999", "give more text"),
    ("--max_bytes=0", "--max_bytes=0"),
  ):
    assert tokenizer.main([*args, wrong]) == 2
    assert message in capsys.readouterr().err


# ----- rows -----------------------------------------------------------------


@given(
  documents=st.lists(st.binary(max_size=90), min_size=1, max_size=6),
  length=st.integers(2, 24),
)
@settings(max_examples=60, deadline=None)
def test_every_byte_is_a_target_once(tokens, documents, length):
  encoded = [tokens.encode(text) for text in documents]
  packer = packing.Packer(Splitter(()), [length])
  rows = [
    row
    for number, ids in enumerate(encoded)
    for row in packer.add(number, ids, None)
  ]
  rows += packer.finish()
  seen = [[] for _ in documents]
  for pieces in rows:
    row = packing.fill_row(
      pieces,
      lambda document, start, stop: encoded[document][start:stop],
      None,
      Splitter(()),
      length,
      tokens.bos,
      tokens.eos,
    )
    at = 0
    for piece in pieces:
      end = at + piece.stop - piece.start
      seen[piece.document].append((piece.start, row["targets"][at:end]))
      starts_with = row["bytes"][at]
      assert (starts_with == tokens.bos) == (piece.start == 0)
      at = end
    assert not row["documents"][at:].any()
  for text, parts in zip(documents, seen, strict=True):
    ids = np.concatenate(
      [part for _, part in sorted(parts, key=lambda p: p[0])]
    )
    assert ids[-1] == tokens.eos and (ids[:-1] < tokens.size).all()
    assert tokens.decode(ids) == text


# ----- a run ----------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, path):
  """A trained workdir, its flags and its text."""
  directory = tmp_path_factory.mktemp("run")
  text = directory / "text.jsonl"
  with text.open("w") as file:
    for number in range(30):
      line = {"text": f"{number} " + TEXT[: 40 + 37 * number]}
      file.write(json.dumps(line) + "\n")
  flags = [
    "--config=configs/byte_transformer_1b.py",
    "--config.model.stages[0].dim=32",
    "--config.model.stages[0].num_layers=1",
    "--config.model.stages[0].head_dim=16",
    "--config.model.stages[0].capacity=64",
    "--config.model.stages[0].remat=none",
    f"--config.model.vocab_size={Tokenizer(path).vocab_size}",
    "--config.model.dtype=float32",
    f"--config.data.tokenizer={path}",
    f"--config.data.train={text}",
    "--config.data.heldout_fraction=0.2",
    "--config.train.num_steps=6",
    "--config.train.batch_size=8",
    "--config.train.log_every_steps=1",
    "--config.train.tensorboard=False",
    "--config.optimizer.warmup_steps=2",
    "--config.optimizer.schedule=constant",  # whatever the number of steps
    "--config.checkpoint.every_steps=3",
  ]
  workdir = directory / "run"
  args = [*flags, f"--workdir={workdir}"]
  assert train.main(args) == 0
  return workdir, flags, text


def test_bits_per_byte_are_nats_over_bytes_of_text(run, tokens, capsys):
  workdir, _, text = run
  assert evaluate.main([f"--workdir={workdir}", f"--data={text}"]) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  documents = [
    json.loads(line)["text"].encode() for line in text.open(encoding="utf8")
  ]
  assert result["bytes"] == sum(map(len, documents))

  # Every document's tokens and EOS, by the packed rows of one batch.
  loaded = checkpoint.load(workdir)
  corpus, _ = data.open_corpora(
    config.DataConfig(
      train=str(text), heldout_fraction=0.0, tokenizer=str(tokens.path)
    ),
    loaded.splitter,
    loaded.config.model.capacities,
    cache_dir=workdir / "again",
    log=lambda line: None,
  )
  nats = 0.0
  targets = 0
  for batch in data.evaluation_batches(corpus, batch_size=8):
    logits_BLV = loaded.model.apply(
      {"params": loaded.params},
      batch["bytes"],
      batch["levels"],
      batch["documents"],
    )
    log_BLV = np.asarray(logits_BLV, np.float64)
    log_BLV -= np.log(np.exp(log_BLV).sum(axis=-1, keepdims=True))
    real_BL = batch["weights"] > 0
    targets += real_BL.sum()
    picked_BL = np.take_along_axis(
      log_BLV, batch["targets"][:, :, None], axis=-1
    )[:, :, 0]
    nats -= picked_BL[real_BL].sum()
  assert targets == sum(len(tokens.encode(text)) + 1 for text in documents)
  expected = nats / (math.log(2) * result["bytes"])
  assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_the_log_counts_bytes_of_text(run):
  workdir, _, text = run
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
  seen = [row["bytes_seen"] for row in rows if "loss_nats" in row]
  first = rows[0]
  bytes_per_token = first["loss_nats"] / first["bits_per_byte"] / math.log(2)
  assert 1.5 < bytes_per_token < 4  # of the tokens trained on, EOS counted
  assert 1.4 * 8 * 64 < seen[0] < 4 * 8 * 64


def test_a_run_of_tokens_resumes_exactly(run, tmp_path):
  workdir, flags, _ = run
  again = tmp_path / "run"
  short = [*flags, f"--workdir={again}", "--config.train.num_steps=3"]
  assert train.main(short) == 0
  assert train.main([*flags, f"--workdir={again}"]) == 0

  def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").open())
    return {r["step"]: r["loss_nats"] for r in rows if "loss_nats" in r}

  assert losses(again) == losses(workdir) and len(losses(workdir)) == 6


def test_another_tokenizer_is_refused(run, tmp_path, capsys):
  workdir, flags, _ = run
  other = tmp_path / "other.json"
  other.write_text(tokenizer.train([TEXT[::-1].encode()], 290, 10**6))
  flags = [*flags, f"--config.data.tokenizer={other}"]
  more = "--config.train.num_steps=9"
  assert train.main([*flags, f"--workdir={workdir}", more]) == 2
  assert "tokenizer" in capsys.readouterr().err
  kept = (workdir / "tokenizer.json").read_bytes()
  (workdir / "tokenizer.json").write_bytes(other.read_bytes())
  with pytest.raises(checkpoint.CheckpointError, match="tokens of tokenizer"):
    checkpoint.load(workdir)
  (workdir / "tokenizer.json").write_bytes(kept)


def test_what_reads_bytes_refuses_a_model_of_tokens(run, tmp_path, capsys):
  workdir, flags, _ = run
  assert generate.main([f"--workdir={workdir}", "--prompt=a"]) == 2
  assert "only models of bytes can generate" in capsys.readouterr().err
  other = f"--workdir={tmp_path / 'other'}"
  assert train.main([*flags, other, "--config.model.vocab_size=300"]) == 2
  assert "set model.vocab_size=292" in capsys.readouterr().err
  with pytest.raises(ValueError, match="one stage"):
    config.parse_flags(
      ["--config=tests/tiny.py", "--config.data.tokenizer=tokenizer.json"]
    )


# ----- a study --------------------------------------------------------------


def test_a_plan_matches_contexts_and_compute_in_bytes(tmp_path, tokens):
  text = tmp_path / "text.txt"
  text.write_text(TEXT * 20)
  sample = scaling_plan.Sample(str(text), 256, tokens)
  byte, bpe = scaling_plan.make_cells(
    ["byte", "bpe"], [1e11], sample=sample, ratio=1e-3
  )
  length = bpe.config.model.capacities[0]
  exact = len(TEXT.encode()) / len(tokens.encode(TEXT.encode()))
  assert sample.bytes_per_token == pytest.approx(exact, rel=0.01)
  assert length == pytest.approx(256 / exact, abs=1)
  assert bpe.config.model.vocab_size == tokens.vocab_size
  assert bpe.config.data.tokenizer == tokens.path
  for cell in (byte, bpe):
    planned = cell.to_json()
    spent = planned["flops_per_byte"] * planned["bytes"]
    assert spent == pytest.approx(1e11, rel=0.03)  # whole steps
  assert bpe.to_json()["tokenizer"] == tokens.hash
  with pytest.raises(ValueError, match="name a --tokenizer"):
    scaling_plan.make_cells(
      ["bpe"], [1e11], sample=scaling_plan.Sample(str(text), 256)
    )


def test_the_papers_baseline_is_planned_as_it_was_run():
  sample = scaling_plan.Sample(None, round(2048 * 4.56))
  for run in scaling_plan.laws.BPE_LADDER:
    (cell,) = scaling_plan.make_cells(["bpe"], [run.compute], sample=sample)
    assert cell.config.model == run.model
    rate = cell.config.optimizer.learning_rate
    assert rate == pytest.approx(run.learning_rate, rel=0.01)
    tokens_a_step = cell.to_json()["batch_bytes"] / 4.56
    assert tokens_a_step == pytest.approx(run.printed_units_per_step, rel=0.07)
