"""Names of what a run leaves in its workdir, and reading the small files."""

import contextlib
import dataclasses
import json
import os
import re
import time
import types
import typing
from pathlib import Path

import jax

from aunet_jax import config as config_lib
from aunet_jax import files
from aunet_jax.config import Config
from aunet_jax.terminal import (
  EXIT_BAD_INPUT,
  EXIT_FAILED,
  Failure,
  status_of,
)
from aunet_jax.workdir import buckets, together
from aunet_jax.workdir.buckets import BucketPath

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"  # a copy; only where the model reads tokens
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"

# Fields of the JSON files, where they are there. Other fields are free.
_HOST = {
  "splitter_hash": str,
  "data_fingerprint": str,
  "heldout_fingerprint": str | None,
  "tokenizer_hash": str | None,
  "loader": dict,
  "interval": dict,
}
_LOADER = {"next_row": int}
INTERVAL = {
  "bytes_seen": int,
  "nats": float,
  "level_nats": float,
  "ahead_nats": list[float],
  "targets": float,
  "bytes": int,
  "positions": list[int] | None,
  "steps": int,
  "recent": list[float],
}
_ROW = {
  "step": int,
  "bytes_seen": int,
  "loss_nats": float | None,
  "bits_per_byte": float | None,
  "bytes_per_second": float,
  "data_wait_share": float,
  "heldout_loss_nats": float,
  "heldout_bits_per_byte": float,
  "heldout_bytes": int,
}


class CheckpointError(Failure):
  """A workdir or a checkpoint in it cannot be read as it is."""

  status = EXIT_BAD_INPUT


class SaveError(CheckpointError):
  """A checkpoint could not be written; the next try may succeed."""

  status = EXIT_FAILED


def steps(workdir: str | Path | BucketPath) -> list[int]:
  """Committed checkpoints of a workdir, ascending."""
  directory, found = buckets.path(workdir) / CHECKPOINTS, []
  in_bucket = isinstance(directory, BucketPath)
  names = directory.names() if in_bucket else _names(directory)
  for name in names:
    number = name.rpartition("_")[2]  # where Orbax looks for a step
    if not number.isdigit():
      continue
    if not (name.isascii() and name == str(int(number))):
      raise CheckpointError(
        f"{directory / name} is named like a checkpoint but is none; "
        f"checkpoints are folders like {directory / '500'}. Move it elsewhere "
        f"or rename it."
      )
    if in_bucket and not (directory / name / buckets.COMMITTED).is_file():
      continue
    found.append(int(number))
  return sorted(found)


def _names(directory: Path) -> list[str]:
  return os.listdir(directory) if directory.is_dir() else []


# ----- JSON files ------------------------------------------------------------


def _fits(value, kind) -> bool:
  if isinstance(kind, types.UnionType):
    return any(_fits(value, part) for part in kind.__args__)
  if typing.get_origin(kind) is list:
    (part,) = typing.get_args(kind)
    return isinstance(value, list) and all(_fits(item, part) for item in value)
  if kind is float:
    kind = int | float
  return isinstance(value, kind) and not isinstance(value, bool)


def check_fields(value, fields: dict, required: tuple[str, ...], name: str):
  """Raises: ValueError where a JSON value is no dict of such fields."""
  if not isinstance(value, dict):
    raise ValueError(f"{name} is {value!r:.60}, not an object")
  for field in required:
    if field not in value:
      raise ValueError(f"{name} lacks {field}")
  for field, kind in fields.items():
    if field in value and not _fits(value[field], kind):
      kind = getattr(kind, "__name__", kind)
      raise ValueError(
        f"{field} of {name} is {value[field]!r:.60}, which is no {kind}"
      )


def read_host(workdir: str | Path | BucketPath, step: int) -> dict:
  """The JSON values of a checkpoint; `is_converted` tells what they are of.

  Raises: CheckpointError where they cannot be read.
  """
  folder = buckets.path(workdir) / CHECKPOINTS / str(step)
  try:
    host = files.parse_json((folder / "host" / "metadata").read_bytes())
    check_fields(host, _HOST, ("splitter_hash",), "host/metadata")
    if not is_converted(host):
      check_fields(host, {}, ("data_fingerprint",), "host/metadata")
      check_fields(host["loader"], _LOADER, ("next_row",), "loader")
      check_fields(host.get("interval", {}), INTERVAL, (), "interval")
  except (OSError, ValueError) as error:
    raise unreadable(folder, error) from error
  return host


def is_converted(host: dict) -> bool:
  """True for a model without training state."""
  return "loader" not in host


# How TensorStore begins what another try may mend (codes of absl::Status); an
# error of the disk or of the network under a mounted bucket is UNKNOWN.
_PASSING = re.compile(
  r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAVAILABLE"
  r"|UNKNOWN): "
)


