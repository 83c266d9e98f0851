"""Files of a study: read as they were written, and named where damaged."""

import json
import random
import shutil

import pytest

from aunet_jax.scaling import __main__ as scaling_main
from aunet_jax.scaling import study as study_lib
from tests.scaling.test_collect import GOOD, MODEL, log, write_run
from tests.scaling.test_report import rows, write_numbers

# cell.json as versions before the table's row wrote it.
OLD_CELL = {
  "id": "aunet2-1e11-s0",
  "model": "aunet2",
  "budget_flops": 1e11,
  "size": 1.0,
  "seed": 0,
  "params": 129600,
  "flops_per_byte": 1102080.0,
  "flops_per_byte_with_head": 1200000.0,
  "bytes": 90000.5,
  "ratio": 0.02,
  "useful_flops": 9.1e10,
  "padded_flops": 123456789012,
  "learning_rate": 0.02,
  "batch_bytes": 2048.0,
  "tokenizer": None,
  "bytes_per_token": None,
  "data_fingerprint": "feb8fe6411984de3",
}


def test_a_study_of_an_older_version_is_read(tmp_path):
  workdir = tmp_path / "cells" / OLD_CELL["id"]
  workdir.mkdir(parents=True)
  (workdir / "cell.json").write_text(json.dumps(OLD_CELL))
  (workdir / "plan.json").write_text('{"train": {"num_steps": 44}}')
  about = {"command": "c", "data": None, "data_fingerprint": None}
  about |= {"cells": [OLD_CELL["id"]], "flops_per_second": None}
  (tmp_path / "study.json").write_text(json.dumps(about))
  _, (run,) = study_lib.read_study(tmp_path)
  assert run.planned_data == "feb8fe6411984de3" and run.steps == 44
  assert run.padded_flops == 123456789012 and run.run == f"cells/{run.id}"
  study_lib.write_run(tmp_path / "again", run, '{"train": {"num_steps": 44}}')
  assert study_lib.read_run(tmp_path / "again", run.id) == run


def test_columns_that_no_row_knows_are_left_out(tmp_path):
  some = rows()[:2]
  path = write_numbers(tmp_path / "n.jsonl", some)
  first = json.loads(path.read_text().splitlines()[1])
  assert "tokenizer" not in first and first["excluded"] is None
  assert study_lib.read_table(path).rows == some


# ----- damage ---------------------------------------------------------------

VALUES = (
  *(None, True, 0, -1, 3, 1.5, 1e308, float("nan"), float("inf"), 10**400),
  *("", "x", "²", "\u2028", [], [[]], [1], ["x"], {}, {"a": 1}),
)


def nodes(value, at=()):
  """Paths of everything below a JSON value, itself included."""
  yield at
  items = {dict: lambda v: v.items(), list: enumerate}.get(type(value))
  for key, below in items(value) if items else ():
    yield from nodes(below, (*at, key))


