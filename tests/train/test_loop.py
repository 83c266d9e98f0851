"""What the loop does at which step, and what it counts as training time."""

import inspect
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from aunet_jax.aunet import counts
from aunet_jax.data import loader as loader_lib
from aunet_jax.train import __main__ as train_main
from aunet_jax.train import evaluator, loop, metrics, setup, stopwatch, watchdog
from aunet_jax.workdir import checkpoints, layout

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  words = "one two three 44 five, six. seven\neight (nine) ten".split(" ")
  for i in range(40):
    chosen = rng.choice(words, size=int(rng.integers(10, 150)))
    (folder / f"{i}.txt").write_text(" ".join(chosen))
  return folder


def run(corpus, workdir, *flags) -> int:
  return train_main.main(
    [
      f"--config={ROOT / 'tests' / 'tiny.py'}", f"--workdir={workdir}",
      f"--config.data.train={corpus}", "--config.data.heldout_fraction=0.1",
      "--config.train.num_steps=7", "--config.train.log_every_steps=3",
      "--config.train.eval_every_steps=2", "--config.checkpoint.every_steps=5",
      *flags,
    ]
  )  # fmt: skip


def rows(workdir) -> list[tuple]:
  return [
    (row["step"], row.get("loss_nats"), row.get("heldout_loss_nats"))
    for row in layout.read_rows(workdir / layout.METRICS_FILE)
  ]


class Watched(NamedTuple):
  workdir: Path
  happened: list[str]  # saves and evaluations, in their order
  told: list[tuple[dict, float]]  # rows, and the seconds left


PEAK_FLOPS = 1e9  # of a device


