"""The BPE baseline: exact tokens, exact bytes, one trainer for both."""

import collections
import json
import math
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aunet_jax import config as config_lib
from aunet_jax import terminal, tokenizer
from aunet_jax.aunet import loss, sharding
from aunet_jax.convert import __main__ as convert_main
from aunet_jax.data import corpora, loader, packing, store
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.evaluate import bits_per_byte
from aunet_jax.generate import __main__ as generate_main
from aunet_jax.scaling import plan
from aunet_jax.scaling.sample import Sample
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import __main__ as train_main
from aunet_jax.workdir import layout, load
from tests.scaling.published_runs import BPE_LADDER

ROOT = Path(__file__).parents[2]
WORDS = "the cat and the other cat sat on their mats; naïve 4242 öäü\n\n"
TEXTS = [
  WORDS.encode() * 30,  # longer than a row: cut
  b"\xff\xfe not UTF-8 \x80 the cat \xe2\x82",
  "Ein zweites, mit Umlauten: äöü, und 123 Zahlen.\n".encode(),
  b"<|endoftext|> is text here",
  b"a",
]
SOME_BYTES = st.lists(
  st.sampled_from([b"the", b" cat", b"\xc3", b"\xa9", b"\xff", b"\n", b" "])
  | st.binary(max_size=4)
).map(b"".join)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("tokenizer")
  (folder / "text.txt").write_bytes(TEXTS[0])
  arguments = [f"--data={folder / 'text.txt'}", "--vocab_size=280"]
  path = folder / "tokenizer.json"
  assert tokenizer.main([*arguments, f"--output={path}"]) == 0
  assert tokenizer.main([*arguments, f"--output={folder / 'again.json'}"]) == 0
  assert path.read_bytes() == (folder / "again.json").read_bytes()
  return path


@pytest.fixture(scope="module")
def tokens(file) -> Tokenizer:
  return Tokenizer(file)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("texts")
  for i, text in enumerate(TEXTS):
    (folder / f"{i}.txt").write_bytes(text)
  return folder


@given(text=SOME_BYTES)
def test_tokens_are_the_exact_bytes_of_any_document(tokens, text):
  ids = tokens.encode(text)
  assert tokens.decode(ids) == text
  assert tokens.num_bytes[ids].sum() == len(text)
  assert all(number < tokens.size for number in ids)


def test_bytes_that_are_no_text_are_tokens_of_one_byte(tokens):
  ids = tokens.encode(b"the cat\xffthe cat\xc3")
  sizes = tokens.num_bytes[ids].tolist()
  assert tokens.num_bytes[tokens.encode(b"the cat")].tolist() == [3, 4]
  assert sizes == [3, 4, 1, 3, 4, 1]


def test_names_of_special_tokens_in_a_text_are_text(file, tmp_path):
  values = json.loads(file.read_text())
  special = {
    "id": 280, "content": "<|endoftext|>", "single_word": False,
    "lstrip": False, "rstrip": False, "normalized": False, "special": True,
  }  # fmt: skip
  values["added_tokens"] = [special]
  path = tmp_path / "special.json"
  path.write_text(json.dumps(values))
  tokens = Tokenizer(path)
  assert (tokens.bos, tokens.eos, tokens.vocab_size) == (281, 282, 283)
  ids = tokens.encode(TEXTS[3])
  assert 280 not in ids and tokens.decode(ids) == TEXTS[3]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"normalizer": {"type": "Lowercase"}}, "comes back as b'the'"),
    ({"normalizer": {"type": "NFC"}}, None),
  ],
)
def test_a_tokenizer_that_changes_the_text_is_refused(
  file, tmp_path, change, message
):
  path = tmp_path / "changed.json"
  path.write_text(json.dumps(json.loads(file.read_text()) | change))
  tokens = Tokenizer(path)
  if message is None:  # it has nothing to change here
    assert tokens.decode(tokens.encode(b"the")) == b"the"
    text, message = "e\u0301".encode(), "changes the text"
  else:
    text = b"The"
  with pytest.raises(ValueError, match=message):
    tokens.encode(text)


# ----- rows -----------------------------------------------------------------


