"""Profiles of the steps asked for."""

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
  for wrong in ("5", "3:2", "0:1", "a:b"):
    assert run(corpus, workdir, f"--profile={wrong}") == 2
    assert f"--profile={wrong} must be" in capsys.readouterr().err
