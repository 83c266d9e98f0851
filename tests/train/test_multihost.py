"""The command line on several processes and meshes of fake CPU devices."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 20


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
  workdir, corpus, *flags, num_devices=4
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


def test_processes_that_share_a_batch_shard_read_the_same_rows(
  tmp_path, corpus, one_device
):
  flags = ("--config.mesh.data=1", "--config.mesh.tensor=2")
  finish(*two_processes(tmp_path, corpus, *flags, num_devices=1))
  np.testing.assert_allclose(losses(tmp_path), one_device, rtol=1e-5)


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
def test_two_processes_train_as_one_though_one_was_killed_in_a_save(
  tmp_path, corpus, one_device
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
  first, second = two_processes(tmp_path, corpus, *flags)
  said, _ = first.communicate()
  assert (first.returncode, second.wait()) == (0, 0)
  assert ("continuing from checkpoint 7" in said) == saved
  np.testing.assert_allclose(losses(tmp_path), one_device, rtol=1e-5)


def test_a_missing_process_is_said_after_the_timeout(tmp_path, corpus):
  process = start(
    tmp_path, corpus, 1, f"--coordinator=localhost:{free_port()}",
    "--num_processes=2", "--process_id=0", "--start_timeout=3",
  )  # fmt: skip
  _, error = process.communicate()
  assert process.returncode == 1, error  # a launcher may try again
  assert "did not all connect within 3 s" in error


@pytest.mark.parametrize(
  "flags",
  [
    ["--num_processes=2"],
    ["--process_id=0"],
    ["--coordinator=localhost:1"],
    ["--coordinator=localhost:1", "--multihost"],
  ],
)
def test_flags_that_contradict_each_other_are_refused(flags, capsys, tmp_path):
  from aunet_jax.train import __main__ as train_main

  assert train_main.main(["--config=x", f"--workdir={tmp_path}", *flags]) == 2
  assert "--coordinator" in capsys.readouterr().err