def open_texts(texts, file, cache, capacity=16, **settings):
  cfg = config_lib.DataConfig(
    train=str(texts), tokenizer=str(file), heldout_fraction=0.0, **settings
  )
  corpus, _ = corpora.open_corpora(
    cfg, Splitter([]), (capacity,), cache, log=lambda line: None
  )
  return corpus


def test_every_token_of_every_document_is_a_target_once(
  texts, file, tokens, tmp_path
):
  corpus = open_texts(texts, file, tmp_path)
  assert corpus.num_bytes == sum(map(len, TEXTS))
  assert corpus.num_cuts > 0
  spans = collections.Counter()
  total_bytes = 0
  for number in range(corpus.num_rows):
    row = corpus.row(number)
    total_bytes += row["target_bytes"].sum()
    assert not row["target_bytes"][row["weights"] == 0].any()
    for piece in range(1, row["documents"].max() + 1):
      mine = row["documents"] == piece
      read, targets = row["bytes"][mine], row["targets"][mine]
      np.testing.assert_array_equal(read[1:], targets[:-1])
      assert (row["levels"][mine] == 0).all()
      spans[read[0] == tokens.bos, targets[-1] == tokens.eos] += 1
  assert total_bytes == corpus.num_bytes
  assert spans[True, True] + spans[True, False] == len(TEXTS)
  assert spans[True, True] + spans[False, True] == len(TEXTS)

  targets = collections.Counter()
  (batches,) = (list(loader.evaluation_batches(corpus, batch_size=3)),)
  shape = packing.abstract_batch(3, corpus.capacities[0], sizes_targets=True)
  assert {name: (x.shape, x.dtype) for name, x in batches[0].items()} == {
    name: (x.shape, x.dtype) for name, x in shape.items()
  }
  for batch in batches:
    targets.update(batch["targets"][batch["weights"] > 0].tolist())
  expected = collections.Counter({tokens.eos: len(TEXTS)})
  for text in TEXTS:
    expected.update(tokens.encode(text).tolist())
  assert targets == expected


def test_another_tokenizer_is_another_index(texts, file, tmp_path):
  first = open_texts(texts, file, tmp_path / "cache")
  other = tmp_path / "other.json"
  other.write_text(file.read_text() + "\n")
  second = open_texts(texts, other, tmp_path / "cache")
  assert first.fingerprint != second.fingerprint
  assert len(list((tmp_path / "cache").glob("*.lock"))) == 2
  again = open_texts(texts, file, tmp_path / "cache")
  assert again.fingerprint == first.fingerprint


def test_an_index_of_tokens_of_the_format_before_is_read(texts, file, tmp_path):
  corpus = open_texts(texts, file, tmp_path)
  (directory,) = tmp_path.glob("*/train")
  summary = store.read_json(directory / "summary.json") | {"format": 2}
  del summary["files"]
  for name in ("checksums.bin", "digests.bin"):
    (directory / name).unlink()
  (directory / "summary.json").write_text(json.dumps(summary))
  old = store.Store(directory, Splitter([]))
  for index in range(corpus.num_rows):
    for name, array in corpus.narrow_row(index).items():
      np.testing.assert_array_equal(old.row(index)[name], array)


def test_a_torn_token_file_is_refused(texts, file, tmp_path):
  open_texts(texts, file, tmp_path)
  (path,) = tmp_path.glob("*/train/tokens.bin")
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(ValueError, match="delete that directory"):
    open_texts(texts, file, tmp_path)


def test_ids_past_int16_survive_the_small_types(texts, file, tmp_path):
  values = json.loads(file.read_text())
  vocabulary = values["model"]["vocab"]
  (name,) = [token for token, number in vocabulary.items() if number == 279]
  vocabulary[name] = 70_000
  path = tmp_path / "large.json"
  path.write_text(json.dumps(values))
  large = Tokenizer(path)
  corpus = open_texts(texts, path, tmp_path / "cache")
  row = [corpus.row(number) for number in range(corpus.num_rows)]
  assert large.eos in np.concatenate([r["targets"] for r in row])
  assert 70_000 in large.encode(TEXTS[0])


# ----- training, evaluating, resuming ---------------------------------------


def command(texts, file, workdir, *more):
  return [
    f"--config={ROOT / 'tests' / 'tiny_tokens.py'}",
    f"--workdir={workdir}",
    f"--config.data.train={texts}",
    f"--config.data.heldout={texts}",
    f"--config.data.tokenizer={file}",
    "--config.model.vocab_size=282",
    *more,
  ]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, texts, file):
  folder = tmp_path_factory.mktemp("run") / "w"
  assert train_main.main(command(texts, file, folder)) == 0
  return folder


