"""prepare: shards, plans, and what it refuses."""

import json
import pathlib

from aunet_jax import files, prepare
from aunet_jax.data import shards
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
