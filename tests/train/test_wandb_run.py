"""Rows in Weights & Biases, without its server."""

import sys

import pytest

from aunet_jax.train import wandb_run
from tests.tiny_runs import run, tiny, write_corpus


def test_a_missing_library_is_named_at_the_start(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "wandb", None)
  corpus, flag = write_corpus(tmp_path / "corpus"), "--config.train.wandb=mine"
  assert run(corpus, tmp_path / "run", flag) == 2
  assert "pip install 'aunet_jax[wandb]'" in capsys.readouterr().err
  assert not (tmp_path / "run" / "data").exists()  # before anything is read


def test_every_start_of_a_workdir_logs_to_one_run(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  config = tiny(**{"train.wandb": "mine"})
  for step in (1, 2):
    found = wandb_run.WandbRun(tmp_path, config)
    found.row({"step": step, "loss_nats": 1.5, "fill": [0.5], "note": "x"})
    found.row({"step": step, "grad_norm": float("nan")})
    summary = dict(found._run.summary)
    found.close()
    assert summary["loss_nats"] == 1.5 and summary["fill/stage_1"] == 0.5
    assert "note" not in summary and "grad_norm" not in summary
  kept = {
    path.name.rpartition("-")[2] for path in tmp_path.rglob("run-*.wandb")
  }
  name = (tmp_path / wandb_run.ID_FILE).read_text()
  assert kept == {f"{name}.wandb"}