def rows_of(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_bits_per_byte_are_nats_of_tokens_and_eos_over_bytes_of_text(
  workdir, texts, tokens
):
  loaded = load.load(workdir)
  length = loaded.config.model.capacities[0]
  apply = jax.jit(loaded.model.apply)
  nats = 0.0
  for text in TEXTS:  # each alone; longer than a row: in fresh contexts
    ids = tokens.encode(text).astype(np.int32)
    for start in range(0, len(ids) + 1, length):
      inputs, targets, real = np.zeros((3, 1, length), np.int32)
      span = slice(start, min(start + length, len(ids) + 1))
      size = span.stop - span.start
      inputs[0, :size] = np.concatenate([[tokens.bos], ids])[span]
      targets[0, :size] = np.concatenate([ids, [tokens.eos]])[span]
      real[0, :size] = 1
      levels = np.zeros_like(inputs)
      logits = apply({"params": loaded.params}, inputs, levels, real)
      nats += float((loss.cross_entropy(logits, targets) * real).sum())
  num_bytes = sum(map(len, TEXTS))
  result = bits_per_byte.evaluate_workdir(str(workdir), str(texts))
  assert result["bytes"] == num_bytes and result["eos_counted"]
  expected = nats / math.log(2) / num_bytes
  assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
  heldout = [r for r in rows_of(workdir) if "heldout_bits_per_byte" in r]
  assert heldout[-1]["heldout_bytes"] == num_bytes
  assert heldout[-1]["heldout_bits_per_byte"] == pytest.approx(
    result["bits_per_byte"], rel=1e-5
  )


def test_an_epoch_logs_exactly_the_bytes_of_the_text(texts, file, tmp_path):
  corpus = open_texts(texts, file, tmp_path / "cache", capacity=64)
  steps = -(-corpus.num_rows // 8)
  more = (
    f"--config.train.num_steps={steps}",
    "--config.optimizer.warmup_steps=0",
    "--config.train.log_every_steps=1",
  )
  assert train_main.main(command(texts, file, tmp_path / "w", *more)) == 0
  logged = [r for r in rows_of(tmp_path / "w") if "bytes_per_second" in r]
  assert logged[-1]["bytes_seen"] == corpus.num_bytes
  assert all(r["bytes_per_second"] > 0 for r in logged)
  for row in logged:
    assert row["bits_per_byte"] < row["loss_nats"] / math.log(2)


def test_a_stopped_run_of_tokens_logs_what_a_whole_one_does(
  workdir, texts, file, tmp_path, monkeypatch
):
  real, seen = sharding.to_device, []

  def interrupt(*args):
    seen.append(0)
    if len(seen) == 5:
      signal.raise_signal(signal.SIGTERM)
    return real(*args)

  monkeypatch.setattr(sharding, "to_device", interrupt)
  again = command(texts, file, tmp_path / "w")
  assert train_main.main(again) == terminal.EXIT_STOPPED
  monkeypatch.undo()
  moved = tmp_path / "moved.json"  # the same content elsewhere is the same
  shutil.copyfile(file, moved)
  assert train_main.main(command(texts, moved, tmp_path / "w")) == 0

  def timeless(rows):
    slow = (
      "bytes_per_second",
      "data_wait_share",
      "useful_mfu",
      "goodput",
      "goodput_all_starts",
    )
    return [{k: v for k, v in r.items() if k not in slow} for r in rows]

  assert timeless(rows_of(tmp_path / "w")) == timeless(rows_of(workdir))


@pytest.fixture
def copied(workdir, tmp_path):
  return Path(shutil.copytree(workdir, tmp_path / "copied"))


def test_another_tokenizer_does_not_continue_or_load(
  copied, texts, file, tmp_path, capsys
):
  other = tmp_path / "other.json"
  other.write_text(file.read_text() + "\n")
  more = ("--config.train.num_steps=13",)
  assert train_main.main(command(texts, other, copied, *more)) == 2
  assert "trained on tokens of tokenizer" in capsys.readouterr().err
  (copied / "tokenizer.json").write_text(other.read_text())
  with pytest.raises(layout.CheckpointError, match="restore the tokenizer"):
    load.load(copied)
  (copied / "tokenizer.json").unlink()
  with pytest.raises(layout.CheckpointError, match="No such file"):
    load.load(copied)


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--config.model.vocab_size=300"], "set model.vocab_size=282"),
    (["--config.data.tokenizer=/no/such.json"], "No such file"),
    (["--config.data.tokenizer=setup.cfg"], "is no tokenizer.json"),
  ],
)
def test_bad_settings_are_named(
  texts, file, tmp_path, capsys, monkeypatch, flags, message
):
  monkeypatch.chdir(ROOT)
  assert train_main.main(command(texts, file, tmp_path / "w", *flags)) == 2
  assert message in capsys.readouterr().err


