"""The training step, and runs that stop, resume, or are asked the wrong thing.

The runs are real: the command line in this process or another, on real files.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax import terminal
from aunet_jax.aunet import sharding
from aunet_jax.generate.generator import Generator
from aunet_jax.train import __main__ as train_main
from aunet_jax.train import loop
from aunet_jax.train import step as step_lib
from aunet_jax.workdir import layout, load
from tests.tiny_runs import (
  TEXT,
  TINY,
  new_params,
  rows,
  run,
  tiny,
  write_corpus,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture
def corpus(tmp_path) -> Path:
  return write_corpus(tmp_path / "corpus")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
  """The workdir of a run that has ended; its corpus lies beside it."""
  folder = tmp_path_factory.mktemp("finished")
  write_corpus(folder / "corpus")
  monkeypatch = pytest.MonkeyPatch()
  monkeypatch.chdir(ROOT)
  assert (
    run(folder / "corpus", folder / "run", "--config.train.num_steps=6") == 0
  )
  monkeypatch.undo()
  return folder / "run"


# ----- the step -------------------------------------------------------------


def test_a_run_that_stays_nonfinite_stops_and_says_where(
  corpus, tmp_path, capsys
):
  status = run(
    corpus,
    tmp_path / "run",
    "--config.optimizer.learning_rate=1e18",
    "--config.optimizer.warmup_steps=0",
    "--config.train.max_nonfinite_steps=3",
    "--config.train.num_steps=50",
  )
  assert status == 1
  error = capsys.readouterr().err
  assert "not finite in the last 3 steps" in error
  assert "learning_rate=1e+18" in error


@pytest.fixture
def broken_at_5(monkeypatch) -> list[int]:
  """Parameters that turn to NaN before the fifth call of the step.

  Yields: a hash of the batch of every call.
  """
  real, batches = step_lib.compile_step, []

  def compile_step(*arguments):
    step_fn = real(*arguments)

    def broken(train_state, batch):
      batches.append(hash(np.asarray(batch["bytes"]).tobytes()))
      if len(batches) == 5:
        nan = jax.tree.map(lambda x: x * jnp.nan, train_state.params)
        train_state = train_state.replace(params=nan)
      return step_fn(train_state, batch)

    broken.as_text = step_fn.as_text
    return broken

  monkeypatch.setattr(loop, "compile_step", compile_step)
  return batches


def test_a_run_goes_back_and_past_the_data_that_broke_it(
  corpus, tmp_path, capsys, broken_at_5
):
  flags = (
    "--config.train.max_nonfinite_steps=3", "--config.train.max_roll_backs=1"
  )  # fmt: skip
  assert run(corpus, tmp_path / "run", *flags) == 0
  # Steps 5 to 7 were skipped, and read when step 8 ran or 7 was logged.
  assert "back to checkpoint 3" in capsys.readouterr().out
  logged = layout.read_rows(tmp_path / "run" / "metrics.jsonl")
  (back,) = [row for row in logged if "rolled_back_from" in row]
  given_up = back["rolled_back_from"] - 3
  assert back["rows_given_up"] == 8 * given_up
  assert len(broken_at_5) == 12 + given_up
  assert len(set(broken_at_5)) == len(broken_at_5)  # no batch comes again
  losses = [row for row in logged if "loss_nats" in row]
  assert [row["step"] for row in losses] == [2, 4, 6, 8, 10, 12]
  assert all(row["loss_nats"] is not None for row in losses)
  assert layout.steps(tmp_path / "run")[-1] == 12


def test_without_a_checkpoint_to_go_back_to_the_run_stops(
  corpus, tmp_path, capsys, broken_at_5
):
  flags = (
    "--config.train.max_nonfinite_steps=3", "--config.train.max_roll_backs=1",
    "--config.checkpoint.every_steps=100",
  )  # fmt: skip
  assert run(corpus, tmp_path / "run", *flags) == 1
  assert "not finite in the last 3 steps" in capsys.readouterr().err


def test_the_level_head_trains_and_writes(corpus, tmp_path):
  flags = ("--config.model.level_loss_weight=0.5", "--config.train.num_steps=4")
  assert run(corpus, tmp_path / "run", *flags) == 0
  logged = layout.read_rows(tmp_path / "run" / "metrics.jsonl")
  losses = [row["level_loss_nats"] for row in logged if "loss_nats" in row]
  assert len(losses) == 2 and 0 < losses[1] < losses[0] < 2
  writer = Generator.from_workdir(tmp_path / "run")
  for levels in ("rule", "head"):
    (row,) = writer.generate([b"The "], max_bytes=8, levels=levels)
    assert len(row.levels) == len(row.data)


# ----- stopping and resuming ------------------------------------------------


def test_resume_after_a_signal_logs_what_an_uninterrupted_run_logs(
  corpus, tmp_path, monkeypatch
):
  assert run(corpus, tmp_path / "whole") == 0
  # A signal that arrives while step 5 is being absorbed.
  real, seen = sharding.to_device, []

  def interrupt(*args):
    seen.append(0)
    if len(seen) == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)

  monkeypatch.setattr(sharding, "to_device", interrupt)
  assert run(corpus, tmp_path / "cut") == terminal.EXIT_STOPPED
  monkeypatch.undo()
  monkeypatch.chdir(ROOT)
  assert layout.steps(tmp_path / "cut")[-1] not in (3, 6, 9, 12)
  assert run(corpus, tmp_path / "cut") == 0
  assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_kill_9_at_any_step_then_the_same_command_repeats_every_loss(
  corpus, tmp_path
):
  command = [
    sys.executable, "-m", "aunet_jax.train", TINY,
    f"--config.data.train={corpus}", "--config.data.heldout_fraction=0.1",
    "--config.train.num_steps=40", "--config.checkpoint.every_steps=4",
    "--config.train.eval_every_steps=6",
  ]  # fmt: skip
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}

  def start(workdir):
    return subprocess.Popen(
      [*command, f"--workdir={workdir}"],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  whole = start(tmp_path / "whole")
  assert whole.wait() == 0, whole.stderr.read()
  kills = 0
  for after_steps in (7, 40):
    process = start(tmp_path / "cut")
    metrics_path = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None:
      logged = rows(tmp_path / "cut") if metrics_path.exists() else []
      if logged and logged[-1][0] >= after_steps:
        break
      time.sleep(0.01)
    if process.poll() is None and after_steps < 40:
      process.kill()
      kills += 1
    process.wait()
  assert kills == 1
  assert process.returncode == 0, process.stderr.read()
  assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_finished_run_says_so_and_changes_nothing(corpus, tmp_path, capsys):
  assert run(corpus, tmp_path / "run") == 0
  before = rows(tmp_path / "run")
  assert run(corpus, tmp_path / "run") == 0
  assert "held-out text" in capsys.readouterr().out
  assert rows(tmp_path / "run") == before
  more = ("--config.train.num_steps=14", "--accept_learning_rate")
  assert run(corpus, tmp_path / "run", *more) == 0
  assert rows(tmp_path / "run")[-1][0] == 14


# ----- bad input ------------------------------------------------------------


@pytest.mark.parametrize(
  ("flag", "named"),
  [
    ("--config.seed=1", "seed: 0 -> 1"),
    ("--config.model.stages[1].dim=80", "model.stages[1].dim: 64 -> 80"),
    ("--config.model.stages[1].rule=word@2", "model.stages[1].rule"),
    ("--config.optimizer.learning_rate=0.1", "optimizer.learning_rate"),
    ("--config.data.text_field=body", "data.text_field"),
    ("--config.train.num_steps=4", "train.num_steps: 6 -> 4"),
  ],
)
def test_a_workdir_of_another_config_is_refused(finished, capsys, flag, named):
  corpus = finished.parent / "corpus"
  assert run(corpus, finished, "--config.train.num_steps=6", flag) == 2
  error = capsys.readouterr().err
  assert named in error and "another --workdir" in error


def test_a_model_without_training_state_trains_on_anything(
  corpus, tmp_path, capsys
):
  config = tiny()
  load.save_params(
    tmp_path / "run",
    config,
    new_params(config.model, jax.random.key(0)),
  )
  assert run(corpus, tmp_path / "run", "--config.model.stages[1].dim=80") == 2
  assert "model.stages[1].dim" in capsys.readouterr().err
  flags = (
    "--config.optimizer.learning_rate=1e-4",
    "--config.train.num_steps=3",
  )
  assert run(corpus, tmp_path / "run", *flags) == 0
  assert "data.train: 'python'" in capsys.readouterr().out


def test_what_may_change_between_starts_changes_and_is_said(
  corpus, tmp_path, capsys
):
  assert run(corpus, tmp_path / "run", "--config.train.num_steps=3") == 0
  flags = (
    "--config.mesh.data=2", "--config.mesh.fsdp=4",
    "--config.train.log_every_steps=1", "--config.model.stages[0].remat=full",
    "--config.train.num_steps=5", "--accept_learning_rate",
  )  # fmt: skip
  assert run(corpus, tmp_path / "run", *flags) == 0
  out = capsys.readouterr().out
  for field in ("mesh.data", "log_every_steps", "remat", "num_steps: 3 -> 5"):
    assert field in out
  assert rows(tmp_path / "run")[-1][0] == 5


def test_a_run_reads_its_index_whatever_becomes_of_the_sources(
  corpus, tmp_path, capsys
):
  workdir = tmp_path / "run"
  assert run(corpus, workdir, "--config.train.num_steps=3") == 0
  (corpus / "0.txt").write_text("something else entirely\n")
  assert run(corpus, workdir, "--config.train.num_steps=4") == 0
  assert "goes on with the index it began with" in capsys.readouterr().out
  shutil.rmtree(workdir / "data")
  assert run(corpus, workdir, "--config.train.num_steps=5") == 2
  assert "files were added, removed or edited" in capsys.readouterr().err


def test_two_runs_do_not_share_a_workdir(finished, capsys):
  corpus = finished.parent / "corpus"
  with layout.lock_workdir(finished):
    assert run(corpus, finished, "--config.train.num_steps=6") == 2
  assert "another process is training in" in capsys.readouterr().err
  assert run(corpus, finished, "--config.train.num_steps=6") == 0


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config.sed=1"], "seed"),
    (["--config.seed=-1"], "seed=-1"),
    (["--config.model.vocab_size=100"], "vocab_size=100 must be at least 258"),
    (["--config.optimizer.learning_rate=nan"], "positive number"),
    (["--config.optimizer.beta2=1.5"], "beta2=1.5 must be 0 to 1"),
    (["--config.model.stages[0].num_kv_heads=0"], "num_kv_heads=0"),
    (["--config.train.eval_bytes=-3"], "eval_bytes=-3"),
    (["--config.train.sample_prompt=" + "x" * 200], "200 bytes"),
    (["--config.train.num_step=1"], "num_steps"),
    (["--config.seed=x"], "invalid literal for int"),
    (["--config.model.stages[0].dim=33"], "multiple of head_dim=16"),
    (["--config.train.batch_size=12"], "multiple of 8"),
    (["--config.model.stages[0].capacity=1000000000"], "1,000,000,000 positio"),
    (["--config.data.num_workers=1000000"], "must be 0 to 1024"),
    (["--config.mesh.data=3"], "needs 3 devices but there are 8"),
    (["--config.data.train=/no/such/place"], "/no/such/place"),
    (["--config.optimizer.schedule=cosin"], "cosine"),
    (["--config.optimizer.warmup_steps=12"], "num_steps=12"),
    (["--config.model.stages[1].rule=wrod@1"], "wrod@1"),
    (["--nonsense=1"], "nonsense"),
  ],
)
def test_bad_settings_are_named(corpus, tmp_path, capsys, flags, message):
  assert run(corpus, tmp_path / "run", *flags) == 2
  error = capsys.readouterr().err
  assert message in error and "Traceback" not in error


def test_a_missing_config_file_is_named(tmp_path, capsys):
  status = train_main.main(
    ["--config=configs/nope.py", f"--workdir={tmp_path}"]
  )
  assert status == 2
  assert "configs/nope.py" in capsys.readouterr().err


def test_an_empty_data_path_is_an_error(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  assert run(tmp_path / "empty", tmp_path / "run") == 2
  assert "empty" in capsys.readouterr().err


def test_bytes_that_are_no_text_train_where_one_insists(tmp_path):
  (tmp_path / "noise").mkdir()
  noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8)
  (tmp_path / "noise" / "a.bin").write_bytes(noise.tobytes())
  assert (
    run(
      f"text:{tmp_path / 'noise'}",
      tmp_path / "run",
      "--config.train.num_steps=3",
      "--config.data.heldout_fraction=0",
    )
    == 0
  )


def test_bad_jsonl_lines_are_skipped_counted_and_shown(tmp_path, capsys):
  good = json.dumps({"text": TEXT * 3})
  lines = [good] * 300 + ["{not json", json.dumps({"body": "x"})]
  (tmp_path / "d.jsonl").write_text("\n".join(lines))
  flags = ("--config.train.num_steps=3", "--config.data.heldout_fraction=0")
  assert run(tmp_path / "d.jsonl", tmp_path / "run", *flags) == 0
  assert "skipped" in capsys.readouterr().out


def test_a_full_disk_during_a_checkpoint_is_a_clear_error(corpus, tmp_path):
  """Files may grow to 100 kB, less than the parameters need."""
  process = subprocess.run(
    [
      sys.executable, "-m", "aunet_jax.train", TINY,
      f"--config.data.train={corpus}", f"--workdir={tmp_path / 'run'}",
      "--config.data.heldout_fraction=0.1",
      "--config.model.stages[1].dim=128",
    ],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    preexec_fn=lambda: resource.setrlimit(
      resource.RLIMIT_FSIZE, (100_000, 100_000)
    ),
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert process.returncode == 1, process.stderr
  assert "Traceback" not in process.stderr  # JAX's cache may warn
  said = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
  assert len(said) == 1, process.stderr
  assert said[0].startswith("error: checkpoint 3 could not be written")
  assert layout.steps(tmp_path / "run") == []


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 8 MB."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
  try:
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
  except FileNotFoundError:
    mounted = False
  if not mounted:
    pytest.skip("mounting a small file system needs root")
  yield disk
  subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_too_small_for_a_checkpoint_is_said_before_it_is_written(
  corpus, small_disk, capsys
):
  flags = ("--config.model.stages[1].dim=256", "--config.train.num_steps=4")
  assert run(corpus, small_disk / "run", *flags) == 1
  error = capsys.readouterr().err
  assert "MB free; free some space" in error
  assert layout.steps(small_disk / "run") == []


@pytest.mark.parametrize("flag", ["--workdir", "--config.data.cache_dir"])
def test_a_url_to_write_to_is_refused_at_the_start(
  flag, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  flags = {"--workdir": str(tmp_path / "run"), flag: "s3://bucket/run"}
  config = f"--config={ROOT / 'tests' / 'tiny.py'}"
  status = train_main.main([config, *(f"{k}={v}" for k, v in flags.items())])
  assert status == 2
  assert f"{flag[2:].removeprefix('config.')}=s3://bucket/run is a URL" in (
    capsys.readouterr().err
  )
  assert not (tmp_path / "s3:").exists()
