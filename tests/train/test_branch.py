"""A run that branches off another is the run that its own config gives."""

import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax import files, terminal
from aunet_jax.aunet import network, sharding
from aunet_jax.train import __main__ as train_main
from aunet_jax.train import branch
from aunet_jax.workdir import layout, load, origin

ROOT = Path(__file__).parents[2]
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"
STABLE = ("optimizer.schedule=constant", "train.num_steps=6")
# Its rates leave the constant ones with the sixth step.
SHORT = (
  "optimizer.schedule=wsd", "optimizer.decay_steps=2", "train.num_steps=7"
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp("corpus") / "text.txt"
  rng = np.random.default_rng(0)
  words = "the byte is small the word is longer 1234 numbers count".split()
  path.write_text("\n".join(" ".join(rng.choice(words, 40)) for _ in range(80)))
  return path


def run(corpus, workdir, *settings) -> int:
  flags = [
    f"data.train={corpus}", "data.separator=line", "data.heldout_fraction=0.1",
    "train.log_every_steps=1", "train.eval_every_steps=4",
    "checkpoint.every_steps=2", "checkpoint.keep=9", *settings,
  ]  # fmt: skip
  return train_main.main(
    [TINY, f"--workdir={workdir}", *(f"--config.{flag}" for flag in flags)]
  )


@pytest.fixture(scope="module")
def stable(corpus, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("stable") / "run"
  assert run(corpus, workdir, *STABLE) == 0
  return workdir


def rows(workdir) -> list[tuple]:
  names = (
    "step", "bytes_seen", "loss_nats", "grad_norm", "learning_rate",
    "heldout_loss_nats",
  )  # fmt: skip
  found = layout.read_rows(Path(workdir) / layout.METRICS_FILE)
  return [tuple(row.get(name) for name in names) for row in found]


def test_with_the_same_schedule_it_is_the_uninterrupted_run_bit_for_bit(
  corpus, stable, tmp_path, monkeypatch, capsys
):
  """Also where it is killed, and its source is gone by then."""
  source, cut = tmp_path / "source", tmp_path / "cut"
  shutil.copytree(stable, source)
  flags = (*STABLE, f"train.branch_from={source}", "train.branch_step=2")
  real, seen = sharding.to_device, []

  def interrupt(*args):
    seen.append(0)
    if len(seen) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)

  monkeypatch.setattr(sharding, "to_device", interrupt)
  assert run(corpus, cut, *flags) == terminal.EXIT_STOPPED
  monkeypatch.undo()
  said = capsys.readouterr().out
  assert f"parameters of {source}, checkpoint 2 " in said
  told = files.parse_json((cut / origin.BRANCH_FILE).read_text())
  assert told["step"] == 2 and told["workdir"] == str(source)
  assert told["params_hash"] in said
  assert not (cut / origin.FILE).exists()
  assert layout.steps(cut) == [2, 4]
  shutil.rmtree(cut / "checkpoints" / "4")  # as after kill -9
  shutil.rmtree(source)
  assert run(corpus, cut, *flags) == 0
  assert rows(cut) == rows(stable)
  assert layout.read_host(cut, 6) == layout.read_host(stable, 6)
  jax.tree.map(
    np.testing.assert_array_equal,
    load.load(cut).params,
    load.load(stable).params,
  )


@pytest.mark.slow  # two more compiled steps
def test_another_end_is_that_of_a_run_from_step_0(corpus, stable, tmp_path):
  assert run(corpus, tmp_path / "whole", *SHORT) == 0
  flags = (*SHORT, f"train.branch_from={stable}")
  assert run(corpus, tmp_path / "branch", *flags) == 0
  assert layout.steps(tmp_path / "branch") == [4, 6, 7]
  found, expected = (
    np.array(rows(tmp_path / name), float) for name in ("branch", "whole")
  )
  # Another schedule is another compiled program, which rounds otherwise.
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rates_part_where_the_decay_begins():
  def config(*settings):
    return config_lib.parse_flags([TINY, *(f"--config.{s}" for s in settings)])

  def shared(*settings):
    return branch.shared_steps(config(*STABLE), config(*settings), 90)

  # The rate of the first step of a decay is still the peak.
  assert shared(*SHORT) == 5
  assert shared(*STABLE[:1], "train.num_steps=80") == 90
  assert shared("train.num_steps=80") == 2  # cosine: the warmup alone
  assert shared(*STABLE, "optimizer.warmup_steps=3") == 0


def check_refused(corpus, workdir, capsys, *settings) -> str:
  """The one line that a refused start prints; it leaves nothing behind."""
  assert run(corpus, workdir, *settings) == terminal.EXIT_BAD_INPUT
  error = capsys.readouterr().err
  assert error.count("\n") == 1, error
  left = {p.name for p in workdir.glob("*")} if workdir.exists() else set()
  assert left <= {".lock"}
  return error


def test_what_cannot_be_branched_off_is_refused_in_one_line(
  corpus, stable, tmp_path, capsys
):
  def refused(*settings, source=stable):
    named = f"train.branch_from={source}"
    return check_refused(corpus, tmp_path / "run", capsys, named, *settings)

  error = refused(*SHORT, "seed=1", "model.stages[1].dim=80")
  assert (
    "another run than this: model.stages[1].dim: 64 -> 80; seed: 0" in error
  )
  error = refused(*SHORT, "optimizer.learning_rate=1", "optimizer.name=muon")
  assert "learning_rate: 0.00165 -> 1.0; optimizer.name: 'adamw' ->" in error
  assert "no such workdir" in refused(source=tmp_path / "nowhere")
  assert "the --workdir itself" in refused(source=tmp_path / "run")
  error = refused(*SHORT, "train.branch_step=6")
  assert "rate of step 6 is 0.00165 there, 0.000833 here" in error
  assert "its checkpoints are 2, 4, 6" in error
  assert "has no checkpoint 3" in refused(*SHORT, "train.branch_step=3")
  error = refused("optimizer.schedule=constant", "train.num_steps=3",
                  "train.branch_step=4")  # fmt: skip
  assert "train.num_steps=3 leaves no step after" in error
  error = refused("train.num_steps=9", "train.branch_step=4")  # a cosine
  assert "the learning rate of step 3 is" in error
  error = refused("train.init_from=elsewhere")
  assert "set one of them" in error
  error = check_refused(corpus, tmp_path / "run", capsys, "train.branch_step=4")
  assert "needs train.branch_from" in error
  empty = tmp_path / "empty"
  settings = [f"data.train={corpus}", "data.separator=line",
              "data.heldout_fraction=0.1", *SHORT]  # fmt: skip
  config = config_lib.parse_flags([TINY, *(f"--config.{s}" for s in settings)])
  layout.write_config(empty, config)
  assert "has no checkpoint yet" in refused(*SHORT, source=empty)
  init = jax.jit(network.init_params, static_argnums=0)
  params = sharding.unbox(init(config.model, jax.random.key(0)))
  load.save_params(empty, config, params)
  assert "a model without training" in refused(*SHORT, source=empty)


def test_a_damaged_checkpoint_is_passed_over_or_named(
  corpus, stable, tmp_path, capsys
):
  damaged = tmp_path / "damaged"
  shutil.copytree(stable, damaged)
  (damaged / "checkpoints" / "4" / "manifest.json").write_text("{}")
  flags = (*SHORT, f"train.branch_from={damaged}", "train.branch_step=4")
  error = check_refused(corpus, tmp_path / "run", capsys, *flags)
  assert "checkpoint 4 of train.branch_from=" in error and "damaged" in error
  said = []
  config = config_lib.override(
    layout.read_config(damaged), [*SHORT, f"train.branch_from={damaged}"]
  )
  assert branch.find(tmp_path / "run", config, said.append).step == 2
  assert said[0].startswith(f"checkpoint 4 of {damaged} skipped: ")


def test_the_text_must_be_the_same(corpus, stable, tmp_path, capsys):
  other = tmp_path / "text.txt"
  other.write_text(corpus.read_text() + "\none more document")
  source = tmp_path / "source"
  shutil.copytree(stable, source)
  config = layout.read_config(source)
  layout.write_config(
    source, config_lib.override(config, [f"data.train={other}"])
  )
  flags = (*SHORT, f"train.branch_from={source}")
  assert run(other, tmp_path / "run", *flags) == terminal.EXIT_BAD_INPUT
  error = capsys.readouterr().err
  assert f"is not what {source} was trained on" in error