def test_a_vocabulary_without_all_bytes_is_refused(file, tmp_path):
  values = json.loads(file.read_text())
  vocabulary = values["model"]["vocab"]
  vocabulary["ÿÿ"] = vocabulary.pop("ÿ")
  path = tmp_path / "fewer.json"
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError, match="255 of the 256 bytes"):
    Tokenizer(path)


def test_tokens_are_for_one_stage(file):
  config = config_lib.parse_flags([f"--config={ROOT / 'tests' / 'tiny.py'}"])
  settings = config.data.__dict__ | {"tokenizer": str(file)}
  with pytest.raises(ValueError, match="one stage"):
    config_lib.Config(
      model=config.model, data=config_lib.DataConfig(**settings)
    )


def test_a_trained_model_of_tokens_writes(workdir, capsys):
  flags = ["--prompt=the", "--max_bytes=12", "--seed=1"]
  assert generate_main.main([f"--workdir={workdir}", *flags, "--json"]) == 0
  row = json.loads(capsys.readouterr().out)
  assert len(row["bytes"]) == len(row["logprobs"]) <= 12
  assert row["reason"] in ("length", "eos")


def test_what_only_bytes_can_do_says_so(workdir, tmp_path, capsys):
  target = f"--to-lingua={tmp_path / 'official.npz'}"
  assert convert_main.main([target, f"--workdir={workdir}"]) == 2
  assert "model of tokens" in capsys.readouterr().err


def test_the_library_is_named_where_it_is_missing(file, monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ValueError, match="pip install"):
    Tokenizer(file)


# ----- a study --------------------------------------------------------------


def test_a_plan_matches_contexts_and_compute_in_bytes(tmp_path, tokens):
  text = tmp_path / "text.txt"
  text.write_text(WORDS * 400)
  sample = Sample(str(text), 256, tokens)
  grid = plan.Grid(models=["byte", "bpe"], budgets=[1e11], ratio=1e-3)
  byte, bpe = plan.make_runs(grid, sample)
  length = bpe.config.model.capacities[0]
  exact = len(WORDS.encode()) / len(tokens.encode(WORDS.encode()))
  assert sample.bytes_per_token == pytest.approx(exact, rel=0.01)
  assert length == pytest.approx(256 / exact, abs=1)
  assert bpe.config.model.vocab_size == tokens.vocab_size
  assert bpe.config.data.tokenizer == tokens.path
  for run, config in (byte, bpe):
    spent = run.flops_per_byte * run.bytes
    whole_steps = 0.51 / config.train.num_steps
    assert spent == pytest.approx(1e11, rel=whole_steps)
  assert bpe.run.tokenizer == tokens.hash
  with pytest.raises(ValueError, match="name a --tokenizer"):
    grid = plan.Grid(models=["bpe"], budgets=[1e11])
    plan.make_runs(grid, Sample(str(text), 256))


def test_the_papers_baseline_is_planned_as_it_was_run():
  sample = Sample(None, round(2048 * 4.56))
  for published in BPE_LADDER:
    grid = plan.Grid(models=["bpe"], budgets=[published.compute])
    ((run, config),) = plan.make_runs(grid, sample)
    assert config.model == published.model
    rate = config.optimizer.learning_rate
    assert rate == pytest.approx(published.learning_rate, rel=0.01)
    assert config.optimizer.warmup_steps == 2000  # Table 11
    tokens_a_step = run.batch_bytes / 4.56
    assert tokens_a_step == pytest.approx(
      published.printed_units_per_step, rel=0.07
    )
