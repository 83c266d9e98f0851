"""Names of what a run leaves in its workdir, and reading the small files."""

import contextlib
import fcntl
import json
from pathlib import Path

import jax

from aunet_jax import config as config_lib
from aunet_jax.config import Config
from aunet_jax.terminal import EXIT_BAD_INPUT, Failure

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"  # a copy; only where the model reads tokens
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"


class CheckpointError(Failure):
  """A checkpoint cannot be written or read; the message says what to do."""

  status = EXIT_BAD_INPUT


def steps(workdir: str | Path) -> list[int]:
  """Committed checkpoints of a workdir, ascending."""
  directory = Path(workdir) / CHECKPOINTS
  return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


def is_converted(workdir: str | Path, step: int) -> bool:
  """True where that checkpoint is a model without training state.

  Raises: CheckpointError where a part of a run's checkpoint is missing.
  """
  folder = Path(workdir) / CHECKPOINTS / str(step)
  try:
    host = json.loads((folder / "host" / "metadata").read_text())
  except (OSError, ValueError) as error:
    raise unreadable(folder, error) from error
  if "loader" not in host:
    return True
  if not (folder / "optimizer").is_dir():
    raise unreadable(folder, "its optimizer state is missing")
  return False


def unreadable(folder: Path, reason) -> CheckpointError:
  """For a checkpoint without manifest, or one its manifest calls whole."""
  first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
  older = [step for step in steps(folder.parents[1]) if step < int(folder.name)]
  remedy = f"continue from checkpoint {older[-1]}" if older else "start anew"
  return CheckpointError(
    f"checkpoint {folder} cannot be read ({first}); delete that folder to "
    f"{remedy}."
  )


def write_config(workdir: str | Path, config: Config) -> None:
  workdir = Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  partial = workdir / (CONFIG_FILE + ".partial")
  partial.write_text(config.to_json() + "\n")
  partial.rename(workdir / CONFIG_FILE)  # whole or not at all


def read_config(workdir: str | Path) -> Config:
  """Raises: CheckpointError where the workdir is missing or not ours."""
  path = Path(workdir) / CONFIG_FILE
  if not Path(workdir).is_dir():
    raise CheckpointError(f"no such workdir: {workdir}")
  if not path.is_file():
    raise CheckpointError(
      f"{workdir} is not a workdir: it has no {CONFIG_FILE}."
    )
  try:
    return config_lib.from_json(path.read_text())
  except ValueError as error:
    raise CheckpointError(f"{path} cannot be read: {error}") from error


def drop_rows_after(path: Path, step: int) -> None:
  """Removes rows of metrics.jsonl past `step`, and a torn last line."""
  if not path.exists():
    return
  kept = [row for row in read_rows(path) if row["step"] <= step]
  partial = path.with_suffix(".partial")
  partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
  partial.rename(path)


def read_rows(path: Path) -> list[dict]:
  """The whole rows of a metrics file; torn or foreign lines are left out."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:  # the process died while writing it
      continue
    if isinstance(row, dict) and isinstance(row.get("step"), int):
      rows.append(row)
  return rows


@contextlib.contextmanager
def lock_workdir(workdir: Path):
  """Keeps a second run out of the workdir; process 0 holds the lock.

  The operating system frees it however the process ends.

  Raises: ValueError where another run holds it, or the workdir is a file.
  """
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is a file; name a directory.")
  if jax.process_index() != 0:
    yield
    return
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / ".lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f"another process is training in {workdir}; wait for it, stop it, or "
        f"use another --workdir."
      ) from None
    yield
