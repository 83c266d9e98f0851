"""Workdirs in a bucket, against a small server of its API."""

import json
import os
import subprocess
import time

import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax.config import CheckpointConfig
from aunet_jax.workdir import buckets, checkpoints, layout, manifest

RUN = "gs://bucket/runs/one"


@pytest.fixture(autouse=True)
def _quick(monkeypatch, bucket):
  """Nothing takes longer than it must; nothing is looked up elsewhere."""
  monkeypatch.setattr(buckets, "PATIENCE_SECONDS", 0.2)
  monkeypatch.setattr(buckets, "BEAT_SECONDS", 0.05)


@pytest.fixture
def run() -> buckets.BucketPath:
  return buckets.path(RUN)


# ----- paths


@pytest.mark.parametrize("url", ["s3://b/run", "az://b/run", "gs:/b/run"])
def test_other_urls_are_refused(url):
  with pytest.raises(ValueError, match=f"--workdir={url} is a URL"):
    buckets.path(url)


def test_a_whole_bucket_is_refused():
  for url in ("gs://bucket", "gs://bucket/"):
    with pytest.raises(ValueError, match="is all of a bucket; name a folder"):
      buckets.path(url)


@pytest.mark.parametrize("name", ["lr*", "q?x", "#1", "x[1]", "..", ".", "a\n"])
def test_names_that_libraries_take_for_others_are_refused(name):
  for url in (f"gs://bucket/{name}", f"gs://bucket/a/{name}/b"):
    with pytest.raises(ValueError, match="would be written or deleted elsewh"):
      buckets.path(url)
  for fine in ("a b", "lr=1e-3", "50%", "é", "..a", "x.", "v1.0"):
    assert buckets.path(f"gs://bucket/{fine}").key == fine


def test_names_are_joined_and_taken_apart_as_those_of_files(run, tmp_path):
  path = run / "checkpoints" / "5"
  assert str(path) == f"{RUN}/checkpoints/5" == os.fspath(path)
  assert (path.name, path.parent.parent) == ("5", run)
  assert buckets.path(f"{RUN}//a/") == run / "a"
  assert buckets.path(path) is path
  assert buckets.path(tmp_path) == tmp_path


def test_objects_are_put_read_listed_and_deleted(run, bucket):
  data = b"--a\r\n\r\n\n" + bytes(range(256))
  (run / "a" / "x").write_bytes(data)
  for i in range(120):  # more than a page
    bucket.put(f"runs/one/many/{i:03}", b"12345")
  assert (run / "a" / "x").read_bytes() == data
  assert run.names() == ["a", "many"]
  assert len((run / "many").names()) == 120
  assert (run / "many").entries()["007"].size == 5
  assert (run / "a").is_dir() and not (run / "a").is_file()
  assert (run / "a" / "x").is_file() and not (run / "b").exists()
  (run / "a").rename(run / "b")
  assert bucket.names("runs/one/a") == []
  assert (run / "b" / "x").read_bytes() == data
  (run / "many").rmtree()
  assert run.names() == ["b"]
  (run / "b" / "y").unlink(missing_ok=True)
  for there in (run / "b" / "y", run / "b"):
    with pytest.raises(FileNotFoundError):
      there.read_bytes()


def test_what_passes_is_tried_again(run, bucket, monkeypatch):
  monkeypatch.setattr(buckets, "PATIENCE_SECONDS", 30)
  monkeypatch.setattr(buckets, "REQUEST_SECONDS", 0.2)
  bucket.fail("POST", "upload.*one/x", 503, times=1)
  bucket.fail("GET", "one/x", "truncate", times=1)
  bucket.fail("GET", "one/x", "hang", times=1, skip=1)
  (run / "x").write_bytes(b"1" * 1000)
  for _ in range(2):
    assert (run / "x").read_bytes() == b"1" * 1000
  assert [fault.seen for fault in bucket.faults] == [2, 4, 3]


@pytest.mark.parametrize(
  ("how", "status", "said"),
  [(403, 2, "403 permission denied"), (503, 1, "503"), (429, 1, "429")],
)
def test_what_does_not_pass_is_one_line(run, bucket, how, status, said):
  bucket.fail("", "one/x", how)
  for use, done in [
    (lambda: (run / "x").write_bytes(b""), "written"),
    ((run / "x").read_bytes, "read"),
    ((run / "x").unlink, "deleted"),
    ((run / "x").is_file, "looked up"),
  ]:
    with pytest.raises(buckets.BucketError) as caught:
      use()
    assert str(caught.value).startswith(f"{RUN}/x could not be {done}: {said}")
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


