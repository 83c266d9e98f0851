"""Runs whose checkpoints were damaged, and runs that were hurt while running.

`benchmarks/faults.py` and `benchmarks/stops.py` hurt more of them, for longer.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aunet_jax.train import __main__ as train_main
from aunet_jax.train import metrics
from aunet_jax.workdir import layout, load, manifest
from benchmarks import faults, stops

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def run(folder: Path, *flags) -> int:
  """Nine steps, a checkpoint every three, in folder/run."""
  return train_main.main(
    [
      "--config=tests/tiny.py",
      f"--workdir={folder / 'run'}",
      f"--config.data.train={(folder / 'corpus').resolve()}",
      "--config.data.heldout_fraction=0",
      "--config.train.num_steps=9",
      "--config.train.log_every_steps=1",
      "--accept_learning_rate",  # some go on for more steps
      *flags,
    ]
  )


def losses(folder: Path) -> list[tuple[int, float, int]]:
  rows = metrics.read_rows(folder / "run" / "metrics.jsonl")
  return [(row["step"], row["loss_nats"], row["bytes_seen"]) for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
  """A folder with a corpus, and a run that went to its end undisturbed."""
  folder = tmp_path_factory.mktemp("finished")
  (folder / "corpus").mkdir()
  rng = np.random.default_rng(0)
  words = "one two three 44 five, six. seven\neight (nine) ten".split(" ")
  for i in range(40):
    chosen = rng.choice(words, size=int(rng.integers(10, 150)))
    (folder / "corpus" / f"{i}.txt").write_text(" ".join(chosen))
  monkeypatch = pytest.MonkeyPatch()
  monkeypatch.chdir(ROOT)
  assert run(folder) == 0
  monkeypatch.undo()
  return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
  """The finished run, its corpus in the same place, to be damaged."""
  shutil.copytree(finished / "run", tmp_path / "run")
  (tmp_path / "corpus").symlink_to(finished / "corpus")
  return tmp_path


def checkpoints(folder: Path) -> list[str]:
  return sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())


def largest(step: Path) -> Path:
  """The file that holds the numbers of the parameters."""
  return max(step.glob("params/**/d/*"), key=lambda path: path.stat().st_size)


def truncate(step: Path) -> None:
  path = largest(step)
  path.write_bytes(path.read_bytes()[:-100])


def flip(step: Path) -> None:
  data = bytearray(largest(step).read_bytes())
  data[len(data) // 2] ^= 1
  largest(step).write_bytes(data)


DAMAGES = {
  "truncated": (truncate, "is 100 bytes short"),
  "flipped": (flip, "has other bytes than were written"),
  "missing": (lambda step: largest(step).unlink(), "is missing"),
  "host": (
    lambda step: (step / "host" / "metadata").write_text("{}"),
    "host/metadata is",
  ),
  "part": (lambda step: shutil.rmtree(step / "optimizer"), "is missing"),
  "manifest": (
    lambda step: (step / manifest.FILE).write_text("{}"),
    "its manifest.json is damaged",
  ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_seen(copy, name):
  damage, said = DAMAGES[name]
  step = copy / "run" / "checkpoints" / "9"
  assert manifest.damage(step) is None
  damage(step)
  assert said in manifest.damage(step)


def test_any_flipped_bit_of_any_file_is_seen(copy):
  step = copy / "run" / "checkpoints" / "9"
  rng = np.random.default_rng(0)
  for path in [*step.glob("*/**/*"), step / manifest.FILE]:
    if path.is_file():
      whole = path.read_bytes()
      data = bytearray(whole)
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
      path.write_bytes(data)
      assert manifest.damage(step) is not None, path
      path.write_bytes(whole)
  assert manifest.damage(step) is None


def test_training_goes_on_from_the_newest_whole_checkpoint(
  copy, finished, capsys
):
  directory = copy / "run" / "checkpoints"
  truncate(directory / "9")
  flip(directory / "6")
  assert run(copy) == 0
  said = capsys.readouterr().out
  assert "checkpoint 9 skipped: params/" in said and "100 bytes short" in said
  assert "checkpoint 6 skipped: params/" in said and "(checksum)" in said
  assert "continuing from checkpoint 3" in said
  assert losses(copy) == losses(finished)  # rows past step 3 were repeated
  names = checkpoints(copy)
  assert names == ["3", "6", "9", "damaged-6", "damaged-9"]
  assert manifest.damage(directory / "9") is None  # saved again
  truncate(directory / "9")  # the same step, a second time
  assert run(copy) == 0
  assert checkpoints(copy) == names


def test_no_whole_checkpoint_is_an_error_and_nothing_is_moved(copy, capsys):
  directory = copy / "run" / "checkpoints"
  for step in (3, 6, 9):
    flip(directory / str(step))
  for _ in range(2):
    assert run(copy) == 2
    error = capsys.readouterr().err
    assert "no checkpoint in" in error and "3: params/" in error
  assert checkpoints(copy) == ["3", "6", "9"]
  with pytest.raises(layout.CheckpointError, match="is undamaged"):
    load.load(copy / "run")


def test_a_model_is_loaded_from_the_newest_whole_checkpoint(copy, capsys):
  directory = copy / "run" / "checkpoints"
  shutil.rmtree(directory / "9" / "optimizer")  # no part of the model
  assert load.load(copy / "run").step == 9
  flip(directory / "9")
  assert load.load(copy / "run").step == 6
  assert "checkpoint 9 skipped: params/" in capsys.readouterr().err
  assert checkpoints(copy) == ["3", "6", "9"]


def test_a_checkpoint_of_an_older_version_is_taken_and_said(
  copy, finished, capsys
):
  directory = copy / "run" / "checkpoints"
  for step in (6, 9):
    (directory / str(step) / manifest.FILE).unlink()
  shutil.rmtree(directory / "9")
  assert run(copy) == 0
  assert "checkpoint 6 has no manifest.json" in capsys.readouterr().out
  assert losses(copy) == losses(finished)
  shutil.rmtree(directory / "9" / "optimizer")
  (directory / "9" / manifest.FILE).unlink()
  assert run(copy) == 2
  error = capsys.readouterr().err
  assert "its optimizer state is missing" in error
  assert "continue from checkpoint 6" in error


def test_a_save_cut_off_before_its_manifest_is_no_checkpoint(copy, monkeypatch):
  """The manifest must be there when the checkpoint becomes visible."""
  seen = []
  real = manifest.write

  def write(folder):
    seen.append((folder.name, checkpoints(copy)))
    real(folder)

  monkeypatch.setattr(manifest, "write", write)
  assert run(copy, "--config.train.num_steps=12") == 0
  ((name, visible),) = seen
  assert name.startswith("12.") and "12" not in visible
  steps = layout.steps(copy / "run")
  assert steps == [6, 9, 12]
  for step in steps:
    assert (copy / "run" / "checkpoints" / str(step) / manifest.FILE).exists()


def test_a_full_disk_leaves_the_checkpoint_it_names(copy, monkeypatch, capsys):
  """The one before the refused one, still being written then, is whole."""
  real, usage = manifest.write, shutil.disk_usage

  def write_slowly(folder):
    time.sleep(0.5)
    real(folder)
    monkeypatch.setattr(
      shutil, "disk_usage", lambda path: usage(path)._replace(free=10)
    )

  monkeypatch.setattr(manifest, "write", write_slowly)
  assert run(copy, "--config.train.num_steps=18") == 1
  error = capsys.readouterr().err
  assert "checkpoint 15 needs" in error
  assert "continue from checkpoint 12" in error
  assert layout.steps(copy / "run")[-1] == 12


LOADER = """
import sys, time
from aunet_jax import config, splitting
from aunet_jax.data import corpora, loader

