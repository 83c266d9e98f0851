"""Running the cells of a study: each once, whatever dies, and why one failed.

Most of this runs small programs in the trainer's place; the slow tests at the
end run the trainer.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aunet_jax.scaling import __main__ as scaling_main
from aunet_jax.scaling import collect
from aunet_jax.scaling import run as run_lib
from aunet_jax.scaling.run import LOCK_FILE
from aunet_jax.scaling.study import read_state, read_study

ROOT = Path(__file__).parents[2]
MODEL = f"{Path(__file__).parents[1] / 'tiny.py'}:for_budget"


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
  """Two cells of the smallest model, planned and not run."""
  monkeypatch.chdir(ROOT)
  return make_study(tmp_path)


def make_study(folder: Path) -> Path:
  text = folder / "text.txt"
  text.write_text("The word is longer than the byte, and 42 is a number. " * 99)
  flags = (f"--models={MODEL}", "--budgets=1e9", "--seeds=0,1")
  flags += (f"--data={text}", f"--heldout={text}")
  assert scaling_main.main(["plan", str(folder / "study"), *flags]) == 0
  return folder / "study"


def run(study, *flags) -> int:
  return scaling_main.main(["run", str(study), *flags])


def workdirs(study) -> list[Path]:
  return [study / run.run for run in read_study(study)[1]]


def states(study) -> list[str]:
  return [read_state(workdir).state for workdir in workdirs(study)]


@pytest.fixture
def trainer(monkeypatch):
  """Puts a Python program in the trainer's place; argv[1] is the workdir."""

  def use(program):
    def command(run, study):
      return [sys.executable, "-c", program, str(study / run.run)]

    monkeypatch.setattr(run_lib, "command", command)

  return use


COUNT = "open(__import__('sys').argv[1] + '/starts', 'a').write('x');"


def starts(study) -> list[int]:
  files = [cell / "starts" for cell in workdirs(study)]
  return [len(f.read_text()) if f.exists() else 0 for f in files]


def test_done_cells_are_not_started_again(study, trainer, capsys):
  trainer(COUNT)
  assert run(study) == 0
  assert run(study, "--retry", "--jobs=2") == 0
  assert starts(study) == [1, 1]
  assert "2 done, 0 failed, 0 waiting" in capsys.readouterr().out


def test_a_failure_is_explained_and_stops_no_other(study, trainer, capsys):
  fail_first = (
    COUNT + "print('error: a disk is full, 1'); "
    "raise SystemExit('s0' in __import__('sys').argv[1])"
  )
  trainer(fail_first)
  assert run(study) == 1
  assert states(study) == ["failed", "done"]
  out = capsys.readouterr().out
  assert "a disk is full, 1" in out and "--retry" in out
  assert run(study) == 1  # it stays failed until it is asked for
  assert starts(study) == [1, 1]
  capsys.readouterr()
  # Another reason, in the same log: the new one is shown, not the first.
  trainer(COUNT + "raise KeyError('no such thing')")
  assert run(study, "--retry") == 1
  out = capsys.readouterr().out
  assert "no such thing" in out and "a disk is full" not in out
  trainer(COUNT)
  assert run(study, "--retry") == 0
  assert starts(study) == [3, 1]


def test_a_failure_without_a_word_has_its_status(study, trainer, capsys):
  trainer("raise SystemExit(3)")
  assert run(study) == 1
  assert "exit status 3" in capsys.readouterr().out


def test_a_killed_cell_waits_and_goes_on(study, trainer):
  trainer(COUNT + "__import__('os').kill(__import__('os').getpid(), 9)")
  assert run(study) == 75
  assert states(study) == ["waiting", "waiting"]
  trainer(COUNT)
  assert run(study) == 0
  assert starts(study) == [2, 2]


def test_minutes_end_stops_cells_and_starts_no_other(study, trainer):
  trainer(COUNT + "__import__('signal').pause()")
  assert run(study, "--minutes=0.02") == 75
  assert starts(study) == [1, 0]
  assert states(study) == ["waiting", "waiting"]


def test_jobs_run_at_the_same_time(study, trainer):
  # Each ends once the other has begun as well.
  trainer(
    COUNT + "import glob, sys, time\n"
    "while len(glob.glob(sys.argv[1] + '/../*/starts')) < 2: time.sleep(0.05)"
  )
  assert run(study, "--jobs=2") == 0


def test_a_cell_that_another_process_runs_is_left_to_it(study, trainer):
  trainer(COUNT)
  first, second = workdirs(study)
  with (first / LOCK_FILE).open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert run(study) == 75
  assert states(study) == ["waiting", "done"]
  assert starts(study) == [0, 1]
  assert run(study) == 0
  assert starts(study) == [1, 1]


def test_a_killed_runner_leaves_its_cell_locked(study, trainer):
  """The cell outlives the runner; nothing starts it beside itself."""
  sleeper = COUNT + "__import__('time').sleep(600)"
  code = (
    "import sys; from aunet_jax.scaling import __main__ as scaling, run;"
    "run.command = lambda one, study: [sys.executable, '-c',"
    f" {sleeper!r}, str(study / one.run)];"
    f"scaling.main(['run', {str(study)!r}])"
  )
  runner = subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.DEVNULL
  )
  while starts(study) == [0, 0]:
    assert runner.poll() is None
    time.sleep(0.05)
  runner.kill()
  runner.wait()
  trainer(COUNT)
  assert run(study) == 75
  assert starts(study) == [1, 1]
  end_orphan(workdirs(study)[0])
  assert run(study) == 0
  assert starts(study) == [2, 1]


