"""Runs the cells of a study: resumable, never twice, a failure stops no other.

A cell's state is in its directory: state.json once it is done or has failed;
else it waits, or runs, or was interrupted and goes on from its checkpoint.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aunet_jax import terminal
from aunet_jax.files import Lock
from aunet_jax.scaling.sample import fingerprint
from aunet_jax.scaling.study import (
  PLAN_FILE,
  STATE_FILE,
  About,
  Logged,
  Run,
  State,
  read_log,
  read_state,
  read_study,
  write_state,
)

LOG_FILE, LOCK_FILE = "log.txt", ".cell.lock"

# Exit statuses of a run that was stopped, not one that failed.
STOPPED = (
  terminal.EXIT_STOPPED,
  terminal.EXIT_INTERRUPTED,
  -signal.SIGINT,
  -signal.SIGTERM,
  -signal.SIGKILL,
)

SECONDS_BETWEEN_TABLES = 30.0


def command(run: Run, study: Path) -> list[str]:
  """The training command of a run. Runs that split alike share the cache."""
  workdir = study / run.run
  return [
    sys.executable,
    "-m",
    "aunet_jax.train",
    f"--config={workdir / PLAN_FILE}",
    f"--workdir={workdir}",
    f"--config.data.cache_dir={study / 'data'}",
  ]


class _Job:
  """A run in a process of its own, which holds the cell's lock as well.

  So a cell whose runner was killed is not started a second time beside it.
  """

  def __init__(self, run: Run, study: Path, lock: Lock, flags: Sequence[str]):
    self.run, self._workdir, self._lock = run, study / run.run, lock
    self._began = time.monotonic()
    with (self._workdir / LOG_FILE).open("ab") as log:
      self._log_start = log.tell()  # what comes before is of earlier starts
      self.process = subprocess.Popen(
        [*command(run, study), *flags],
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=[lock.fileno()],
        start_new_session=True,  # Ctrl-C comes to us, who ask it to stop
      )

  def finish(self) -> None:
    """Writes what became of it. Call once the process has ended."""
    status = self.process.returncode
    seconds = time.monotonic() - self._began
    if status == 0:
      done = State(state="done", seconds_of_last_start=seconds)
      write_state(self._workdir, done)
    elif status not in STOPPED:
      reason = self._reason(status)
      failed = State(state="failed", status=status, reason=reason)
      write_state(self._workdir, failed)
    self._lock.close()

  def _reason(self, status: int) -> str:
    with (self._workdir / LOG_FILE).open("rb") as log:
      log.seek(self._log_start)
      lines = log.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    silent = [f"exit status {status}, and nothing in {LOG_FILE}"]
    return (errors or lines or silent)[-1].removeprefix("error: ")


def _start(run: Run, study: Path, flags: Sequence[str]) -> _Job | None:
  """Starts a run unless another process has it or has just finished it."""
  workdir = study / run.run
  with contextlib.ExitStack() as stack:
    lock = stack.enter_context(contextlib.closing(Lock(workdir / LOCK_FILE)))
    if not lock.take(wait=False) or read_state(workdir).state == "done":
      return None
    (workdir / STATE_FILE).unlink(missing_ok=True)
    job = _Job(run, study, lock, flags)
    stack.pop_all()  # the job closes it
    return job


def run(
  study: Path,
  *,
  jobs: int = 1,
  only: Sequence[str] = (),
  retry: bool = False,
  seconds: float | None = None,
  flags: Sequence[str] = (),
) -> dict[str, list[str]]:
  """Makes every run that is not done; failed ones only with `retry`.

  Args:
    jobs: runs at a time. only: parts of the ids to run; none = all.
    seconds: start nothing after this many, and stop what runs: it goes on the
      next time.
    flags: more of the training command.
  Returns: ids by state: done, failed, waiting.
  Raises: ValueError where the study cannot be run: none, or other data.
  """
  about, runs = read_study(study)
  _check_data(about)
  runs = [run for run in runs if matches(run, only)]
  if not runs:
    raise ValueError(f"--only={','.join(only)} matches no cell of {study}.")
  todo = []
  for one in runs:
    state = read_state(study / one.run).state
    if state == "waiting" or (state == "failed" and retry):
      todo.append(one)
  running: list[_Job] = []
  table = _Table(study, runs)
  end = None if seconds is None else time.monotonic() + seconds
  stopping = False

  def ask_to_stop(number, frame):
    raise KeyboardInterrupt

  old = signal.signal(signal.SIGTERM, ask_to_stop)
  try:
    while todo or running:
      if end is not None and time.monotonic() > end and not stopping:
        stopping, todo = True, []
        for job in running:
          job.process.send_signal(signal.SIGTERM)
      while todo and len(running) < jobs:
        job = _start(todo.pop(0), study, flags)
        if job is not None:
          running.append(job)
      for job in [job for job in running if job.process.poll() is not None]:
        running.remove(job)
        job.finish()
        table.changed()
      table.show([job.run.id for job in running])
      time.sleep(0.2)
  except KeyboardInterrupt:
    for job in running:
      job.process.send_signal(signal.SIGTERM)
    for job in running:
      job.process.wait()
      job.finish()
    running = []
    raise
  finally:
    signal.signal(signal.SIGTERM, old)
    for job in running:
      job.process.kill()
  table.show([], last=True)
  result = {"done": [], "failed": [], "waiting": []}
  for one in runs:
    result[read_state(study / one.run).state].append(one.id)
  return result


def matches(run: Run, only: Sequence[str]) -> bool:
  """Whether its id has one of these parts; always where there are none."""
  return not only or any(part in run.id for part in only)


def _check_data(about: About) -> None:
  if about.data is None:
    return
  now = fingerprint(about.data)
  if now != about.data_fingerprint:
    raise ValueError(
      f"the files under {about.data} are not those the study was planned "
      f"for (fingerprint {now}, planned {about.data_fingerprint}); its runs "
      f"could not be compared. Restore them, or plan another study."
    )


# ----- what a user sees -----------------------------------------------------


class _Table:
  """Redrawn in place on a terminal; elsewhere a new one now and then."""

  def __init__(self, study: Path, runs: Sequence[Run]):
    self._study, self._runs = study, runs
    self._live = sys.stdout.isatty()
    self._next, self._height, self._shown = 0.0, 0, ""

  def changed(self) -> None:
    self._next = 0.0

  def show(self, running: Sequence[str], last: bool = False) -> None:
    now = time.monotonic()
    if now < self._next and not last:  # a table reads the log of every run
      return
    self._next = now + (1.0 if self._live else SECONDS_BETWEEN_TABLES)
    shown = table(self._study, self._runs, running)
    if shown == self._shown:
      return
    self._shown = shown
    lines = shown.splitlines()
    if self._live:
      room = max(5, os.get_terminal_size().lines - 2)
      lines = lines[:room]
      if self._height:
        print(f"\033[{self._height}A\033[J", end="")
      self._height = len(lines)
    print("\n".join(lines), flush=True)


def table(study: Path, runs: Sequence[Run], running: Sequence[str]) -> str:
  """One line a run: state, steps, bits per byte, time left."""
  width = max(len(run.id) for run in runs)
  lines = [f"{'cell':{width}}  state        step           bits/byte  left"]
  for run in runs:
    state, log = read_state(study / run.run), _log(study / run.run)
    name = "running" if run.id in running else state.state
    if name == "waiting" and log:
      name = "interrupted"

    def last(field, log=log):
      known = [getattr(row, field) for row in reversed(log)]
      return next((value for value in known if value is not None), None)

    step = last("step") or 0
    bits = last("heldout_bits_per_byte" if name == "done" else "bits_per_byte")
    speed, left = last("bytes_per_second"), ""
    if name == "running" and speed and speed > 1:
      left = terminal.duration((1 - step / run.steps) * run.bytes / speed)
    line = (
      f"{run.id:{width}}  {name:11}  {step:>6}/{run.steps:<6}  "
      f"{'' if bits is None else f'{bits:.3f}':>9}  {left}"
    )
    lines.append(f"{line}  {state.reason}".rstrip())
  return "\n".join(lines)


def _log(workdir: Path) -> list[Logged]:
  """A damaged log stops no other run; `fit` says what is wrong with it."""
  try:
    return read_log(workdir)
  except ValueError:
    return []