def test_missing_credentials_are_one_line(run, monkeypatch):
  from google.auth.exceptions import DefaultCredentialsError

  def client():
    raise DefaultCredentialsError("no credentials\nwere found")

  monkeypatch.setattr(buckets, "_client", client)
  for use in (run.names, run.is_dir, run.read_bytes, run.entries, run.unlink):
    with pytest.raises(buckets.BucketError, match="no credentials$"):
      use()
  with pytest.raises(buckets.BucketError, match="no credentials$"):
    run.write_bytes(b"")


def test_a_bucket_that_is_not_there_is_named():
  for use in ("names", "read_bytes", "is_dir"):
    with pytest.raises(buckets.BucketError, match="there is no gs://other$"):
      getattr(buckets.path("gs://other/run"), use)()


# ----- files that grow


def test_lines_are_put_now_and_then_and_when_asked(run, bucket, monkeypatch):
  path = run / "metrics.jsonl"
  path.write_bytes(b"before\n")
  grown = buckets.Grown(path)
  grown.add("one\n")
  assert path.read_text() == "before\n"
  grown.put()
  assert path.read_text() == "before\none\n"
  monkeypatch.setattr(buckets, "PUT_SECONDS", -1)
  fault = bucket.fail("POST", "metrics", 403)
  grown.add("two\n")  # training goes on
  with pytest.raises(buckets.BucketError):
    grown.put()
  fault.times = 0
  grown.add("three\n")
  assert path.read_text() == "before\none\ntwo\nthree\n"
  before = len(bucket.requests)
  grown.put()  # nothing is new
  assert len(bucket.requests) == before


def test_a_folder_is_put_as_far_as_it_grew(run, bucket, tmp_path):
  mirror = buckets.Mirror(run / "tensorboard")
  (mirror.here / "sub").mkdir()
  (mirror.here / "sub" / "events").write_text("one")
  (mirror.here / "still").write_text("the same")
  mirror.put()
  before = len(bucket.requests)
  (mirror.here / "sub" / "events").write_text("one two")
  mirror.put()
  assert (run / "tensorboard" / "sub" / "events").read_text() == "one two"
  assert (run / "tensorboard" / "still").read_text() == "the same"
  assert len(bucket.requests) == before + 3
  assert buckets.Mirror(tmp_path).here == tmp_path


# ----- the lock


def take(lock) -> bool:
  """As the trainer does: asks until it has it."""
  while not lock.take():
    time.sleep(0.01)
  return True


def test_a_lock_is_held_by_one_and_given_back(run, bucket):
  lock = buckets.Lock(run / ".lock")
  assert lock.take()
  other = buckets.Lock(run / ".lock")
  with pytest.raises(ValueError, match=f"another process is training in {RUN}"):
    take(other)
  lock.close()
  assert bucket.names() == []
  assert other.take()
  other.close()


def test_a_lock_whose_holder_gives_no_sign_is_taken_over(run, bucket, capsys):
  bucket.put("runs/one/.lock", b'{"host": "far", "pid": 7, "since": "then"}')
  began = time.monotonic()
  lock = buckets.Lock(run / ".lock")
  assert take(lock)
  assert time.monotonic() - began >= buckets.DEAD_BEATS * buckets.BEAT_SECONDS
  lock.close()
  assert "held by far, process 7, since then" in capsys.readouterr().out
  bucket.put("runs/one/.lock", b"what?")
  assert take(lock := buckets.Lock(run / ".lock"))
  lock.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_a_lock_of_a_process_that_is_gone_is_taken_at_once(
  run, bucket, monkeypatch
):
  monkeypatch.setattr(buckets, "BEAT_SECONDS", 1000)
  with subprocess.Popen(["sleep", "100"]) as child:
    said = json.loads(buckets._owner())
    said |= {"pid": child.pid, "process": buckets._process(child.pid)}
    bucket.put("runs/one/.lock", json.dumps(said).encode())
    lock = buckets.Lock(run / ".lock")
    assert not lock.take()
    child.kill()
  assert lock.take()
  lock.close()


def test_who_loses_the_lock_ends(run, bucket, monkeypatch, capsys):
  ended = []
  monkeypatch.setattr(buckets.os, "_exit", ended.append)
  lock = buckets.Lock(run / ".lock")
  assert lock.take()
  with bucket.lock:
    bucket.put("runs/one/.lock", b"another's")
  while not ended:
    time.sleep(0.01)
  lock.close()
  assert ended[0] == 1
  assert ".lock was taken over or deleted" in capsys.readouterr().err
  assert bucket.objects["runs/one/.lock"].data == b"another's"