@pytest.fixture(scope="module")
def watched(corpus, tmp_path_factory) -> Watched:
  """Evaluations and saves that take a thousand seconds each of its clock."""
  happened, told = [], []
  evaluate, save = evaluator.Evaluator.evaluate, checkpoints.Checkpointer.save

  def evaluate_slowly(self, *args):
    happened.append("evaluate")
    return evaluate(self, *args)

  def save_slowly(self, step, *args):
    happened.append(f"save {step}")
    save(self, step, *args)

  class SlowWatch(stopwatch.Stopwatch):
    def __init__(self):
      super().__init__(clock=lambda: time.perf_counter() + 1000 * len(happened))

  workdir = tmp_path_factory.mktemp("undisturbed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluator.Evaluator, "evaluate", evaluate_slowly)
    patch.setattr(checkpoints.Checkpointer, "save", save_slowly)
    patch.setattr(setup, "Stopwatch", SlowWatch)
    patch.setattr(loop.devices, "peak_flops", lambda device: PEAK_FLOPS)
    patch.setattr(metrics.Log, "progress", lambda _, *args: told.append(args))
    assert run(corpus, workdir) == 0
  return Watched(workdir, happened, told)


@pytest.fixture(scope="module")
def undisturbed(watched) -> Path:
  return watched.workdir


def test_the_last_step_is_logged_evaluated_and_saved(undisturbed):
  logged = [step for step, loss, _ in rows(undisturbed) if loss is not None]
  heldout = [step for step, _, loss in rows(undisturbed) if loss is not None]
  assert (logged, heldout) == ([3, 6, 7], [2, 4, 6, 7])
  assert layout.steps(undisturbed) == [5, 7]


def test_the_last_evaluation_comes_after_the_last_save(watched):
  """It takes minutes in a large run, in which a preemption loses no step."""
  last = ["save 5", "evaluate", "save 7", "evaluate"]
  assert watched.happened == ["evaluate", "evaluate", *last]


def test_evaluations_and_saves_are_no_part_of_the_speed(watched):
  """Of bytes a second, MFU and the time left alike."""
  model = layout.read_config(watched.workdir).model
  step = num_bytes = 0
  for row, left in watched.told:
    steps, step = row["step"] - step, row["step"]
    new, num_bytes = row["bytes_seen"] - num_bytes, row["bytes_seen"]
    seconds = new / row["bytes_per_second"]
    assert seconds < 900, row  # of the thousand that each evaluation takes
    assert left == pytest.approx((7 - step) * seconds / steps)
    positions = np.multiply(row["fill"], model.capacities) * 8 * steps
    useful = counts.useful_train_flops(model, positions)
    peak = PEAK_FLOPS * jax.device_count()
    assert row["useful_mfu"] == pytest.approx(useful / (seconds * peak))
  (start,) = json.loads((watched.workdir / "times.json").read_text())["starts"]
  assert 4000 <= start["seconds"]["evaluate"]
  assert 2000 <= start["seconds"]["save"]
  assert start["seconds"]["step"] < 900
  assert (start["first_step"], start["last_step"]) == (0, 7)


def test_a_run_whose_data_never_come_is_ended(
  corpus, tmp_path, monkeypatch, capfd
):
  waiting, ended, statuses = threading.Event(), threading.Event(), []
  fetch, fetched = loader_lib.Loader.__next__, []

  class Watch(watchdog.Watchdog):
    def __init__(self, *settings):
      assert settings == (1.0, 20.0)
      super().__init__(*settings, self.end)

    def limit(self):  # however long the other steps take here
      return 0.3 if waiting.is_set() else np.inf

    def end(self, status):
      statuses.append(status)
      ended.set()

  def hang(self):
    fetched.append(0)
    if len(fetched) == 4:
      waiting.set()
      assert ended.wait(120)
    return fetch(self)

  monkeypatch.setattr(loop, "Watchdog", Watch)
  monkeypatch.setattr(loader_lib.Loader, "__next__", hang)
  assert run(corpus, tmp_path, "--config.train.hang_seconds=1") == 0
  error = capfd.readouterr().err
  assert statuses == [1] and "in step 3" in error and "in hang" in error


def test_a_stop_in_an_evaluation_saves_and_the_next_start_repeats_it(
  corpus, undisturbed, tmp_path, monkeypatch, capsys
):
  real, calls = loader_lib.evaluation_batches, []

  def interrupted(*args, **kwargs):
    calls.append(0)
    if len(calls) in (2, 5):  # of step 4, and the last
      os.kill(os.getpid(), signal.SIGHUP)
    return real(*args, **kwargs)

  monkeypatch.setattr(loader_lib, "evaluation_batches", interrupted)
  for saved in (4, 7):
    assert run(corpus, tmp_path) == 75
    said = capsys.readouterr().out
    assert f"step {saved}: the evaluation stops" in said
    assert "stopped by SIGHUP; everything is saved" in said
    assert layout.steps(tmp_path)[-1] == saved
  assert run(corpus, tmp_path) == 0
  assert rows(tmp_path) == rows(undisturbed)


def test_a_late_checkpoint_is_saved(corpus, tmp_path):
  flags = (
    "--config.checkpoint.every_minutes=1e-6", "--config.train.num_steps=4"
  )  # fmt: skip
  assert run(corpus, tmp_path, "--config.checkpoint.keep=9", *flags) == 0
  assert layout.steps(tmp_path) == [1, 2, 3, 4]


def test_a_finished_run_whose_curve_cannot_be_written_has_finished(
  corpus, undisturbed, capsys
):
  curve = undisturbed / "loss_curve.png"
  curve.unlink()
  curve.mkdir()
  try:
    assert run(corpus, undisturbed) == 0
  finally:
    curve.rmdir()
  said = capsys.readouterr().out
  assert "no loss curve: " in said and "held-out text" in said


def test_rows_without_a_field_do_not_end_a_finished_run(
  corpus, undisturbed, capsys
):
  path = undisturbed / layout.METRICS_FILE
  before = path.read_text()
  lines = [
    {"step": 7, "bytes_per_second": 5.0},
    {"step": 7, "heldout_bits_per_byte": 1.0},
    {"step": 7, "heldout_bits_per_byte": "x", "heldout_bytes": 5},
    {"step": 7, "bits_per_byte": 1.0},
  ]
  path.write_text(before + "".join(json.dumps(row) + "\n" for row in lines))
  try:
    assert run(corpus, undisturbed) == 0
  finally:
    path.write_text(before)
  assert "held-out text" in capsys.readouterr().out


def test_more_steps_must_not_multiply_the_learning_rate_unasked(
  corpus, undisturbed, capsys
):
  flags = ("--config.train.num_steps=70", "--config.train.sample_bytes=0")
  before = (undisturbed / layout.CONFIG_FILE).read_text()
  assert run(corpus, undisturbed, *flags) == 2
  error = capsys.readouterr().err
  assert "train.num_steps 7 -> 70 makes the learning rate" in error
  assert "1.65e-05 -> 0.0016" in error and "--accept_learning_rate" in error
  assert (undisturbed / layout.CONFIG_FILE).read_text() == before
  assert run(corpus, undisturbed) == 0  # as it was


def test_an_empty_workdir_is_refused(corpus, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert run(corpus, "") == 2
  assert "--workdir is empty" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_workdir_whose_name_is_no_utf8_is_refused_at_the_start(
  corpus, tmp_path, capsys
):
  assert run(corpus, tmp_path / os.fsdecode(b"run\xff")) == 2
  assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("error", "status"),
  [
    (AssertionError(), 2),  # of JAX without any CUDA plugin
    (RuntimeError("Unable to initialize backend 'cuda': no plugin\nmore"), 2),
    (RuntimeError("Unable to initialize backend 'tpu': already in use"), 1),
  ],
)
def test_a_device_that_is_not_there_is_one_line(
  corpus, tmp_path, capsys, monkeypatch, error, status
):
  def devices():
    raise error

  monkeypatch.setattr(jax, "devices", devices)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  assert run(corpus, tmp_path) == status
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: JAX finds no device with JAX_PLATFORMS=cuda")


def test_the_loop_fits_a_screen():
  """The acts have names; the loop only says when they happen."""
  for function in (loop.run, loop.take_steps):
    assert len(inspect.getsource(function).splitlines()) <= 75, function
