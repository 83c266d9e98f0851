"""prepare: shards, plans, and what it refuses."""

import json
import pathlib

import numpy as np
import pytest

from aunet_jax import files, prepare
from aunet_jax.data import building, corpora, loader, parts, shards
from aunet_jax.splitting.splitter import Splitter
from tests import tiny_runs
from tests.data.test_shards import _records, _run, _texts, _write


def test_plan_prints_a_table_and_writes_nothing(tmp_path, capsys):
  source = _write(tmp_path, _texts(100))
  _run(f"--input={source}", "--plan", "--row_bytes=512")
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split()[:3] == ["1", "bytes", "512"]
  assert lines[3].split()[:2] == ["3", "word@2"]
  assert list(tmp_path.iterdir()) == [pathlib.Path(source)]


def test_wrong_use_says_what_to_do(tmp_path, capsys):
  source = _write(tmp_path, _texts(5))
  (tmp_path / "out").mkdir()
  for arguments, message in (
    ([f"--input={source}"], "give --output=DIR"),
    ([f"--input={source}", f"--output={tmp_path}/out"], "out exists"),
    ([f"--input={tmp_path}/no", "--output=x"], "matches no file"),
    ([f"--input={source}", "--plan"], "too small to plan"),
  ):
    try:
      code = _run(*arguments)
    except SystemExit as error:  # of the parser
      code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_bad_input_leaves_no_output(tmp_path, capsys):
  path = tmp_path / "bad.jsonl"
  path.write_text('{"text": "a"}\nnot JSON\n')
  assert _run(f"--input={path}", f"--output={tmp_path}/out") == 2
  assert "bad.jsonl:2: malformed JSON" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == [path]


def test_a_plan_reports_what_it_skips_and_takes_any_field(tmp_path, capsys):
  path = tmp_path / "a.jsonl"
  lines = [json.dumps({"m": {"body": text}}) for text in _texts(300)]
  path.write_text("\n".join(["not JSON", *lines]))
  flags = [f"--input={path}", "--plan", "--row_bytes=256"]
  assert _run(*flags, "--text_field=m.body") == 0
  said = capsys.readouterr()
  assert "a.jsonl:1: malformed JSON" in said.err
  assert "filled" in said.out


def test_text_files_are_separated_into_documents(tmp_path):
  (tmp_path / "in.txt").write_text("one\n\ntwo\n\n\nthree\n")
  output = tmp_path / "out"
  flags = [f"--input={tmp_path}/in.txt", f"--output={output}"]
  more = ["--heldout_fraction=0", "--separator=blank_line", "--row_bytes=64"]
  assert _run(*flags, *more) == 0
  assert sorted(_records(output / "train")) == [b"one", b"three", b"two"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
  source = _write(tmp_path, _texts(20))
  theirs = tmp_path / "out.partial"
  theirs.mkdir()
  (theirs / "thesis.txt").write_text("years of work")
  assert prepare.main([f"--input={source}", f"--output={tmp_path}/out"]) == 2
  assert "out.partial is in the way" in capsys.readouterr().err
  assert (theirs / "thesis.txt").read_text() == "years of work"
  theirs.rename(tmp_path / "elsewhere")
  (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
  assert prepare.main([f"--input={source}", f"--output={tmp_path}/out"]) == 2
  assert (tmp_path / "elsewhere" / "thesis.txt").exists()


def test_what_a_killed_run_left_is_written_over(tmp_path, capsys):
  source = _write(tmp_path, _texts(20))
  left = tmp_path / "out.partial"
  left.mkdir()
  (left / shards._MARK).touch()
  (left / "train.scratch").write_text("half")
  arguments = [
    f"--input={source}", f"--output={tmp_path}/out", "--heldout_fraction=0.5"
  ]  # fmt: skip
  (left / "notes.txt").write_text("of the user")
  assert prepare.main(arguments) == 2
  assert (left / "notes.txt").exists()
  (left / "notes.txt").unlink()
  with files.locked(left / shards._MARK, lambda: None):
    assert prepare.main(arguments) == 2
    assert "another process is writing" in capsys.readouterr().err
  assert prepare.main(arguments) == 0
  assert not left.exists()
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "heldout", "index.json", "skipped.jsonl", "train"
  ]  # fmt: skip


# ----- the index of a run -----------------------------------------------------


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--index=x"], "--index needs --config=FILE"),
    (["--index=x", "--input=a", tiny_runs.TINY], "leave out --input"),
    (["--index=x", "--workers=0", tiny_runs.TINY], "--workers=0 must be >= 1"),
    (["--index=x", "--share=2/2", tiny_runs.TINY], "--share=2/2 must be I/N"),
    (["--index=x", "--share=1", tiny_runs.TINY], "--share=1 must be I/N"),
    (["--index=gs://x/y", tiny_runs.TINY], "gs://x/y is a URL"),
    (
      ["--index=x", tiny_runs.TINY, "--config.data.trian=a"],
      "Did you mean --config.data.train?",
    ),
    (
      ["--input=a", "--output=b", "--config.seed=1"],
      "are for --index",
    ),
    ([], "give --input=FILES, or --index=CACHE"),
  ],
)
def test_wrong_use_of_the_index_says_what_to_do(arguments, message, capsys):
  try:
    code = prepare.main(arguments)
  except SystemExit as error:  # of the parser
    code = error.code
  assert code == 2
  assert message in capsys.readouterr().err


