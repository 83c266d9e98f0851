"""Names of what a run leaves in its workdir, and reading the small files."""

import contextlib
import json
from pathlib import Path

import jax

from aunet_jax import config as config_lib
from aunet_jax import files
from aunet_jax.config import Config
from aunet_jax.terminal import EXIT_BAD_INPUT, EXIT_FAILED, Failure

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"  # a copy; only where the model reads tokens
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"


class CheckpointError(Failure):
  """A workdir or a checkpoint in it cannot be read as it is."""

  status = EXIT_BAD_INPUT


class SaveError(CheckpointError):
  """A checkpoint could not be written; the next try may succeed."""

  status = EXIT_FAILED


def steps(workdir: str | Path) -> list[int]:
  """Committed checkpoints of a workdir, ascending."""
  directory = Path(workdir) / CHECKPOINTS
  return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


def read_host(workdir: str | Path, step: int) -> dict:
  """The JSON values of a checkpoint; `is_converted` tells what they are of.

  Raises: CheckpointError where they cannot be read.
  """
  folder = Path(workdir) / CHECKPOINTS / str(step)
  try:
    return json.loads((folder / "host" / "metadata").read_text())
  except (OSError, ValueError) as error:
    raise unreadable(folder, error) from error


def is_converted(host: dict) -> bool:
  """True for a model without training state."""
  return "loader" not in host


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
  files.write_whole(workdir / CONFIG_FILE, config.to_json() + "\n")


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
  files.write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


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

  def busy():
    raise ValueError(
      f"another process is training in {workdir}; wait for it, stop it, or "
      f"use another --workdir."
    )

  workdir.mkdir(parents=True, exist_ok=True)
  with files.locked(workdir / ".lock", busy):
    yield
