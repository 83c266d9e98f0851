"""Runs whose workdir is in a bucket, against a small server of its API."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs

from aunet_jax import progress
from aunet_jax.evaluate.bits_per_byte import evaluate_workdir
from aunet_jax.workdir import buckets, layout, load

ROOT = Path(__file__).parents[2]
RUN = "gs://bucket/runs/one"
STEPS = 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return tiny_runs.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
  cache = tmp_path_factory.mktemp("cache")
  return [
    f"--config.train.num_steps={STEPS}",
    "--config.train.log_every_steps=1",
    f"--config.data.cache_dir={cache}",
  ]


def losses(rows: str) -> list[tuple[int, float]]:
  rows = map(json.loads, rows.splitlines())
  return [(row["step"], row["loss_nats"]) for row in rows if "loss_nats" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus, flags):
  """(step, loss) of a run on a disk."""
  workdir = tmp_path_factory.mktemp("disk")
  assert tiny_runs.run(corpus, workdir, *flags) == 0
  return losses((workdir / "metrics.jsonl").read_text())


def rows(bucket) -> list[tuple[int, float]]:
  return losses(bucket.objects["runs/one/metrics.jsonl"].data.decode())


@pytest.mark.slow  # three runs
def test_a_run_in_a_bucket(
  corpus, flags, undisturbed, bucket, capsys, monkeypatch, tmp_path
):
  """One scenario: every run compiles."""
  # It needs a disk for its index.
  assert tiny_runs.run(corpus, RUN) == 2
  assert "is a bucket, and the packed index" in capsys.readouterr().err

  # A save that cannot be written ends it, with what was there before.
  fault = bucket.fail("POST", "name=runs/one/checkpoints/6/.*ocdbt", 403)
  assert tiny_runs.run(corpus, RUN, *flags) == 1
  errors = capsys.readouterr().err.splitlines()
  (error,) = [line for line in errors if line.startswith("error: ")]
  assert "checkpoint 6 could not be written" in error
  assert layout.steps(RUN) == [3]
  assert rows(bucket)[:3] == undisturbed[:3]  # all up to the save, at least
  assert ".lock" not in buckets.path(RUN).names()
  fault.times = 0

  # As after kill -9 in a save: part of a checkpoint, and a lock.
  bucket.put("runs/one/checkpoints/6/params/_METADATA", b"part")
  lost = {"host": "elsewhere", "pid": 1, "since": "before"}
  bucket.put("runs/one/.lock", json.dumps(lost).encode())
  monkeypatch.setattr(buckets, "BEAT_SECONDS", 0.1)
  assert tiny_runs.run(corpus, RUN, *flags) == 0
  said = capsys.readouterr().out
  assert "continuing from checkpoint 3" in said
  assert "loss curve: gs://bucket/runs/one/loss_curve.png" in said
  assert rows(bucket) == undisturbed
  assert layout.steps(RUN) == [3, 6, 9]
  assert not Path("gs:").exists()

  # It is looked at, evaluated and loaded.
  assert progress.main([f"--workdir={RUN}"]) == 0
  assert capsys.readouterr().out == f"step {STEPS} checkpoint {STEPS}\n"
  assert load.load(RUN).step == STEPS
  report = evaluate_workdir(RUN, [str(corpus / "1.txt")])
  assert report["bytes"] == (corpus / "1.txt").stat().st_size


# ----- two processes ---------------------------------------------------------


def start(corpus, workdir, bucket, *flags) -> list[subprocess.Popen]:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  return [
    subprocess.Popen(
      [
        sys.executable, "-m", "aunet_jax.train", tiny_runs.TINY,
        f"--workdir={workdir}", f"--config.data.train={corpus}",
        "--config.mesh.fsdp=2", f"--coordinator=localhost:{port}",
        "--num_processes=2", f"--process_id={i}", *flags,
      ],
      cwd=ROOT,
      env={
        **os.environ,
        **bucket.environment,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]  # fmt: skip


def end(processes) -> list[tuple[int, list[str]]]:
  """Status and error lines of each; none may hang."""
  ended = []
  for process in processes:
    _, error = process.communicate(timeout=300)
    lines = [x for x in error.splitlines() if x.startswith("error: ")]
    ended.append((process.returncode, lines))
  return ended


@pytest.mark.slow  # starts of two processes
def test_two_processes_stop_and_go_on(corpus, flags, bucket, tmp_path):
  assert end(start(corpus, tmp_path, bucket, *flags)) == [(0, [])] * 2
  expected = losses((tmp_path / "metrics.jsonl").read_text())
  more = [*flags, "--config.train.num_steps=45"]

  whole = "gs://bucket/runs/whole"
  assert end(start(corpus, whole, bucket, *more)) == [(0, [])] * 2
  data = bucket.objects["runs/whole/metrics.jsonl"].data
  whole = losses(data.decode())
  assert len(expected) == STEPS

  for how in (signal.SIGKILL, signal.SIGTERM):
    processes = start(corpus, RUN, bucket, *more)
    limit, before = time.monotonic() + 60, layout.steps(RUN)
    while layout.steps(RUN) == before:
      assert time.monotonic() < limit
      time.sleep(0.05)
    for process in processes:
      process.send_signal(how)
    wanted = 75 if how == signal.SIGTERM else -9
    assert {status for status, _ in end(processes)} <= {wanted, 0}
  assert end(start(corpus, RUN, bucket, *more)) == [(0, [])] * 2
  assert rows(bucket) == whole


@pytest.mark.slow  # starts of two processes
@pytest.mark.parametrize(
  "path",
  [
    "name=runs/one/checkpoints/6/.*ocdbt.process_1",  # in the background
    "runs/one/.writing-1",  # before it
    "runs/one/checkpoints/9/manifest.json",  # in the last save, by the first
  ],
)
def test_what_one_process_cannot_write_ends_both(corpus, flags, bucket, path):
  bucket.fail("POST", path, 403)
  ended = end(start(corpus, RUN, bucket, *flags))
  for status, lines in ended:
    assert status == 1 and len(lines) == 1, ended
    assert "403" in lines[0] and "continue" in lines[0]
