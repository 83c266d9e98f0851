"""Runs the cells of a study: resumable, never twice, a failure stops no other.

A cell's state is in its directory: state.json once it is done or has failed;
else it waits, or runs, or was interrupted and goes on from its checkpoint.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aunet_jax import terminal
from aunet_jax.scaling.plan import CELL_FILE, PLAN_FILE, STUDY_FILE, fingerprint
from aunet_jax.workdir import layout

STATE_FILE, LOG_FILE, LOCK_FILE = "state.json", "log.txt", ".cell.lock"


# Exit statuses of a run that was stopped, not one that failed.
STOPPED = (75, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)


SECONDS_BETWEEN_TABLES = 30.0


class Cell(NamedTuple):
  """One planned run on disk."""

  id: str
  workdir: Path
  values: dict  # cell.json
  num_steps: int


def read_about(study: Path) -> dict:
  """The study's description, study.json.

  Raises: ValueError where the directory holds no study.
  """
  try:
    return json.loads((study / STUDY_FILE).read_text())
  except FileNotFoundError:
    raise ValueError(
      f"{study} has no {STUDY_FILE}; make a study with "
      f"`python -m aunet_jax.scaling plan {study} …`."
    ) from None
  except ValueError as error:
    raise ValueError(f"{study / STUDY_FILE} is damaged: {error}") from None


def read_cell(study: Path, name: str) -> Cell:
  """One cell. Raises: ValueError where it is not as it was planned."""
  workdir = study / "cells" / name
  try:
    values = json.loads((workdir / CELL_FILE).read_text())
    plan = json.loads((workdir / PLAN_FILE).read_text())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{workdir} is not as it was planned ({error}); restore it, or plan "
      f"the study again in another directory."
    ) from None
  return Cell(name, workdir, values, plan["train"]["num_steps"])


def read_study(study: Path) -> tuple[dict, list[Cell]]:
  """The study's description and its cells, cheapest first.

  Raises: ValueError where the directory holds no whole study.
  """
  about = read_about(study)
  cells = [read_cell(study, name) for name in about["cells"]]
  return about, sorted(cells, key=lambda c: (c.values["padded_flops"], c.id))


def read_state(cell: Cell) -> dict:
  """{"state": "done" | "failed" | "waiting", …}."""
  try:
    return json.loads((cell.workdir / STATE_FILE).read_text())
  except FileNotFoundError:
    return {"state": "waiting"}
  except ValueError:  # torn by a crash: run it again, which is cheap if done
    return {"state": "waiting"}


def _write_state(cell: Cell, **values) -> None:
  partial = cell.workdir / (STATE_FILE + ".partial")
  partial.write_text(json.dumps(values) + "\n")
  partial.rename(cell.workdir / STATE_FILE)


def command(cell: Cell, study: Path) -> list[str]:
  """The training command of a cell. Cells that split alike share the cache."""
  return [
    sys.executable,
    "-m",
    "aunet_jax.train",
    f"--config={cell.workdir / PLAN_FILE}",
    f"--workdir={cell.workdir}",
    f"--config.data.cache_dir={study / 'data'}",
  ]


class _Job:
  """A cell in a process of its own, which holds the cell's lock as well.

  So a cell whose runner was killed is not started a second time beside it.
  """

  def __init__(self, cell: Cell, study: Path, lock):
    self.cell, self._lock = cell, lock
    self._began = time.monotonic()
    with (cell.workdir / LOG_FILE).open("ab") as log:
      self._log_start = log.tell()  # what stands before is of earlier starts
      self.process = subprocess.Popen(
        command(cell, study),
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
      _write_state(self.cell, state="done", seconds_of_last_start=seconds)
    elif status not in STOPPED:
      reason = self._reason(status)
      _write_state(self.cell, state="failed", status=status, reason=reason)
    self._lock.close()

  def _reason(self, status: int) -> str:
    with (self.cell.workdir / LOG_FILE).open("rb") as log:
      log.seek(self._log_start)
      lines = log.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    silent = [f"exit status {status}, and no word in {LOG_FILE}"]
    return (errors or lines or silent)[-1].removeprefix("error: ")


def _start(cell: Cell, study: Path) -> _Job | None:
  """Starts a cell unless another process has it or has just finished it."""
  lock = (cell.workdir / LOCK_FILE).open("w")
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.close()
    return None
  if read_state(cell)["state"] == "done":
    lock.close()
    return None
  (cell.workdir / STATE_FILE).unlink(missing_ok=True)
  return _Job(cell, study, lock)


def run(
  study: Path,
  *,
  jobs: int = 1,
  only: Sequence[str] = (),
  retry: bool = False,
  seconds: float | None = None,
) -> dict[str, list[str]]:
  """Runs every cell that is not done; failed ones only with `retry`.

  Args:
    jobs: cells at a time. only: parts of the ids to run; none = all.
    seconds: start no cell after this many, and stop those that run: they go on
      the next time.
  Returns: ids by state: done, failed, waiting.
  Raises: ValueError where the study cannot be run: none, or other data.
  """
  about, cells = read_study(study)
  _check_data(about)
  cells = [c for c in cells if not only or any(part in c.id for part in only)]
  if not cells:
    raise ValueError(f"--only={','.join(only)} matches no cell of {study}.")
  todo = []
  for cell in cells:
    state = read_state(cell)["state"]
    if state == "waiting" or (state == "failed" and retry):
      todo.append(cell)
  running: list[_Job] = []
  table = _Table(cells)
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
        job = _start(todo.pop(0), study)
        if job is not None:
          running.append(job)
      for job in [job for job in running if job.process.poll() is not None]:
        running.remove(job)
        job.finish()
        table.changed()
      table.show([job.cell.id for job in running])
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
  for cell in cells:
    result[read_state(cell)["state"]].append(cell.id)
  return result


def _check_data(about: dict) -> None:
  if about["data"] is None:
    return
  now = fingerprint(about["data"])
  if now != about["data_fingerprint"]:
    raise ValueError(
      f"the files under {about['data']} are not those the study was planned "
      f"for (fingerprint {now}, planned {about['data_fingerprint']}); its runs "
      f"could not be compared. Restore them, or plan another study."
    )


# ----- what a user sees -----------------------------------------------------


def progress(cell: Cell) -> dict:
  """Last step, bits per byte and held-out bits per byte that were logged."""
  seen = {"step": 0, "bits": None, "heldout": None, "speed": None}
  for row in layout.read_rows(cell.workdir / layout.METRICS_FILE):
    seen["step"] = row["step"]
    seen["bits"] = row.get("bits_per_byte", seen["bits"])
    seen["heldout"] = row.get("heldout_bits_per_byte", seen["heldout"])
    seen["speed"] = row.get("bytes_per_second", seen["speed"])
  return seen


class _Table:
  """Redrawn in place on a terminal; elsewhere a new one now and then."""

  def __init__(self, cells: Sequence[Cell]):
    self._cells = cells
    self._live = sys.stdout.isatty()
    self._next, self._height, self._shown = 0.0, 0, ""

  def changed(self) -> None:
    self._next = 0.0

  def show(self, running: Sequence[str], last: bool = False) -> None:
    now = time.monotonic()
    if now < self._next and not last:  # a table reads the log of every cell
      return
    self._next = now + (1.0 if self._live else SECONDS_BETWEEN_TABLES)
    shown = table(self._cells, running)
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


def table(cells: Sequence[Cell], running: Sequence[str]) -> str:
  """One line a cell: state, steps, bits per byte, time left."""
  width = max(len(cell.id) for cell in cells)
  lines = [f"{'cell':{width}}  state        step           bits/byte  left"]
  for cell in cells:
    state = read_state(cell)
    seen = progress(cell)
    name = "running" if cell.id in running else state["state"]
    if name == "waiting" and seen["step"]:
      name = "interrupted"
    bits = seen["heldout"] if name == "done" else seen["bits"]
    left = ""
    if name == "running" and seen["speed"]:
      rest = 1 - seen["step"] / cell.num_steps
      left = terminal.duration(rest * cell.values["bytes"] / seen["speed"])
    line = (
      f"{cell.id:{width}}  {name:11}  {seen['step']:>6}/{cell.num_steps:<6}  "
      f"{'' if bits is None else f'{bits:.3f}':>9}  {left}"
    )
    lines.append((line + f"  {state.get('reason', '')}").rstrip())
  return "\n".join(lines)