def prepared(corpus, cache, *flags):
  return prepare.main(
    [
      f"--index={cache}", tiny_runs.TINY, f"--config.data.train={corpus}",
      "--config.data.heldout_fraction=0.1", *flags,
    ]
  )  # fmt: skip


def test_what_is_prepared_is_what_a_run_finds(tmp_path, monkeypatch, capsys):
  corpus = tiny_runs.write_corpus(tmp_path / "corpus")
  monkeypatch.setattr(parts, "PART_BYTES", 4000)
  cache = tmp_path / "cache"
  assert prepared(corpus, cache, "--share=1/2") == 0
  assert json.loads(capsys.readouterr().out) == {"finished": False}
  assert prepared(corpus, cache, "--share=0/2") == 0
  said = json.loads(capsys.readouterr().out)
  assert said["finished"]
  assert said["documents"] + said["heldout_documents"] == 40
  assert prepared(corpus, cache) == 0  # nothing to do
  again = json.loads(capsys.readouterr().out)
  assert again["fingerprint"] == said["fingerprint"]
  config = tiny_runs.tiny(corpus)
  rows = []
  for where, how in (
    (cache, building.How(most_bytes=-1)),  # which may build nothing
    (tmp_path / "own", building.ALONE),
  ):
    train, heldout = corpora.open_corpora(
      config.data, Splitter(config.model.rules), config.model.capacities,
      where, log=lambda line: None, how=how,
    )  # fmt: skip
    assert train.fingerprint == said["fingerprint"]
    assert heldout.fingerprint == said["heldout_fingerprint"]
    batches = loader.make_loader(train, seed=0, batch_size=8)
    rows.append([next(batches) for _ in range(5)])
    batches.close()
  for one, other in zip(*rows, strict=True):
    for name, array in one.items():
      np.testing.assert_array_equal(other[name], array)


@pytest.mark.slow
def test_a_run_over_a_prepared_index_learns_what_any_run_learns(
  tmp_path, monkeypatch, capsys
):
  corpus = tiny_runs.write_corpus(tmp_path / "corpus")
  monkeypatch.setattr(parts, "PART_BYTES", 4000)
  cache = tmp_path / "cache"
  assert prepared(corpus, cache) == 0
  flags = ["--config.train.num_steps=3", "--config.train.log_every_steps=1"]
  build = "--config.data.build_index=False"
  assert tiny_runs.run(corpus, tmp_path / "a", *flags, build) == 2
  assert "has no index of" in capsys.readouterr().err
  where = f"--config.data.cache_dir={cache}"
  assert tiny_runs.run(corpus, tmp_path / "a", *flags, where, build) == 0
  assert "indexing" not in capsys.readouterr().out
  assert tiny_runs.run(corpus, tmp_path / "b", *flags) == 0
  assert "joining" in capsys.readouterr().out
  rows = tiny_runs.rows(tmp_path / "a")
  assert len(rows) >= 3 and rows == tiny_runs.rows(tmp_path / "b")
