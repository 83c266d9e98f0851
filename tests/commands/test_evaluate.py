"""evaluate: its last line, its files, and bad input."""

import json
import os

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