def unreadable(
  folder: Path | BucketPath, reason: Exception | str
) -> CheckpointError:
  """For a checkpoint without manifest, or whose files are as they were.

  Its status is EXIT_FAILED where the reason may pass, and says so.
  """
  first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
  workdir = folder.parent.parent
  older = [step for step in steps(workdir) if step < int(folder.name)]
  remedy = f"continue from checkpoint {older[-1]}" if older else "start again"
  passing = isinstance(reason, OSError) and status_of(reason) == EXIT_FAILED
  passing = passing or bool(_PASSING.match(first))
  error = CheckpointError(
    f"checkpoint {folder} cannot be read ({first}); "
    f"{'run the same command again, or ' if passing else ''}delete that folder "
    f"to {remedy}."
  )
  error.status = EXIT_FAILED if passing else EXIT_BAD_INPUT
  return error


def write_config(workdir: str | Path | BucketPath, config: Config) -> None:
  workdir = buckets.path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  buckets.write_whole(workdir / CONFIG_FILE, config.to_json() + "\n")


def read_config(workdir: str | Path | BucketPath) -> Config:
  """Raises: CheckpointError where the workdir is missing or not ours,
  ValueError where it is another URL than gs://BUCKET/PATH.
  """
  workdir = buckets.path(workdir)
  path = workdir / CONFIG_FILE
  if not workdir.is_dir():
    raise CheckpointError(f"no such workdir: {workdir}")
  if not path.is_file():
    raise CheckpointError(
      f"{workdir} is not a workdir: it has no {CONFIG_FILE}."
    )
  try:
    return config_lib.from_json(path.read_text())
  except ValueError as error:
    raise CheckpointError(f"{path} cannot be read: {error}") from error


def flat_fields(value, path: str = "") -> dict[str, object]:
  """Every setting of a Config, or of a part of one, by its full name.

  As {"seed": 0, "model.stages[1].dim": 64, …}.
  """
  if dataclasses.is_dataclass(value):
    value = dataclasses.asdict(value)
  if isinstance(value, dict):
    items = [(f"{path}.{key}" if path else key, v) for key, v in value.items()]
  elif isinstance(value, list | tuple) and "stages" in path:
    items = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
  else:
    return {path: list(value) if isinstance(value, tuple) else value}
  return {k: v for key, one in items for k, v in flat_fields(one, key).items()}


def drop_rows_after(path: Path | BucketPath, step: int) -> None:
  """Removes rows of metrics.jsonl past `step`, and a torn last line."""
  if not path.exists():
    return
  kept = [row for row in read_rows(path) if row["step"] <= step]
  buckets.write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path | BucketPath) -> list[dict]:
  """The rows of a metrics file; torn or foreign lines are left out."""
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      row = files.parse_json(line)
      check_fields(row, _ROW, ("step",), "row")
    except ValueError:  # the process died while writing it
      continue
    rows.append(row)
  return rows


def column(rows: list[dict], *names: str) -> list[tuple]:
  """Values of the rows that have all of these fields, None left out."""
  values = (tuple(row.get(name) for name in names) for row in rows)
  return [value for value in values if None not in value]


@contextlib.contextmanager
def lock_workdir(workdir: Path | BucketPath):
  """Keeps a second run out of the workdir; process 0 holds the lock.

  On a disk the operating system frees it however the process ends; of a bucket
  see `buckets.Lock`. Every process must call this.

  Raises: ValueError where another run holds it, or the workdir is a file.
  """
  in_bucket = isinstance(workdir, BucketPath)
  with contextlib.ExitStack() as held:
    with together.all_or_none():
      check_name(workdir)
      if jax.process_index() == 0 and not in_bucket:
        workdir.mkdir(parents=True, exist_ok=True)
        held.enter_context(files.locked(workdir / LOCK_FILE, _busy(workdir)))
    if in_bucket:
      held.enter_context(_locked_object(workdir / LOCK_FILE))
    yield


def check_name(workdir: Path | BucketPath) -> None:
  """Whether a workdir can hold checkpoints. Raises: ValueError."""
  if not isinstance(workdir, BucketPath):
    if workdir.exists() and not workdir.is_dir():
      raise ValueError(f"--workdir={workdir} is a file; name a directory.")
    # Orbax looks for the arrays by such a pattern, and finds others or none.
    if odd := set("*?[") & set(str(workdir.absolute())):
      raise ValueError(
        f"--workdir={workdir} has {min(odd)!r} in its full name "
        f"{workdir.absolute()}, so that its checkpoints would lack their "
        f"arrays; use another."
      )
  try:
    str(workdir).encode()
  except UnicodeEncodeError:
    raise ValueError(
      f"--workdir={workdir} is not UTF-8, which checkpoints need; use another."
    ) from None


def _busy(workdir: Path):
  def busy():
    raise ValueError(
      f"another process is training in {workdir}; wait for it, stop it, or "
      f"use another --workdir."
    )

  return busy


@contextlib.contextmanager
def _locked_object(path: BucketPath):
  """Holds a lock in a bucket; the processes wait for it together."""
  with contextlib.closing(buckets.Lock(path)) as lock:
    taken = False
    while not taken:
      with together.all_or_none():
        if jax.process_index() == 0:
          taken = os.environ.get(files.LOCKS) == "none" or lock.take()
      taken = bool(together.broadcast(int(taken)))
      if not taken:
        time.sleep(min(1, buckets.BEAT_SECONDS))
    yield
