"""Every command ends with one error line and a status that means something."""

import errno
import io
import os
import subprocess
import sys

import pytest

from aunet_jax import terminal


class Broken(terminal.Failure):
  pass


@pytest.mark.parametrize(
  "error, status",
  [
    (ValueError("rows=0 must be positive."), 2),
    (FileNotFoundError(errno.ENOENT, "No such file", "text.txt"), 2),
    (PermissionError(errno.EACCES, "Permission denied", "text.txt"), 2),
    (OSError(errno.ENOSPC, "No space left", "text.txt"), 1),
    (ConnectionError("no answer"), 1),
    (Broken("step 3 broke"), 1),
  ],
)
def test_what_a_user_can_cause_is_one_line_and_a_status(capsys, error, status):
  @terminal.command
  def main(argv):
    raise error

  assert main([]) == status
  said = capsys.readouterr().err
  assert said == f"error: {error}\n"


def test_a_defect_of_ours_keeps_its_traceback():
  @terminal.command
  def main():
    raise KeyError("ours")

  with pytest.raises(KeyError):
    main()


def test_none_is_success_and_ctrl_c_is_130(capsys):
  @terminal.command
  def interrupted():
    raise KeyboardInterrupt

  assert terminal.command(lambda: None)() == 0
  assert terminal.command(lambda: 75)() == 75
  assert interrupted() == 130
  assert capsys.readouterr().err == "interrupted\n"


def test_output_that_the_encoding_lacks_does_not_end_a_command(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
  assert terminal.command(lambda: print("é \udcff"))() == 0
  assert raw.getvalue() == b"\\xe9 \\udcff\n"


def test_a_reader_that_has_seen_enough_is_no_error():
  code = (
    "from aunet_jax import terminal\n"
    "main = terminal.command(lambda: print('line\\n' * 100000))\n"
    "raise SystemExit(main())\n"
  )
  read, write = os.pipe()
  child = subprocess.Popen(
    [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE
  )
  os.close(write)
  os.close(read)
  _, error = child.communicate()
  assert (child.returncode, error) == (0, b"")


def test_too_little_memory_is_one_line(capsys):
  @terminal.command
  def main(argv):
    raise MemoryError("Unable to allocate 29.8 GiB")

  assert main([]) == 1
  said = capsys.readouterr().err
  assert said == "error: not enough memory: Unable to allocate 29.8 GiB\n"
