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


def test_nohup_is_respected(tmp_path):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with Stop(tmp_path) as stop:
      stop.begin()
      os.kill(os.getpid(), signal.SIGHUP)
      assert stop.requested is None
  finally:
    signal.signal(signal.SIGHUP, before)


TWICE = """
import sys, threading
from aunet_jax.train.stop import Stop

with Stop(sys.argv[1]) as stop:
  stop.begin()
  print("ready", flush=True)
  while True:
    if stop.requested:
      print(stop.requested, flush=True)
      break
  while True:
    pass
"""


def test_a_second_signal_ends_at_once(tmp_path):
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