if __name__ == "__main__":
  settings = config.DataConfig(train=sys.argv[1], heldout_fraction=0)
  corpus, _ = corpora.open_corpora(
    settings, splitting.Splitter(["word@1"]), (128, 32), cache_dir=sys.argv[2]
  )
  loader = loader.make_loader(corpus, seed=0, batch_size=2, num_workers=2)
  next(loader)
  print("reading", flush=True)
  time.sleep(600)
"""


def children(pid: int) -> list[int]:
  return [
    int(child)
    for path in Path(f"/proc/{pid}/task").glob("*/children")
    for child in path.read_text().split()
  ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_kill_9_leaves_no_data_workers(finished, tmp_path):
  (tmp_path / "loader.py").write_text(LOADER)
  process = subprocess.Popen(
    [
      sys.executable,
      str(tmp_path / "loader.py"),
      str(finished / "corpus"),
      str(tmp_path / "cache"),
    ],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  while process.stdout.readline() != "reading\n":
    assert process.poll() is None
  workers = children(process.pid)
  assert len(workers) >= 2
  process.kill()
  process.wait()
  end = time.monotonic() + 30
  while any(Path(f"/proc/{pid}").exists() for pid in workers):
    assert time.monotonic() < end, f"still alive: {workers}"
    time.sleep(0.05)


@pytest.mark.slow  # many starts of whole runs
def test_a_run_outlives_a_fault_of_each_kind():
  """Runs are killed, stopped, cut off while saving; files hurt, disks full."""
  result = subprocess.run(
    [
      sys.executable, "-m", "benchmarks.faults", "--steps=96",
      f"--faults={len(faults.KINDS)}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert result.returncode == 0, result.stdout + result.stderr
  report = json.loads(result.stdout.splitlines()[-1])
  assert report["faults"] == len(faults.KINDS)


class Shells:
  """Two shells as the processes of a run that ends at SIGTERM as told."""

  started_at = 0.0

  def __init__(self, *at_term: str):
    self.processes = [
      subprocess.Popen(
        ["bash", "-c", f"trap '{command}' TERM; echo; sleep 9 & wait; wait"],
        stdout=subprocess.PIPE,
      )
      for command in at_term
    ]
    for process in self.processes:
      process.stdout.readline()  # the trap is set

  def said(self, number: int) -> str:
    return f"of {number}"

  def end(self, patience: float) -> None:
    for process in self.processes:
      process.kill()
      process.wait()
      process.stdout.close()


def test_an_end_of_another_kind_or_none_is_a_broken_promise(monkeypatch):
  monkeypatch.setattr(stops, "MARGIN_SECONDS", 0.5)
  monkeypatch.setattr(stops.time, "sleep", lambda _: None)
  for at_term, broken in [
    (("exit 75", "exit 75"), None),
    (("exit 75", "exit 3"), "status 3 after term, .* not .*of 1"),
    (("exit 75", ""), "hangs after term, .*\\(\\[75, None\\]\\):\nof 1"),
  ]:
    run = Shells(*at_term)
    rng = random.Random(1)
    monkeypatch.setattr(rng, "randint", lambda low, high: high)  # all of them
    if broken is None:
      happened = stops.stop(run, "term", rng, slow=1)
      assert (happened["victims"], happened["statuses"]) == ([0, 1], [75, 75])
    else:
      with pytest.raises(faults.Broken, match=f"(?s){broken}"):
        stops.stop(run, "term", rng, slow=1)
      run.end(0)
  # Before Python has begun it is final, and the other one waits in vain.
  run = Shells("trap - TERM; kill $$", "sleep 1; exit 1")
  run.started_at = time.monotonic()
  statuses = stops.stop(run, "term", rng, slow=1)["statuses"]
  assert statuses == [-signal.SIGTERM, 1]
  run = Shells("", "")
  killed = stops.stop(run, "kill_all", rng, slow=1)
  assert killed["statuses"] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize(
  "flags",
  [
    # kill -9 of one process while it trains; SIGTERM is in test_multihost.
    ("--stops=1", "--seed=0", "--kinds=kill_one", "--slow=4"),
    pytest.param(("--stops=8", "--seed=1"), marks=pytest.mark.slow),
  ],
)
def test_two_processes_outlive_stops(flags):
  result = subprocess.run(
    [sys.executable, "-m", "benchmarks.stops", "--json", *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  report = json.loads(result.stdout.splitlines()[-1])
  assert f"--stops={report['stops']}" == flags[0]
  assert report["starts"] > report["stops"]
