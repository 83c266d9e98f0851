"""Processes that build one index together, and ones that are killed."""

import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from toy_corpora import (
  CAPACITIES,
  SPLITTER,
  build_in_parts,
  content,
  different,
  write,
)

from aunet_jax import config
from aunet_jax.data import building, corpora, parts
from aunet_jax.files import Lock

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(TESTS))

BUILD = textwrap.dedent("""
  import pathlib, sys
  from toy_corpora import CAPACITIES, SPLITTER
  from aunet_jax import config
  from aunet_jax.data import building, corpora, parts

  def main():
    parts.PART_BYTES = int(sys.argv[3])
    cfg = config.DataConfig(train=sys.argv[1], heldout_fraction=0.1)
    corpora.build_indexes(
      cfg, SPLITTER, CAPACITIES, sys.argv[2],
      building.How(num_workers=int(sys.argv[4])),
      lambda line: print(line, flush=True),
    )

  if __name__ == "__main__":
    main()
""")


def start(tmp_path, cache, least=4000, workers=2):
  script = tmp_path / "build.py"  # a file: workers import it
  script.write_text(BUILD)
  path = os.pathsep.join([TESTS, ROOT])
  return subprocess.Popen(
    [
      sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / cache),
      str(least), str(workers),
    ],
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def digest(tmp_path, cache):
  (index,) = (tmp_path / cache).glob("*/index.json")
  files = sorted(p for p in index.parent.rglob("*") if p.is_file())
  found = hashlib.sha256()
  for path in files:
    found.update(str(path.relative_to(index.parent)).encode())
    found.update(path.read_bytes())
  return found.hexdigest()


def write_files(tmp_path, count):
  for number in range(count):
    write(tmp_path / "in" / f"{number}.jsonl", different(80, seed=number))


def build_here(tmp_path, cache, lines):
  corpora.build_indexes(
    config.DataConfig(train=str(tmp_path / "in"), heldout_fraction=0.1),
    SPLITTER,
    CAPACITIES,
    tmp_path / cache,
    building.ALONE,
    lines.append,
  )


def test_several_processes_share_the_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(parts, "PART_BYTES", 4000)
  write_files(tmp_path, 12)
  build_here(tmp_path, "alone", [])
  other = start(tmp_path, "both", least=4000)
  for line in other.stdout:
    if "12 parts" in line:
      break
  lines = []
  build_here(tmp_path, "both", lines)
  lines += other.communicate()[0].splitlines()
  assert other.returncode == 0
  assert digest(tmp_path, "alone") == digest(tmp_path, "both")
  assert sum("joining" in line for line in lines) == 1
  assert not list((tmp_path / "both").glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_build_that_is_killed_at_any_moment_goes_on(tmp_path, seed):
  write_files(tmp_path, 12)
  rng = random.Random(seed)
  start(tmp_path, "warm", least=4000).communicate()
  began = time.monotonic()
  start(tmp_path, "alone", least=4000).communicate()
  took = time.monotonic() - began
  killed = 0
  for share in (*(rng.uniform(0.4, 0.8) for _ in range(3)), 100):
    process = start(tmp_path, "killed", least=4000)
    try:
      process.communicate(timeout=share * took)
      break
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.communicate()
      killed += 1
  assert killed
  assert digest(tmp_path, "alone") == digest(tmp_path, "killed")


def test_a_part_that_another_process_builds_is_waited_for(
  directory, monkeypatch
):
  real, held = parts.build, []

  def build(task, wait):
    if task.number == 1 and not held and not wait:
      held.append(Lock(task.mark.with_suffix(".lock")))
      assert held[0].take(wait=False)
    elif wait:
      held[0].close()
    return real(task, wait)

  monkeypatch.setattr(parts, "build", build)
  lines = []
  monkeypatch.setattr("builtins.print", lines.append)
  assert build_in_parts(directory)
  assert held and any("waiting for 1 parts" in line for line in lines)


def test_too_many_faults_stop_before_all_is_read(directory, monkeypatch):
  with open(directory / "texts" / "0.jsonl", "a") as file:
    file.write("no JSON\n" * 1000)
  seen = []
  monkeypatch.setattr(parts, "build", functools.partial(_seen, seen))
  cache = directory / "cache"
  with pytest.raises(ValueError, match="are lost, more than data.max_skip"):
    build_in_parts(directory)
  assert len(seen) < 4 and list(cache.glob("*.partial/parts/00000.json"))


def _seen(seen, task, wait, real=parts.build):
  seen.append(task.number)
  return real(task, wait)


def test_the_time_that_is_left_is_told(monkeypatch):
  now, lines = [0.0], []
  monkeypatch.setattr(building.time, "monotonic", lambda: now[0])
  progress = building._Progress(4e9, lines.append)
  for now[0], done in ((1.0, 1e8), (10.0, 1e9), (11.0, 2e9), (40.0, 4e9)):
    progress.show(int(done), 7)
  assert lines == [
    "indexing: 7 documents, 1,000 MB at 100.0 MB/s, 25%, 0:30 left",
    "indexing: 7 documents, 4,000 MB at 100.0 MB/s, 100%, 0:00 left",
  ]


def test_a_disk_that_is_too_small_is_told_before_the_start(
  directory, monkeypatch
):
  def room(path):
    return type("usage", (), {"free": 1000})

  monkeypatch.setattr("shutil.disk_usage", room)
  with pytest.raises(ValueError, match="0.0 GB free; make room there"):
    build_in_parts(directory)
  assert not any(".bin" in name for name in content(directory))


def test_more_than_may_be_built_here_is_refused(directory):
  for most in (-1, 1000):
    with pytest.raises(ValueError, match="has no index of .* do this"):
      build_in_parts(directory, most_bytes=most, refusal="do this")
  assert build_in_parts(directory)
  assert build_in_parts(directory, most_bytes=-1)  # it is there


def test_what_index_json_says_is_of_all_parts(directory):
  assert build_in_parts(directory)
  (path,) = (directory / "cache").glob("*/index.json")
  said = json.loads(path.read_text())
  assert said["skipped"] == {"malformed JSON": 3}
  assert said["made_of"] == [str(directory / "texts")]
  assert said["near_copies"]["documents"] > 0
