"""Profiles of the steps asked for."""

import json

import jax
import pytest

from aunet_jax.compile import __main__ as compile_main
from aunet_jax.train import profile
from tests.tiny_runs import run, write_corpus


def test_profiles_of_the_steps_asked_for_and_of_a_run_under_way(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(profile, "LOOK_SECONDS", 0)
  corpus, workdir = write_corpus(tmp_path / "corpus"), tmp_path / "run"
  workdir.mkdir()
  (workdir / "profile_now").touch()  # seen after the first step
  assert run(corpus, workdir, "--profile=1:1") == 0
  said = capsys.readouterr().out
  assert "profile of steps up to 1:" in said
  assert "profile of steps up to 6:" in said
  assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 2
  assert not (workdir / "profile_now").exists()
  config = f"--config={workdir / 'config.json'}"
  command = [config, f"--profile={workdir}"]
  assert compile_main.main([*command, "--json"]) == 0
  out = capsys.readouterr().out
  assert "stage 1  feed-forward, backward" in out
  program = json.loads(out.splitlines()[-1])["programs"]["train"]
  assert program["program_kept"] and program["measured"]["runs"] == 5
  assert program["measured"]["devices"] == 8
  assert program["measured"]["unknown_share"] < 0.01
  for more, word in (("--time", "rates"), ("--what=decode", "--what")):
    assert compile_main.main([*command, more]) == 2
    assert word in capsys.readouterr().err
  for wrong in ("5", "3:2", "0:1", "a:b"):
    assert run(corpus, workdir, f"--profile={wrong}") == 2
    assert f"--profile={wrong} must be" in capsys.readouterr().err


def test_a_profile_that_cannot_be_made_ends_no_run(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(profile, "LOOK_SECONDS", 0)
  (tmp_path / "profile_now").mkdir()
  recorder = profile.Recorder((1, 1), tmp_path)

  def fail():
    raise RuntimeError("not a directory")

  with jax.profiler.trace(str(tmp_path / "other")):
    recorder.before(1, str)
  assert "no profile: " in capsys.readouterr().err
  assert recorder.wanted()
  recorder.record_next(1)  # cannot be taken back, so it is not asked for again
  assert "profile_now" in capsys.readouterr().err and not recorder.wanted()
  recorder.before(2, str)
  with monkeypatch.context() as patched:
    patched.setattr(jax.profiler, "stop_trace", fail)
    recorder.after(6, {}, pytest.fail)
  assert "no profile: not a directory" in capsys.readouterr().err
  jax.profiler.stop_trace()
