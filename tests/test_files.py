"""Locks that cannot hurt other files, and files that are whole or not there."""

import errno
import fcntl
import os
import pathlib
import stat

import pytest

from aunet_jax import files


def never():
  raise AssertionError("nobody else holds it")


def test_a_second_holder_is_told_and_may_wait_or_give_up(tmp_path):
  path = tmp_path / ".lock"

  def give_up():
    raise ValueError("taken")

  with files.locked(path, never):
    second = files.Lock(path)
    assert not second.take(wait=False)
    with pytest.raises(ValueError, match="taken"), files.locked(path, give_up):
      pass
  assert second.take(wait=False)
  second.close()


def test_a_lock_keeps_what_its_file_holds_and_follows_no_link(tmp_path):
  precious = tmp_path / "precious"
  precious.write_text("keep me")
  with files.locked(precious, never):
    pass
  assert precious.read_text() == "keep me"
  link = tmp_path / ".lock"
  link.symlink_to(precious)
  with (
    pytest.raises(files.LockError, match="is a link"),
    files.locked(link, never),
  ):
    pass
  dangling = tmp_path / "dangling"
  dangling.symlink_to(tmp_path / "made")
  with pytest.raises(files.LockError), files.locked(dangling, never):
    pass
  assert precious.read_text() == "keep me" and not (tmp_path / "made").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_remedy(
  tmp_path, monkeypatch, number
):
  def refuse(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, "flock", refuse)
  with (
    pytest.raises(files.LockError, match=f"{tmp_path}.*{files.LOCKS}=none"),
    files.locked(tmp_path / ".lock", never),
  ):
    pass
  monkeypatch.setenv(files.LOCKS, "none")
  with files.locked(tmp_path / ".lock", never):
    pass


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  files.write_whole(path, "old é")
  assert path.read_text(encoding="utf-8") == "old é"
  umask = os.umask(0)
  os.umask(umask)
  assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask

  def fail(*_):
    raise OSError(errno.ENOSPC, "full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="full"):
    files.write_whole(path, b"new")
  assert path.read_text(encoding="utf-8") == "old é"
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
  "url", ["gs://bucket/run", "s3://bucket/run", "memory://run", "gs:/bucket"]
)
def test_a_url_is_never_a_local_folder(url):
  with pytest.raises(ValueError, match=f"--workdir={url} is a URL"):
    files.local(url, "--workdir")


@pytest.mark.parametrize("path", ["runs/demo", "/data/a:b", "a:b/c", ""])
def test_other_paths_are_what_they_are(path):
  assert files.local(path, "--workdir") == pathlib.Path(path)
