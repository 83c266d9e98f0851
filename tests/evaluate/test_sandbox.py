"""A program passes if it comes to its end, and reaches nothing outside."""

import os
import signal
import socket
import time

import pytest

from aunet_jax.evaluate.tasks import sandbox


@pytest.mark.parametrize(
  ("source", "passes"),
  [
    ("import math, typing, hashlib, re, collections\nassert math.pi > 3", True),
    ("open('x.txt', 'w').write('mine')\nassert open('x.txt').read()", True),
    ("assert 1 == 2", False),
    ("def f(:", False),
    ("exit()", False),  # before any test
    ("raise SystemExit(42)", False),
    ("x = 'a' * 2**31", False),  # more memory than it may have
    ("open('x', 'w').write('a' * 2**21)", False),  # and more disk
    ("\udcff = 1", False),
  ],
)
def test_a_program_passes_if_it_comes_to_its_end(source, passes):
  assert sandbox.passes(source) == passes


def test_a_program_that_does_not_end_is_ended():
  assert not sandbox.passes("while True: pass", seconds=0.5)


def test_a_program_reaches_nothing_outside(tmp_path):
  path = tmp_path / "kept.txt"
  path.write_text("kept")
  with socket.create_server(("127.0.0.1", 0)) as server:
    lines = [
      f"open({str(path)!r}, 'w')",
      f"open({str(path)!r}, 'ab')",
      "open('../outside.txt', 'w')",
      "open(b'/tmp/outside.txt', 'w')",
      f"os.open({str(path)!r}, os.O_RDWR)",
      f"os.remove({str(path)!r})",
      f"os.rename({str(path)!r}, 'x')",
      f"shutil.rmtree({str(tmp_path)!r})",
      "os.system('true')",
      "os.fork()",
      f"os.kill({os.getpid()}, 0)",
      "subprocess.run(['true'])",
      f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))",
      "__import__('ctypes').CDLL(None)",
    ]
    refused = ["import os, shutil, socket, subprocess", "count = 0"]
    for line in lines:
      refused += ["try:", f"  {line}", "except PermissionError as error:"]
      refused += ["  assert 'a program may not' in str(error)", "  count += 1"]
    refused.append(f"assert count == {len(lines)}")
    assert sandbox.passes("\n".join(refused))
  assert path.read_text() == "kept"


def test_what_a_program_starts_with_is_not_ours(monkeypatch):
  monkeypatch.setenv("SECRET_OF_OURS", "1")
  assert sandbox.passes(
    "import os, sys\n"
    "assert 'SECRET_OF_OURS' not in os.environ\n"
    "assert os.listdir() == ['program.py']\n"
    "assert not any('site-packages' in path for path in sys.path)\n"
  )


def test_no_process_is_left(monkeypatch):
  killed = []
  kill = os.killpg

  def spy(pid, number):
    killed.append((pid, number))
    kill(pid, number)

  monkeypatch.setattr(os, "killpg", spy)
  assert not sandbox.passes("import time\ntime.sleep(60)", seconds=0.3)
  ((pid, number),) = killed
  assert number == signal.SIGKILL
  with pytest.raises(ProcessLookupError):
    for _ in range(100):
      os.kill(pid, 0)
      time.sleep(0.01)
