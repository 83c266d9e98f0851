"""evaluate: its last line, its files, and bad input."""

import json
import os
import shutil

import pytest

from aunet_jax.evaluate import __main__ as evaluate_main
from tests.toy_workdir import TEXTS, write_texts, write_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return write_workdir(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  return write_texts(tmp_path_factory.mktemp("texts"))


def test_the_last_line_is_json(workdir, texts, capsys):
  assert evaluate_main.main([f"--workdir={workdir}", f"--data={texts}"]) == 0
  result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
  assert result["documents"] == len(TEXTS)
  assert set(result["compressors_bits_per_byte"]) == {"gzip -9", "xz -9"}


def test_names_that_are_no_utf8_are_evaluated(workdir, tmp_path, capfdbinary):
  folder = os.fsencode(tmp_path) + b"/\xff\xe9"
  os.mkdir(folder)
  with open(folder + b"/\xfe.txt", "wb") as file:
    file.write(TEXTS[0])
  out = os.fsdecode(folder + b"/scores\xff.jsonl")
  flags = [f"--workdir={workdir}", f"--data={os.fsdecode(folder)}/*.txt"]
  assert evaluate_main.main([*flags, f"--per_document={out}"]) == 0
  with open(out) as file:
    row = json.loads(file.readline())
  assert os.fsencode(row["name"]).endswith(b"\xfe.txt")
  assert row["bytes"] == len(TEXTS[0])


def test_a_separator_cuts_text_files(workdir, tmp_path, capsys):
  (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\nthree\n")
  flags = [f"--workdir={workdir}", f"--data={tmp_path}/a.txt"]
  for separator, expected in [
    ([], (1, 15)),
    (["--separator=line"], (3, 11)),
  ]:
    assert evaluate_main.main([*flags, *separator]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (result["documents"], result["bytes"]) == expected
  with pytest.raises(SystemExit):
    evaluate_main.main([*flags, "--separator="])
  assert "cannot separate" in capsys.readouterr().err


@pytest.mark.parametrize("unroll", [False, True])
def test_a_billion_layers_in_a_config_are_refused(
  workdir, texts, capsys, unroll, tmp_path
):
  shutil.copytree(workdir, tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  content = json.loads(path.read_text())
  content["model"]["unroll_layers"] = unroll
  content["model"]["stages"][0]["num_layers"] = 10**9
  path.write_text(json.dumps(content))
  flags = [f"--workdir={tmp_path}/run", f"--data={texts}"]
  assert evaluate_main.main(flags) != 0
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert "cannot be read" in line and "asks for (1000000000, 32" in line


@pytest.mark.parametrize("stride", [0, -1, 129])
def test_a_stride_that_no_row_has_is_refused(workdir, texts, capsys, stride):
  flags = [f"--workdir={workdir}", f"--data={texts}", f"--stride={stride}"]
  assert evaluate_main.main(flags) == 2
  assert f"--stride={stride} must be from 1 to" in capsys.readouterr().err


def test_scores_that_cannot_be_written_are_said_at_once(workdir, texts, capsys):
  flags = [f"--workdir={workdir}", f"--data={texts}"]
  assert evaluate_main.main([*flags, "--per_document=/no/such/f.jsonl"]) == 2
  captured = capsys.readouterr()
  assert "/no/such" in captured.err and captured.out == ""


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


def test_a_model_of_text_has_no_answers(workdir, texts, capsys):
  flags = [f"--workdir={workdir}", f"--data={texts}", "--answers"]
  assert evaluate_main.main(flags) == 2
  assert "was tuned on conversations" in capsys.readouterr().err
