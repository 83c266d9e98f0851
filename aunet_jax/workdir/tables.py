"""What a workdir may make a splitter of: built-in rules, and its own tables.

A workdir can come from anywhere, and its config.json names rules. "word@1" is
ours; "tokens@FILE" and "entropy@FILE" name a file anywhere on this machine, and
"MODULE:NAME" code to run. So the files of a model's rules are copied to
WORKDIR/tables when it is saved and read from there alone, and code runs only
for a caller who says `trust_rules`.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from aunet_jax.config import ModelConfig, runs_code
from aunet_jax.splitting.rules import source_of
from aunet_jax.splitting.splitter import MACHINES
from aunet_jax.workdir import buckets
from aunet_jax.workdir.buckets import BucketPath
from aunet_jax.workdir.layout import CheckpointError

TABLES = "tables"


def _file_of(rule: str) -> tuple[str, str] | None:
  """("tokens", FILE) of "tokens@FILE"; None for a rule without a file."""
  kind, at, path = rule.partition("@")
  return (kind, path) if kind in MACHINES and at else None


def same_kind(rule: str | None, other: str | None) -> bool:
  """Whether both name a table of one kind; its content is told by its hash."""
  kinds = [_file_of(name or "") for name in (rule, other)]
  return None not in kinds and kinds[0][0] == kinds[1][0]


def _kept(workdir, number: int, kind: str) -> Path | BucketPath:
  """Where the table of stage `number`, from 2, lies in a workdir."""
  return buckets.path(workdir) / TABLES / f"stage{number}.{kind}"


def keep(workdir: str | Path | BucketPath, rules: Sequence[str]) -> None:
  """Copies the files that rules name into the workdir.

  Args: rules: of stages 2, 3, …; they have just made a splitter.
  Raises: ValueError for a pipe.
  """
  for number, rule in enumerate(rules, start=2):
    if file := _file_of(rule):
      kind, path = file
      copy = _kept(workdir, number, kind)
      if not Path(path).is_file():
        raise ValueError(
          f"splitting rule {rule}: {path} must be a file that can be read "
          f"again, to be copied to {copy}."
        )
      content = Path(path).read_bytes()
      if not (copy.is_file() and copy.read_bytes() == content):
        copy.parent.mkdir(exist_ok=True)
        buckets.write_whole(copy, content)


def _lies_in(path: Path | BucketPath, workdir: Path | BucketPath) -> bool:
  """Whether it is a file of the workdir's own, not a link out of it."""
  if isinstance(workdir, BucketPath):  # where names are names, even ".."
    return isinstance(path, BucketPath) and path.is_file()
  try:
    inside = path.resolve().is_relative_to(workdir.resolve())
    return inside and path.is_file()
  except (OSError, ValueError):  # a name that no file can have
    return False


def _trusted(workdir, number: int, rule: str, trust_rules: bool) -> str:
  """One rule, with the file to read it from. Raises: CheckpointError."""
  if runs_code(rule):
    source = source_of(rule)
    if not trust_rules:
      raise CheckpointError(
        f"{workdir} names the splitting rule {rule!r} for stage {number}: code "
        f"from {source}, which is not run unless you say so. If you trust it, "
        f"give --trust_rules (in Python: trust_rules=True)."
      )
    print(f"running splitting rule {rule!r}: {source}", file=sys.stderr)
    return rule
  file = _file_of(rule)
  if file is None:
    return rule
  kind, path = file
  copy = _kept(workdir, number, kind)
  if _lies_in(copy, workdir):
    return f"{kind}@{buckets.here(copy)}"
  for named in (workdir / path, Path(path)):
    if _lies_in(named, workdir):
      return f"{kind}@{buckets.here(named)}"
  if not trust_rules:
    raise CheckpointError(
      f"{workdir} names the splitting rule {rule!r} for stage {number}, a file "
      f"that is not part of it ({copy} is missing). Copy the file there, or "
      f"give --trust_rules (in Python: trust_rules=True) to read "
      f"{os.path.abspath(path)}."
    )
  print(f"reading splitting rule {rule!r}", file=sys.stderr)
  return rule


def with_trusted_rules(
  workdir: str | Path | BucketPath,
  model: ModelConfig,
  trust_rules: bool = False,
) -> ModelConfig:
  """The model of a workdir, its rules naming files of the workdir alone.

  Args: trust_rules: whether it may name code, and files outside it.
  Raises: CheckpointError naming the rule and what it would run or read.
  """
  workdir = buckets.path(workdir)
  stages = [model.stages[0]]
  for number, stage in enumerate(model.stages[1:], start=2):
    rule = _trusted(workdir, number, stage.rule or "", trust_rules)
    stages.append(dataclasses.replace(stage, rule=rule or None))
  return dataclasses.replace(model, stages=tuple(stages))