def end_orphan(cell) -> None:
  """Ends the process that holds a cell's lock."""
  lock = (cell / LOCK_FILE).resolve()
  for process in Path("/proc").glob("[0-9]*"):
    try:
      held = [os.readlink(link) for link in (process / "fd").iterdir()]
    except OSError:  # it has ended, or is another user's
      continue
    if str(lock) in held and int(process.name) != os.getpid():
      os.kill(int(process.name), signal.SIGKILL)
  with lock.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)


def test_print_gives_a_command_for_every_cell_that_is_not_done(
  study, trainer, capsys
):
  expected = [
    shlex.join(run_lib.command(one, study)) for one in read_study(study)[1]
  ]
  capsys.readouterr()
  assert run(study, "--print") == 0
  assert capsys.readouterr().out.splitlines() == expected
  trainer(COUNT)
  assert run(study, "--only=s0") == 0
  capsys.readouterr()
  assert run(study, "--print") == 0
  assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--only=nothing"], "--only=nothing matches no cell"),
    (["--minutes=0"], "--minutes=0.0 must be above 0"),
    (["--minutes=nan"], "--minutes=nan must be above 0"),
  ],
)
def test_what_cannot_be_run_is_named(study, capsys, flags, message):
  assert run(study, *flags) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--jobs=0", "--jobs=x", "--job=2"])
def test_wrong_flags_stop_with_usage(study, flag):
  with pytest.raises(SystemExit) as stop:
    run(study, flag)
  assert stop.value.code == 2


def test_a_torn_state_is_run_again(study, trainer):
  trainer(COUNT)
  assert run(study) == 0
  (workdirs(study)[0] / "state.json").write_text('{"state"')
  assert run(study) == 0
  assert starts(study) == [2, 1]


# ----- with the trainer -----------------------------------------------------


def losses(cell) -> list[tuple]:
  rows = (cell / "metrics.jsonl").read_text().splitlines()
  keys = ("step", "loss_nats", "bytes_seen", "heldout_bits_per_byte")
  return [tuple(json.loads(row).get(key) for key in keys) for row in rows]


def test_the_trainer_fills_a_cell_and_its_reason_is_shown(study, capsys):
  first, second = workdirs(study)
  plan = second / "plan.json"
  plan.write_text(plan.read_text().replace('"dim": 64', '"dim": 65'))
  assert run(study, "--jobs=2") == 1
  out = capsys.readouterr().out
  assert "1 done, 1 failed, 0 waiting" in out
  assert "must be a multiple of head_dim" in out
  assert losses(first)[-1][-1] > 0  # held-out bits per byte
  log = (first / "log.txt").read_bytes()
  assert run(study, "--only=s0") == 0
  assert (first / "log.txt").read_bytes() == log
  # What it left is what fits are made from.
  good, bad = collect.collect(study).rows
  assert good.excluded is None and good.loss == losses(first)[-1][-1]
  assert good.bytes == losses(first)[-1][2]
  assert good.useful_flops < good.padded_flops
  assert None not in (good.packed_data, good.splitter, good.fill)
  assert bad.excluded.startswith("failed: ")


def test_other_text_than_planned_is_refused(study, trainer, capsys):
  trainer(COUNT)
  (study.parent / "text.txt").write_text("another text")
  assert run(study) == 2
  assert "could not be compared" in capsys.readouterr().err
  assert starts(study) == [0, 0]


def start(study, *flags) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "aunet_jax.scaling", "run", str(study), *flags],
    stdout=subprocess.DEVNULL,
  )


@pytest.mark.slow
def test_killed_runners_and_cells_change_no_number(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  (tmp_path / "whole").mkdir()
  whole = make_study(tmp_path / "whole")
  assert run(whole) == 0
  (tmp_path / "cut").mkdir()
  cut = make_study(tmp_path / "cut")
  first = workdirs(cut)[0]
  logged = first / "metrics.jsonl"
  for more in (1, 2):  # killed while it trains, and again further on
    runner = start(cut)
    while runner.poll() is None:
      if logged.exists() and len(losses(first)) >= more:
        break
      time.sleep(0.02)
    runner.kill()
    runner.wait()
    end_orphan(first)
  assert run(cut) == 0
  for one, other in zip(workdirs(whole), workdirs(cut), strict=True):
    assert losses(one) == losses(other)


@pytest.mark.slow
def test_two_runners_share_a_study(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  study = make_study(tmp_path)
  runners = [start(study, "--jobs=2"), start(study, "--jobs=2")]
  for runner in runners:
    assert runner.wait() in (0, 75)
  assert states(study) == ["done", "done"]
  for cell in workdirs(study):
    log = (cell / "log.txt").read_text()
    assert log.count("compiled the step") == 1


@pytest.mark.slow
def test_a_printed_command_makes_a_cell_that_is_done(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(ROOT)
  study = make_study(tmp_path)
  capsys.readouterr()
  assert run(study, "--print", "--only=s1") == 0
  command = capsys.readouterr().out
  subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)
  second = workdirs(study)[1]
  before = losses(second)
  assert run(study) == 0
  assert losses(second) == before