def damage(text: str, rng: random.Random) -> str:
  """A JSON text (or a line of several) with one thing wrong."""
  lines = text.splitlines(keepends=True)
  if len(lines) > 1 and all(line[0] == "{" for line in lines):
    number = rng.randrange(len(lines))
    lines[number] = damage(lines[number], rng) + "\n"
    return "".join(lines)
  if rng.random() < 0.2:
    return text[: rng.randrange(len(text))]
  if rng.random() < 0.2:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice('\0{}[]",:0e²') + text[at + 1 :]
  value = json.loads(text)
  *path, last = rng.choice(list(nodes(value))[1:])
  inside = value
  for key in path:
    inside = inside[key]
  if rng.random() < 0.3:
    del inside[last]
  else:
    inside[last] = rng.choice(VALUES)
  return json.dumps(value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Three seeds of one cell, each as a run that went well."""
  folder = tmp_path_factory.mktemp("finished")
  (folder / "text.txt").write_text("words " * 2000)
  study = folder / "study"
  flags = ["--budgets=1e9", "--seeds=0,1,2", f"--data={folder / 'text.txt'}"]
  plan = ["plan", str(study), f"--models={MODEL}", *flags]
  assert scaling_main.main(plan) == 0
  for seed, workdir in enumerate(sorted((study / "cells").iterdir())):
    write_run(workdir, log(GOOD, 2.3 + 0.01 * seed))
  return study


def check(capsys, name: str, *command: str) -> None:
  """The command works, or says in one line which file it cannot work with."""
  status = scaling_main.main(list(command))
  error = capsys.readouterr().err
  assert status in (0, 2), (status, error)
  assert (status == 2) == (error != "")
  if status:
    assert error.startswith("error: ") and error.count("\n") == 1
    assert name in error, error


@pytest.mark.parametrize(
  "name",
  [
    "study.json",
    *(f"cells/forbudget-1e09-s0/{name}" for name in (
      "cell.json", "plan.json", "state.json", "config.json", "metrics.jsonl",
      "checkpoints/6/host/metadata",
    )),
  ],
)  # fmt: skip
def test_a_damaged_file_of_a_study_is_named(finished, tmp_path, capsys, name):
  study = tmp_path / "study"
  shutil.copytree(finished, study)
  path, whole = study / name, (finished / name).read_text()
  rng = random.Random(name)
  for _ in range(30):
    path.write_text(damage(whole, rng))
    # An id of study.json may be changed to one that is not there.
    said = str(study) if name == "study.json" else path.name
    if name.endswith("plan.json"):  # a study is planned as a whole
      said = "cells/forbudget-1e09-s0"
    check(capsys, said, "run", str(study), "--print")
    check(capsys, "", "fit", str(study), "--bootstrap=50")


def test_a_damaged_table_is_named(tmp_path, capsys):
  path = write_numbers(tmp_path / "numbers.jsonl", rows(["byte"])[:-1])
  whole, rng = path.read_text(), random.Random(0)
  for _ in range(60):
    path.write_text(damage(whole, rng))
    check(capsys, path.name, "fit", str(path), "--bootstrap=50")


def test_damaged_laws_are_named(tmp_path, capsys):
  path, rng = tmp_path / "laws.json", random.Random(0)
  laws = {"learning_rate": [2.0, -0.1], "batch_bytes": [16384, 0]}
  laws["budgets"] = [1e17, 1e19]
  plan = ("plan", "--models=byte", "--budgets=1e18", f"--laws={path}")
  for _ in range(40):
    path.write_text(damage(json.dumps({"byte": laws}), rng))
    check(capsys, path.name, *plan)


@pytest.mark.parametrize(
  "content",
  [
    "loss,params\n2,x\n",
    "loss,params,tokens\n2\n",
    "loss,params,tokens\n2,3,4,5,6\n2,\n",
    "loss,params,tokens\n2,-3,nan\n2,1e400,1\n",
    "loss,params,tokens\n2,\0,3\n",
    'loss,params,tokens\n"2,1,3\n',
    "loss,params,tokens\n" + "9" * 200_000 + ",1,2\n",
  ],
)
def test_damaged_points_are_named(tmp_path, capsys, content):
  path = tmp_path / "points.csv"
  path.write_text(content)
  assert scaling_main.main(["fit", str(path)]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and "points" in error or "be used" in error


@pytest.mark.parametrize(
  "content, message",
  [
    ("def f(", "SyntaxError"),
    ("import no_such_module", "No module named 'no_such_module'"),
    ("def f(budget): return {}['size']", "KeyError: 'size'"),
    ("def f(budget): return 3", "gave a int"),
    ("def f(): pass", "TypeError"),
    ("f = 3", "no function 'f'"),
    ("\0", "null bytes"),
  ],
)
def test_a_users_model_that_fails_is_named(tmp_path, capsys, content, message):
  path = tmp_path / "own.py"
  path.write_text(content)
  plan = ["plan", f"--models={path}:f", "--budgets=1e9"]
  assert scaling_main.main(plan) == 2
  error = capsys.readouterr().err
  assert str(path) in error and message in error and error.count("\n") == 1
