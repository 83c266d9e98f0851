"""Choosing, saving and keeping checkpoints of plain trees."""

import logging
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax.config import CheckpointConfig
from aunet_jax.workdir import checkpoints, layout, manifest

HOST = {"splitter_hash": "ab"}


def save(saver, *steps) -> None:
  for step in steps:
    saver.save(step, {"params": {"a": jnp.full(3, step)}}, HOST)
  saver.wait()


def test_milestones_stay_beside_the_newest(tmp_path):
  settings = CheckpointConfig(every_steps=10, keep=2, milestone_steps=25)
  saver = checkpoints.Checkpointer(tmp_path, settings)
  due = [step for step in range(1, 61) if saver.due(step)]
  assert due == [10, 20, 25, 30, 40, 50, 60]
  save(saver, *due)
  saver.close()
  assert layout.steps(tmp_path) == [25, 50, 60]
  again = checkpoints.Checkpointer(tmp_path, settings)
  save(again, 70)
  target = {"a": jax.ShapeDtypeStruct((3,), jnp.int32)}
  target = jax.tree.map(
    lambda x: x.update(sharding=jax.sharding.SingleDeviceSharding(
      jax.devices()[0]
    )), target,
  )  # fmt: skip
  restored = again.restore(25, {"params": target})
  np.testing.assert_array_equal(restored["params"]["a"], [25, 25, 25])
  with pytest.raises(layout.CheckpointError, match="optimizer state is miss"):
    again.restore(25, {"params": target, "optimizer": {}})
  again.close()
  assert layout.steps(tmp_path) == [25, 50, 60, 70]


def test_a_checkpoint_is_late_by_the_clock(tmp_path):
  now = [0.0]
  settings = CheckpointConfig(every_steps=1000, every_minutes=20)
  saver = checkpoints.Checkpointer(tmp_path, settings, clock=lambda: now[0])
  now[0] = 1199
  assert not saver.late()
  now[0] = 1200
  assert saver.late() and not saver.due(7)
  save(saver, 7)
  assert not saver.late()
  now[0] = 2399
  assert not saver.late()
  now[0] = 2400
  assert saver.late()
  saver.close()
  never = CheckpointConfig(every_minutes=None)
  saver = checkpoints.Checkpointer(tmp_path, never, clock=lambda: now[0])
  now[0] = 1e9
  assert not saver.late()
  saver.close()


def test_step_0_is_chosen_by_several_processes_too(tmp_path, two_processes):
  assert checkpoints.choose(tmp_path, print) is None
  step = tmp_path / "checkpoints" / "0" / "params"
  step.mkdir(parents=True)
  (step / "a").write_text("x")
  manifest.write(step.parent)
  assert checkpoints.choose(tmp_path, print) == 0


def written(workdir, step):
  """A checkpoint of one file with its manifest; returns its folder."""
  folder = workdir / "checkpoints" / str(step)
  (folder / "params").mkdir(parents=True)
  (folder / "params" / "a").write_text(f"of {step}")
  manifest.write(folder)
  return folder


def test_a_damaged_checkpoint_is_put_aside_whatever_lies_there(tmp_path):
  for step in (1, 2, 3):
    written(tmp_path, step)
  assert checkpoints.newest_undamaged(tmp_path, last=2) == (2, {})
  there = tmp_path / "checkpoints"
  elsewhere = tmp_path / "kept"
  elsewhere.mkdir()
  (there / "damaged-2").symlink_to(elsewhere)
  written(tmp_path, 4).rename(there / "damaged-3")  # of an earlier start
  for step in (2, 3):
    (there / str(step) / "params" / "a").write_text("damage")
  lines = []
  assert checkpoints.choose(tmp_path, lines.append) == 1
  assert layout.steps(tmp_path) == [1]
  assert [line[:20] for line in lines] == [
    f"checkpoint {s} skipped" for s in "32"
  ]
  for step in (2, 3):
    aside = there / f"damaged-{step}"
    assert not aside.is_symlink()
    assert (aside / "params" / "a").read_text() == "damage"
  assert elsewhere.is_dir()


