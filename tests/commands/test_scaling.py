"""scaling: what cannot be planned is said."""

from pathlib import Path

import pytest

from aunet_jax.scaling import __main__ as scaling_main
from tests.scaling.test_plan import plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--models=aunet5", "--budgets=1e19"], "'aunet5' is no model"),
    (["--models=stride@1", "--budgets=1e19"], "'stride@1' is no model"),
    (["--models=no.py:f", "--budgets=1e19"], "no file 'no.py'"),
    (["--models=tests/tiny.py:f", "--budgets=1e19"], "no function 'f'"),
    (["--models=aunet2", "--budgets=1e2"], "no model has about"),
    (["--models=aunet2,aunet2", "--budgets=1e19"], "would be called"),
    (["--models=aunet2", "--budgets=1e19", "--ratio=-1"], "--ratio=-1"),
    (["--models=aunet2", "--budgets=1e19", "--set=a"], "--set=a"),
    (
      ["--models=aunet2", "--budgets=1e19", "--set=train.x=1"],
      "--config.train.x is not a setting",
    ),
    (["--models=aunet2", "--budgets=1e19", "--data=/no/such"], "/no/such"),
    (["study", "--models=aunet2", "--budgets=1e19"], "--data is missing"),
    (
      ["--models=byte,aunet2", "--budgets=1e19", "--set=train.eval_bytes=9"],
      "sets train.eval_bytes",
    ),
  ],
)
def test_what_cannot_be_planned_is_named(flags, message, capsys):
  assert plan(*flags) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "x", "-1", "1e19,0", "inf"])
def test_budgets_are_numbers_above_zero(value, capsys):
  with pytest.raises(SystemExit) as stop:
    plan("--models=aunet2", f"--budgets={value}")
  assert stop.value.code == 2
  assert "numbers above 0" in capsys.readouterr().err


def test_a_directory_that_is_no_study_is_refused(tmp_path, capsys):
  assert scaling_main.main(["run", str(tmp_path)]) == 2
  assert "scaling plan" in capsys.readouterr().err
  (tmp_path / "study.json").write_text("{")
  assert scaling_main.main(["run", str(tmp_path)]) == 2
  assert "damaged" in capsys.readouterr().err
  (tmp_path / "study.json").write_text('{"cells": ["a"], "data": null}')
  assert scaling_main.main(["run", str(tmp_path)]) == 2
  assert "not as it was planned" in capsys.readouterr().err
