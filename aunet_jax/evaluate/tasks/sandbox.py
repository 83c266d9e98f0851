"""Runs a program that a model wrote, in a process of few means.

The process has an empty environment and a temporary folder; little time, memory
and disk; and Python in it refuses to write elsewhere, to start processes and to
open sockets. That holds against accidents, not against an attacker: to score a
model that you do not trust, run all of it in a container.

This file is also the script of that process, and imports nothing of ours.
"""

import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10  # of a program, by the clock; of the processor, as many
MEMORY_BYTES = 2**30
FILE_BYTES = 2**20
PASSED = 42  # exit status: the program came to its end

_READING = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr"}
_REFUSED = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "pty.")


def passes(source: str, seconds: float = SECONDS) -> bool:
  """Whether a program comes to its end without an error, within the time."""
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "program.py"
    file.write_bytes(source.encode("utf-8", errors="replace"))
    process = subprocess.Popen(
      [sys.executable, "-I", "-S", __file__, str(file)],
      cwd=folder,
      env={},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )
    try:
      return process.wait(seconds) == PASSED
    except subprocess.TimeoutExpired:
      return False
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _refuse(event: str, args: tuple) -> None:
  """An audit hook: raises where a program would change what is not its own."""
  if event == "open":
    path, mode, flags = args
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    inside = isinstance(path, str) and os.path.realpath(path).startswith(
      os.getcwd() + os.sep
    )
    if writes and not inside:
      raise PermissionError(f"a program may not write {path!r}")
  elif event.startswith(_REFUSED) and event not in _READING:
    raise PermissionError(f"a program may not call {event}")


def _main(path: str) -> None:
  limits = {
    resource.RLIMIT_CPU: SECONDS,
    resource.RLIMIT_AS: MEMORY_BYTES,
    resource.RLIMIT_FSIZE: FILE_BYTES,
    resource.RLIMIT_CORE: 0,
  }
  for limit, value in limits.items():
    resource.setrlimit(limit, (value, value))
  sys.addaudithook(_refuse)
  try:
    runpy.run_path(path, run_name="__main__")
  except BaseException:  # SystemExit too: it came to no end
    sys.exit(1)
  sys.exit(PASSED)


if __name__ == "__main__":
  _main(sys.argv[1])