def test_a_checkpoint_without_a_manifest_is_said_to_be_unchecked(tmp_path):
  folder = written(tmp_path, 1)
  lines = []
  assert checkpoints.choose(tmp_path, lines.append) == 1
  assert not lines
  (folder / manifest.FILE).unlink()
  assert checkpoints.choose(tmp_path, lines.append) == 1
  (line,) = lines
  assert "checkpoint 1 has no" in line and "unchecked" in line


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
  saver = checkpoints.Checkpointer(tmp_path, CheckpointConfig())
  tree = {"params": {"a": jnp.zeros((100, 30)), "b": jnp.zeros(7, jnp.int8)}}
  usage = checkpoints.shutil.disk_usage(tmp_path)
  for free in (12_006, 12_007):
    monkeypatch.setattr(
      checkpoints.shutil, "disk_usage", lambda _, n=free: usage._replace(free=n)
    )
    if free < 12_007:
      with pytest.raises(layout.SaveError, match=r"needs 0\.0 MB but"):
        saver.save(1, tree, HOST)
      saver.wait()
      assert layout.steps(tmp_path) == []
    else:
      saver.save(1, tree, HOST)
      saver.wait()
  saver.close()
  assert layout.steps(tmp_path) == [1]


def test_a_failed_save_is_of_its_step_and_workdir_alone(tmp_path, monkeypatch):
  go_on, write = threading.Event(), manifest.write

  def write_or_fail(folder):
    if folder.is_relative_to(tmp_path / "one"):
      go_on.wait()
      raise OSError("the disk is full")
    write(folder)

  monkeypatch.setattr(manifest, "write", write_or_fail)
  handlers = list(logging.getLogger("absl").handlers)
  one, two = (
    checkpoints.Checkpointer(tmp_path / name, CheckpointConfig())
    for name in ("one", "two")
  )
  one.save(3, {"params": {"a": jnp.zeros(3)}}, HOST)
  assert one.latest_step() is None  # nothing is written yet
  two.save(5, {"params": {"a": jnp.zeros(3)}}, HOST)
  go_on.set()
  with pytest.raises(layout.SaveError, match="checkpoint 3 .* the disk is ful"):
    one.wait()
  assert one.failed() and one.latest_step() is None
  save(two, 6)
  assert not two.failed() and two.latest_step() == 6
  two.close()
  assert logging.getLogger("absl").handlers == handlers


def test_an_old_checkpoint_that_cannot_go_ends_no_run(tmp_path, monkeypatch):
  rmtree, busy = shutil.rmtree, {"checkpoints/1", "checkpoints/2"}

  def fail(path, *args, **kwargs):
    if any(str(path).endswith(name) for name in busy):
      raise OSError("it is busy")
    rmtree(path, *args, **kwargs)

  monkeypatch.setattr(shutil, "rmtree", fail)
  saver = checkpoints.Checkpointer(tmp_path, CheckpointConfig(keep=1))
  for step in (1, 2, 3):
    save(saver, step)
  assert layout.steps(tmp_path) == [1, 2, 3]
  *_, line = saver.complaints()
  assert line.startswith(
    "2 old checkpoints could not be deleted: 1 (it is busy), 2 (it is busy);"
  )
  assert not saver.failed() and saver.newest_before(3) is None
  busy.remove("checkpoints/1")
  save(saver, 4)
  assert layout.steps(tmp_path) == [2, 4]
  assert len(saver.complaints()) == 1 and not saver.complaints()
  saver.close()
  busy.clear()
  saver = checkpoints.Checkpointer(tmp_path, CheckpointConfig(keep=1))
  save(saver, 5)  # another start tries, too
  assert layout.steps(tmp_path) == [5] and not saver.complaints()
  saver.close()