def test_a_lock_taken_over_in_an_outage_is_not_taken_back(
  run, bucket, monkeypatch, capsys
):
  """Another takes it between two requests of its first holder."""
  ended = []
  monkeypatch.setattr(buckets, "BEAT_SECONDS", 1000)
  monkeypatch.setattr(buckets.os, "_exit", ended.append)
  lock = buckets.Lock(run / ".lock")
  assert lock.take()
  bucket.put("runs/one/.lock", lock._said)  # its answer was lost
  read, look = buckets.BucketPath.read_bytes, buckets.BucketPath.generation

  def then_taken_over(ask, path):
    answer = ask(path)
    if bucket.objects["runs/one/.lock"].data == lock._said:
      bucket.put("runs/one/.lock", b"another's")
    return answer

  for name, ask in (("read_bytes", read), ("generation", look)):
    monkeypatch.setattr(
      buckets.BucketPath, name, lambda path, ask=ask: then_taken_over(ask, path)
    )
  lock._renew()
  lock._renew()
  assert ended and bucket.objects["runs/one/.lock"].data == b"another's"
  lock.close()
  assert bucket.names() == ["runs/one/.lock"]


# ----- checkpoints


def save(saver, *steps) -> None:
  for step in steps:
    tree = {"params": {"a": jnp.full(300, step)}}
    saver.save(step, tree, {"splitter_hash": "ab"})
  saver.wait()


@pytest.fixture
def saved(run, bucket):
  """A workdir with checkpoints 1, 2 and 3."""
  saver = checkpoints.Checkpointer(run, CheckpointConfig())
  save(saver, 1, 2, 3)
  saver.close()
  return run


def largest(bucket, step: int) -> str:
  names = bucket.names(f"runs/one/checkpoints/{step}/params/")
  return max(names, key=lambda name: len(bucket.objects[name].data))


def test_checkpoints_of_a_bucket(saved, bucket, tmp_path):
  """One scenario: saving takes most of the time."""
  folder = saved / "checkpoints"
  assert layout.steps(saved) == [1, 2, 3]
  before = len(bucket.requests)
  assert manifest.damage(folder / "3") is None
  assert not [p for _, p in bucket.requests[before:] if "/d/" in p]  # no bytes

  # Only what is committed counts.
  kept = bucket.objects.pop("runs/one/checkpoints/3/commit_success.txt")
  assert layout.steps(saved) == [1, 2]
  bucket.objects["runs/one/checkpoints/3/commit_success.txt"] = kept

  # A copy on a disk is compared by the same sums.
  for name in bucket.names("runs/one/checkpoints/3/"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bucket.objects[name].data)
  copy = tmp_path / "runs" / "one" / "checkpoints" / "3"
  assert manifest.damage(copy) is None
  part = tmp_path / largest(bucket, 3)
  part.write_bytes(bytes([part.read_bytes()[0] ^ 1]) + part.read_bytes()[1:])
  assert "(checksum)" in manifest.damage(copy)

  # Damage is seen in the listing; the newest undamaged one is taken.
  name = largest(bucket, 3)
  whole = bucket.objects[name].data
  bucket.put(name, whole[:-1])
  assert manifest.damage(folder / "3").endswith("is 1 bytes short")
  bucket.put(name, whole[:-1] + bytes([whole[-1] ^ 1]))
  assert manifest.damage(folder / "3").endswith("(checksum)")
  del bucket.objects[largest(bucket, 2)]
  assert "is missing" in manifest.damage(folder / "2")
  lines = []
  assert checkpoints.choose(saved, lines.append) == 1
  assert [line[:20] for line in lines] == [
    f"checkpoint {step} skipped" for step in (3, 2)
  ]
  assert folder.names() == ["1", "damaged-2", "damaged-3"]

  # The same steps can be saved again, and one is restored. An old one that
  # cannot go is tried again, also when some of it is gone.
  saver = checkpoints.Checkpointer(saved, CheckpointConfig(keep=1))
  bucket.fail("DELETE", "checkpoints/1/", 403, skip=1, times=1)
  save(saver, 2)
  (line,) = saver.complaints()
  assert line.startswith("1 old checkpoint could not be deleted: 1 (gs://")
  assert "403 permission denied" in line and not saver.failed()
  assert layout.steps(saved) == [2] and bucket.names("runs/one/checkpoints/1/")
  save(saver, 3)
  assert not bucket.names("runs/one/checkpoints/1/")
  assert layout.steps(saved) == [3] and saver.latest_step() == 3
  assert not saver.complaints()
  target = {"a": np.zeros(300, np.int32)}
  found = saver.restore(3, {"params": target})["params"]["a"]
  np.testing.assert_array_equal(found, np.full(300, 3))

  # What cannot be written is told; what was there stays.
  bucket.fail("POST", "ocdbt", 403)
  with pytest.raises(layout.SaveError, match="checkpoint 5 could not be writ"):
    save(saver, 5)
  assert saver.failed()
  assert layout.steps(saved) == [3]
  bucket.faults.clear()
  bucket.fail("POST", ".writing-0", 403)
  saver = checkpoints.Checkpointer(saved, CheckpointConfig())
  with pytest.raises(layout.SaveError, match="403 permission denied. The newe"):
    save(saver, 6)  # not 5: Orbax's threads may still write what failed
  assert bucket.names("runs/one/checkpoints/6") == []
