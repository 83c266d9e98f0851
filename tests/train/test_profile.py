"""Profiles of the steps asked for."""

from tests.tiny_runs import run, write_corpus


def test_a_profile_of_the_steps_asked_for(tmp_path, capsys):
  corpus = write_corpus(tmp_path / "corpus")
  flags = ("--profile=2:3", "--config.train.num_steps=4")
  assert run(corpus, tmp_path / "run", *flags) == 0
  assert "profile of steps up to 3" in capsys.readouterr().out
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
  for wrong in ("5", "3:2", "0:1", "a:b"):
    assert run(corpus, tmp_path / "run", f"--profile={wrong}") == 2
    assert f"--profile={wrong} must be" in capsys.readouterr().err


def test_a_profile_of_a_run_under_way(tmp_path, capsys):
  corpus = write_corpus(tmp_path / "corpus")
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "profile_now").touch()
  assert run(corpus, tmp_path / "run") == 0
  assert "profile of steps up to 6" in capsys.readouterr().out
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
  assert not (tmp_path / "run" / "profile_now").exists()
