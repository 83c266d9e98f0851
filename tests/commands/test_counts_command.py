"""counts: what it prints, and mistakes in its flags."""

import json
import pathlib

import numpy as np
import pytest

from aunet_jax.counts import main

ROOT = pathlib.Path(__file__).parents[2]


CONFIG = "--config=configs/aunet3_1b.py"


def test_json_and_table_say_the_same(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert main([CONFIG, "--json", "--contraction=4.92,7.16"]) == 0
  result = json.loads(capsys.readouterr().out)
  positions = [stage["positions"] for stage in result["stages"]]
  assert np.divide(positions[0], positions[1:]) == pytest.approx([4.92, 7.16])
  assert max(np.divide(positions, (8192, 1664, 1144))) == pytest.approx(1)
  assert result["useful_over_padded"] < 1
  assert main([CONFIG, "--config.model.upsampling=simple"]) == 0
  text = capsys.readouterr().out
  assert "paper's accounting" in text
  assert all(len(line) <= 80 for line in text.splitlines())


def test_the_memory_of_the_optimizer_is_that_of_the_run(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)

  def counted(*settings):
    assert main(["--config=tests/tiny.py", "--json", *settings]) == 0
    return json.loads(capsys.readouterr().out)

  adamw = counted()["memory_bytes"]
  muon = counted("--config.optimizer.name=muon")["memory_bytes"]
  assert adamw["optimizer"] == pytest.approx(2 * adamw["parameters"], rel=1e-3)
  assert adamw["parameters"] < muon["optimizer"] < 0.7 * adamw["optimizer"]
  conv = counted("--config.model.stages[0].conv=4")["stages"][0]["parameters"]
  plain = counted()["stages"][0]["parameters"]
  assert conv["taps"] == 2 * 4 * 32  # a block on each path
  assert conv["norms"] == plain["norms"] and "taps" not in plain


@pytest.mark.parametrize(
  "arguments",
  [
    [],
    ["--config=configs/absent.py"],
    [CONFIG, "--config.model.upsamplin=simple"],
    [CONFIG, "--contraction=4.92"],
    [CONFIG, "--positions=8192,x,1"],
    [CONFIG, "--positions=9000,1,1"],
    [CONFIG, "--positions=8192"],
    [CONFIG, "--contraction=4.92,-1"],
  ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert main(arguments) == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("error: ")
  assert captured.err.count("\n") == 1
