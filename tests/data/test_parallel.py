"""Work in several processes: results, errors, and no process left over."""

import os
import subprocess
import sys
import textwrap
import time

import pytest

from aunet_jax.data import parallel
from aunet_jax.terminal import Failure


def double(number):
  parallel.advance(number, 1)
  return 2 * number


def fail_at_three(number):
  if number == 3:
    raise ValueError("three")
  for _ in range(100):  # ends soon after another has failed
    time.sleep(0.1)
    parallel.advance(1, 0)
  raise AssertionError("nobody stopped it")


def die(number):
  os._exit(number)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_and_progress_is_told(num_workers, monkeypatch):
  monkeypatch.setattr(parallel, "_TICK_SECONDS", 0.0)
  told = []
  with parallel.Pool(num_workers) as pool:
    pool.on_tick = lambda *done: told.append(done)
    assert sorted(pool.run(double, range(7))) == list(range(0, 14, 2))
    assert list(pool.map(double, range(5))) == list(range(0, 10, 2))
  assert told[-1] == (sum(range(7)) + sum(range(5)), 12)


def test_an_error_stops_the_others():
  with pytest.raises(ValueError, match="three"):
    with parallel.Pool(2) as pool:
      list(pool.run(fail_at_three, [1, 3, 4, 5, 6]))


def test_a_process_that_dies_is_told():
  with pytest.raises(Failure, match="was killed.*goes on"):
    with parallel.Pool(2) as pool:
      list(pool.run(die, [3, 4]))


def test_workers_end_with_their_parent(tmp_path):
  (tmp_path / "sleeps.py").write_text(
    textwrap.dedent("""
      import os, time
      from aunet_jax.data import parallel

      def forever(_):
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep(600)

      if __name__ == "__main__":
        import sleeps
        with parallel.Pool(2) as pool:
          list(pool.run(sleeps.forever, [1, 2]))
    """)
  )
  path = os.pathsep.join([str(tmp_path), *sys.path])
  parent = subprocess.Popen(
    [sys.executable, str(tmp_path / "sleeps.py")],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": path},
  )
  workers = [int(parent.stdout.readline()) for _ in range(2)]
  parent.kill()
  parent.wait()
  while any(os.path.exists(f"/proc/{worker}") for worker in workers):
    time.sleep(0.05)  # for ever, and the test runner's limit, if they stay
