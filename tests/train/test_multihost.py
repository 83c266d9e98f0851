"""The command line on several processes and meshes of fake CPU devices."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(1)
  words = "one two three 44 five, six. seven\neight (nine) ten".split(" ")
  for i in range(60):
    size = int(rng.integers(10, 150))
    (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, size)))
  return folder


def start(workdir, corpus, num_devices, *flags) -> subprocess.Popen:
  return subprocess.Popen(
    [
      sys.executable, "-m", "aunet_jax.train", "--config=tests/tiny.py",
      f"--workdir={workdir}", f"--config.data.train={corpus}",
      f"--config.train.num_steps={STEPS}", "--config.train.log_every_steps=1",
      "--config.checkpoint.every_steps=7", *flags,
    ],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(num_devices),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


def finish(*processes: subprocess.Popen) -> list[str]:
  """Waits for all; their errors, where any failed."""
  outputs = [process.communicate()[1] for process in processes]
  for process, error in zip(processes, outputs, strict=True):
    assert process.returncode == 0, error
  return outputs


def losses(workdir) -> list[float]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows = [row for row in rows if "loss_nats" in row]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  return [row["loss_nats"] for row in rows]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def two_processes(
  workdir, corpus, *flags, num_devices=2
) -> list[subprocess.Popen]:
  address = f"--coordinator=localhost:{free_port()}"
  return [
    start(
      workdir, corpus, num_devices, address, "--num_processes=2",
      f"--process_id={i}", *flags,
    )
    for i in range(2)
  ]  # fmt: skip


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, corpus) -> list[float]:
  workdir = tmp_path_factory.mktemp("one")
  finish(start(workdir, corpus, 1))
  return losses(workdir)


def test_two_processes_train_as_one(tmp_path, corpus, one_device):
  finish(*two_processes(tmp_path, corpus, "--config.mesh.fsdp=2"))
  np.testing.assert_allclose(losses(tmp_path), one_device, rtol=1e-5)
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    if "loss_nats" in row:  # of the one that waited longest, and which it is
      assert 0 <= row["data_wait_share"] <= 1
      assert row["data_wait_process"] in (0, 1)


def test_processes_that_share_a_batch_shard_read_the_same_rows(
  tmp_path, corpus, one_device
):
  flags = ("--config.mesh.data=1", "--config.mesh.tensor=2")
  finish(*two_processes(tmp_path, corpus, *flags, num_devices=1))
  np.testing.assert_allclose(losses(tmp_path), one_device, rtol=1e-5)


@pytest.mark.slow  # three runs
def test_two_processes_begin_with_a_model_as_one(tmp_path, corpus):
  source, one, two = (tmp_path / name for name in ("source", "one", "two"))
  finish(start(source, corpus, 1))
  flag = f"--config.train.init_from={source}"
  finish(start(one, corpus, 1, flag))
  finish(*two_processes(two, corpus, flag, "--config.mesh.fsdp=2"))
  np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
  assert losses(two)[0] < losses(source)[0] - 0.1  # not a fresh model
  origins = [
    json.loads((run / "init_from.json").read_text()) for run in (one, two)
  ]
  assert origins[0] == origins[1]


@pytest.mark.slow  # a compilation each
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_every_mesh_trains_as_one_device(tmp_path, corpus, one_device, mesh):
  flags = [
    f"--config.mesh.{axis}={size}"
    for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
  ]
  finish(start(tmp_path, corpus, 8, *flags))
  np.testing.assert_allclose(losses(tmp_path), one_device, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("left", [2, 1])
def test_two_processes_train_as_one_though_one_was_killed_in_a_save(
  tmp_path, corpus, one_device, left
):
  flags = ("--config.mesh.fsdp=2", "--heartbeat_timeout=5")
  first, second = two_processes(tmp_path, corpus, *flags)
  checkpoints = tmp_path / "checkpoints"
  while not any(checkpoints.glob("7*")):  # until its save has begun
    assert first.poll() is None and second.poll() is None
    time.sleep(0.001)
  second.kill()
  _, error = first.communicate()  # it ends by itself, and says why
  assert first.returncode not in (0, 75)
  assert "another task died" in error or "error:" in error, error
  second.communicate()
  saved = (checkpoints / "7").exists()
  if left == 2:
    first, second = two_processes(tmp_path, corpus, *flags)
  else:  # the host is gone, and the launch scripts choose this mesh
    flags = ("--config.mesh.fsdp=2", "--config.train.grad_accumulation=2")
    first = second = start(tmp_path, corpus, 2, *flags)
  said, _ = first.communicate()
  assert (first.returncode, second.wait()) == (0, 0)
  assert ("continuing from checkpoint 7" in said) == saved
  np.testing.assert_allclose(losses(tmp_path), one_device, rtol=1e-5)


PATIENCE = 300  # seconds, for anything to happen on a busy machine
LONG = (
  "--config.mesh.fsdp=2", "--config.train.num_steps=100000",
  "--config.data.heldout_fraction=0.2", "--config.checkpoint.every_steps=50000",
)  # fmt: skip


def await_(condition, processes, what: str) -> None:
  end = time.monotonic() + PATIENCE
  while not condition():
    assert time.monotonic() < end, f"no {what} within {PATIENCE} s"
    for process in processes:
      assert process.poll() is None, process.communicate()
    time.sleep(0.005)


def logged(workdir) -> list[dict]:
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith("}")]


def both_stop(processes, workdir) -> int:
  """Both end with 75, and the step of the last row is saved; that step."""
  try:
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
  except subprocess.TimeoutExpired:
    for process in processes:
      process.kill()
    raise
  assert [p.returncode for p in processes] == [75, 75], outputs
  saved = sorted(
    int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()
  )
  steps = [row["step"] for row in logged(workdir) if "loss_nats" in row]
  assert saved[-1] == steps[-1]
  for stdout, _ in outputs[:1]:
    assert "everything is saved" in stdout
  return saved[-1]


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path, corpus):
  processes = two_processes(tmp_path, corpus, *LONG)
  await_(lambda: len(logged(tmp_path)) > 2, processes, "third step")
  processes[1].send_signal(signal.SIGTERM)
  both_stop(processes, tmp_path)


@pytest.mark.slow  # two processes each
@pytest.mark.parametrize(
  "moment", ["in turn", "saving", "evaluating", "compiling", "hangup"]
)
def test_a_stop_at_any_moment_ends_both_processes_alike(
  tmp_path, corpus, moment
):
  flags = [*LONG]
  if moment == "saving":
    flags[-1] = "--config.checkpoint.every_steps=2"
  if moment == "evaluating":
    flags.append("--config.train.eval_every_steps=2")
  processes = two_processes(tmp_path, corpus, *flags)
  first, second = processes
  if moment == "compiling":
    data = tmp_path / "config.json"  # written just before
    await_(data.exists, processes, "end of the set-up")
    second.send_signal(signal.SIGTERM)
  elif moment == "saving":
    saving = tmp_path / "checkpoints"
    await_(lambda: any(saving.glob("*tmp*")), processes, "save")
    second.send_signal(signal.SIGTERM)
  else:
    await_(lambda: len(logged(tmp_path)) > 2, processes, "third step")
    number = signal.SIGHUP if moment == "hangup" else signal.SIGTERM
    second.send_signal(number)
    if moment == "in turn":
      time.sleep(0.3)
      first.send_signal(number)
  step = both_stop(processes, tmp_path)
  assert step < 100000


def test_a_missing_process_is_said_after_the_timeout(tmp_path, corpus):
  process = start(
    tmp_path, corpus, 1, f"--coordinator=localhost:{free_port()}",
    "--num_processes=2", "--process_id=0", "--start_timeout=3",
  )  # fmt: skip
  _, error = process.communicate()
  assert process.returncode == 1, error  # a launcher may try again
  assert "did not all connect within 3 s" in error
