"""A run that begins with the parameters of another workdir."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax import terminal
from aunet_jax.aunet import network, sharding
from aunet_jax.train import __main__ as train_main
from aunet_jax.train.setup import set_up
from aunet_jax.workdir import layout, load, origin

ROOT = Path(__file__).parents[2]
TINY = "--config=tests/tiny.py"


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  words = "the byte is small the word is longer 1234 numbers count".split()
  for i in range(40):
    chosen = rng.choice(words, size=int(rng.integers(5, 200)))
    (folder / f"{i}.txt").write_text(" ".join(chosen) + f" {i}\n")
  return folder


@pytest.fixture
def converted(tmp_path) -> Path:
  """A model without training state."""
  config = config_lib.parse_flags([TINY])
  init = jax.jit(network.init_params, static_argnums=0)
  params = sharding.unbox(init(config.model, jax.random.key(7)))
  load.save_params(tmp_path / "converted", config, params)
  return tmp_path / "converted"


def run(corpus, workdir, *flags) -> int:
  return train_main.main(
    [
      TINY,
      f"--workdir={workdir}",
      f"--config.data.train={corpus}",
      "--config.data.heldout_fraction=0.1",
      *flags,
    ]
  )


def rows(workdir) -> list[tuple]:
  return [
    (row["step"], row.get("loss_nats"), row.get("heldout_loss_nats"))
    for row in layout.read_rows(Path(workdir) / "metrics.jsonl")
  ]


def test_parameters_are_taken_and_all_else_is_new(corpus, tmp_path, converted):
  config = config_lib.parse_flags(
    [
      TINY,
      f"--config.data.train={corpus}",
      f"--config.train.init_from={converted}",
      "--config.model.stages[0].capacity=96",
      "--config.mesh.data=2",
      "--config.mesh.fsdp=4",
    ]
  )
  setup = set_up(config, tmp_path / "run")
  source = load.load(converted)
  jax.tree.map(
    np.testing.assert_array_equal, setup.train_state.params, source.params
  )
  assert setup.train_state.step == 0
  moments = jax.tree.leaves(setup.train_state.opt_state)
  assert all(not np.any(np.asarray(x)) for x in moments)
  assert setup.loader.get_state()["next_row"] == 0
  assert json.loads((tmp_path / "run" / origin.FILE).read_text()) == {
    "workdir": str(converted),
    "step": 0,
    "params_hash": origin.params_hash(source.params),
    "splitter_hash": source.splitter.hash,
  }
  setup.log.close()
  setup.loader.close()


def test_a_stopped_run_goes_on_bit_for_bit_when_its_source_is_gone(
  corpus, tmp_path, converted, monkeypatch, capsys
):
  flag = f"--config.train.init_from={converted}"
  short = (flag, "--config.train.num_steps=6")
  assert run(corpus, tmp_path / "whole", *short) == 0
  assert "checkpoint 0 (hash " in capsys.readouterr().out
  real, seen = sharding.to_device, []

  def interrupt(*args):
    seen.append(0)
    if len(seen) == 4:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)

  monkeypatch.setattr(sharding, "to_device", interrupt)
  assert run(corpus, tmp_path / "cut", *short) == terminal.EXIT_STOPPED
  monkeypatch.undo()
  monkeypatch.chdir(ROOT)
  recorded = (tmp_path / "cut" / origin.FILE).read_text()
  shutil.rmtree(converted)
  assert run(corpus, tmp_path / "cut", *short) == 0
  assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
  assert (tmp_path / "cut" / origin.FILE).read_text() == recorded


def check_refused(corpus, workdir, capsys, *flags) -> str:
  """The one line that a refused start prints; it leaves nothing behind."""
  assert run(corpus, workdir, *flags) == terminal.EXIT_BAD_INPUT
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  left = {p.name for p in workdir.glob("*")} if workdir.exists() else set()
  assert left <= {".lock"}
  return error


def test_what_cannot_be_begun_with_is_refused_in_one_line(
  corpus, tmp_path, converted, capsys
):
  flag = f"--config.train.init_from={converted}"
  error = check_refused(
    corpus,
    tmp_path / "run",
    capsys,
    flag,
    "--config.model.stages[1].dim=80",
    "--config.model.stages[1].rule=word@2",
  )
  assert "stages[1].dim is 64 there, 80 here" in error
  assert "stages[1].rule is 'word@1' there, 'word@2' here" in error
  missing = f"--config.train.init_from={tmp_path / 'nowhere'}"
  error = check_refused(corpus, tmp_path / "run", capsys, missing)
  assert "no such workdir" in error
  itself = f"--config.train.init_from={tmp_path / 'run'}"
  error = check_refused(corpus, tmp_path / "run", capsys, itself)
  assert "the --workdir itself" in error
  empty = tmp_path / "empty"
  layout.write_config(empty, config_lib.parse_flags([TINY]))
  error = check_refused(
    corpus, tmp_path / "run", capsys, f"--config.train.init_from={empty}"
  )
  assert "has no checkpoint yet" in error
  # Other tables under the same names, as of another version of the package.
  host = converted / "checkpoints" / "0" / "host" / "metadata"
  host.write_text(host.read_text().replace('h": "', 'h": "00'))
  (converted / "checkpoints" / "0" / "manifest.json").unlink()
  error = check_refused(corpus, tmp_path / "run", capsys, flag)
  assert "splitting tables" in error


def test_a_converted_model_is_not_begun_with_another(
  corpus, converted, tmp_path, capsys
):
  flag = f"--config.train.init_from={tmp_path / 'other'}"
  assert run(corpus, converted, flag) == terminal.EXIT_BAD_INPUT
  assert "holds a converted model already" in capsys.readouterr().err
