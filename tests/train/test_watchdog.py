"""A process that hangs ends itself."""

import threading

import pytest

from aunet_jax.train.watchdog import Watchdog


class Ended:
  def __init__(self):
    self.status, self._event = None, threading.Event()

  def __call__(self, status: int) -> None:
    self.status = status
    self._event.set()

  def wait(self) -> None:
    assert self._event.wait(60)


def test_a_hang_is_ended_and_its_stacks_are_shown(capfd):
  ended = Ended()
  with Watchdog(0.2, 1.0, ended) as watchdog:
    watchdog.step(6)
    ended.wait()
  assert ended.status == 1
  error = capfd.readouterr().err
  assert "error: nothing happened for" in error and "in step 7" in error
  assert "test_a_hang_is_ended_and_its_stacks_are_shown" in error


def test_the_limit_follows_the_steps_and_has_a_floor(monkeypatch):
  now = [0.0]
  watchdog = Watchdog(100.0, 20.0)
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  assert watchdog.limit() == 100
  for step in range(1, 12):
    now[0] += 1
    watchdog.step(step)
  assert watchdog.limit() == 100
  for step in range(12, 40):
    now[0] += 8
    watchdog.step(step)
  assert watchdog.limit() == pytest.approx(160)
  watchdog.alive("the evaluation")  # no part of a step's time
  now[0] += 5000
  watchdog.step(40)
  assert watchdog.limit() == pytest.approx(160)


def test_none_never_ends(monkeypatch):
  started = []
  monkeypatch.setattr(threading.Thread, "start", started.append)
  with Watchdog(None, 20.0):
    pass
  assert not started
