"""convert: one way at a time, and errors of one line."""

import pytest

from aunet_jax.convert import __main__ as convert_main


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--workdir=x"], "--from-lingua --to-lingua is required"),
    (["--from-lingua=a", "--to-lingua=b", "--workdir=x"], "not allowed with"),
    (["--to-lingua=b.npz"], "--workdir"),
  ],
)
def test_one_way_and_a_workdir_must_be_given(flags, message, capsys):
  with pytest.raises(SystemExit) as stop:
    convert_main.main(flags)
  assert stop.value.code == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize("way", ["from", "to"])
def test_what_is_not_there_is_named(way, tmp_path, capsys):
  flags = [f"--{way}-lingua={tmp_path}/no.npz", f"--workdir={tmp_path}/run"]
  assert convert_main.main(flags) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and str(tmp_path) in line
  assert not list(tmp_path.iterdir())
