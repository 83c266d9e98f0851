"""Signals that stop a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import sharding
from aunet_jax.train import stop as stop_lib
from aunet_jax.train.stop import Stop, StoppedEarly, Votes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", stop_lib.SIGNALS)
def test_the_first_signal_only_asks(tmp_path, number):
  before = signal.getsignal(number)
  with Stop(tmp_path) as stop:
    stop.begin()
    os.kill(os.getpid(), number)
    assert stop.requested == signal.Signals(number).name
  assert signal.getsignal(number) is before


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
  with pytest.raises(StoppedEarly, match="SIGTERM before the first step"):
    with Stop(tmp_path):
      os.kill(os.getpid(), signal.SIGTERM)
  assert StoppedEarly.status == 75
  with Stop(tmp_path, alone=False) as stop:  # the others would wait
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested == "SIGTERM"
    with pytest.raises(StoppedEarly):  # where they meet
      stop.leave_if_asked()


def test_nohup_is_respected(tmp_path):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with Stop(tmp_path) as stop:
      stop.begin()
      os.kill(os.getpid(), signal.SIGHUP)
      assert stop.requested is None
  finally:
    signal.signal(signal.SIGHUP, before)


def is_blocked(pid: int, number: int) -> bool:
  """Whether the process keeps that signal back."""
  status = Path(f"/proc/{pid}/status").read_text()
  blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
  return bool(blocked >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_signal_while_python_loads_is_not_lost(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-m", "aunet_jax.train", "--config=tests/tiny.py",
     f"--workdir={tmp_path}"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  while not is_blocked(process.pid, signal.SIGTERM):
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate()
  assert process.returncode == 75, error
  assert error.startswith("error: stopped by SIGTERM before the first step")


TWICE = """
import ctypes, sys
from aunet_jax.train.stop import Stop

with Stop(sys.argv[1]) as stop:
  stop.begin()
  print("ready", flush=True)
  while True:
    if stop.requested:
      print(stop.requested, flush=True)
      break
  libc = ctypes.CDLL(None)
  lock = ctypes.create_string_buffer(64)  # zeros: a mutex that is free
  for _ in range(2):
    libc.pthread_mutex_lock(lock)  # the second time waits for ever
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of glibc")
def test_a_second_signal_ends_at_once(tmp_path):
  """Even a process that waits outside Python, as for the other processes."""
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  process = subprocess.Popen(
    [sys.executable, "-c", TWICE, str(tmp_path)],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  assert process.stdout.readline() == "SIGTERM\n"
  process.send_signal(signal.SIGINT)  # another kind: asks once more
  time.sleep(0.1)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate()
  assert process.returncode == 130
  assert "the newest checkpoint is 7" in error


def test_one_process_decides_at_once_several_a_turn_later(monkeypatch):
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, fsdp=2, tensor=2))
  assert Votes(mesh, 2).turn(1, 0) == (1, 0)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  votes = Votes(mesh, 2)
  assert votes.turn(1, 0) == (0, 0)
  assert votes.turn(0, 1) == (1, 0)
  assert votes.turn(0, 0) == (0, 1)
  assert votes.turn(0, 0) == (0, 0)
  # Any device of any process is heard.
  for row in range(8):
    asked = np.zeros((8, 2), np.int32)
    asked[row] = 1, 0
    placed = jax.device_put(asked, votes._where)
    assert np.asarray(votes._combine(placed)).tolist() == [1, 0]
