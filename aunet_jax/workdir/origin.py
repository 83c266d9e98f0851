"""The model that a run began with, where it did not begin with noise.

`train.init_from` names a workdir: a run, or a conversion. Its parameters are
read once, before the first step; what they were is kept in
WORKDIR/init_from.json. A run that goes on reads its own checkpoints alone.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from aunet_jax.config import Config
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.workdir import buckets, layout, load, tables
from aunet_jax.workdir.buckets import BucketPath
from aunet_jax.workdir.checkpoints import newest_undamaged, read_items

FILE = "init_from.json"
BRANCH_FILE = "branch_from.json"  # of a run that branches off another

# Settings of a model that change no parameter and not what one means: rows of
# another shape, another kernel or precision. `document_mask` is False in
# converted models, whose rows of training were one document each.
_FREE = ("document_mask", "dtype", "unroll_layers")
_FREE_OF_A_STAGE = ("capacity", "remat", "attention")


class Origin(NamedTuple):
  """A checkpoint to begin with."""

  workdir: Path | BucketPath
  step: int
  splitter_hash: str


def differences(there: Config, here: Config) -> list[str]:
  """Every setting of the model that keeps parameters from being taken over.

  Returns: lines such as "model.stages[1].dim is 64 there, 80 here".
  """
  before, after = (
    layout.flat_fields({"model": config.model}) for config in (there, here)
  )
  found = []
  for field in sorted(before.keys() | after.keys()):
    old, new = before.get(field), after.get(field)
    free = _FREE_OF_A_STAGE if ".stages[" in field else _FREE
    missing = field not in before or field not in after
    if not missing and field.rpartition(".")[2] in free:
      continue
    # The content of a rule's table is told by its hash.
    if old == new or (field.endswith(".rule") and tables.same_kind(old, new)):
      continue
    shown = ["nothing" if x is None else repr(x) for x in (old, new)]
    found.append(f"{field} is {shown[0]} there, {shown[1]} here")
  if there.model.num_stages != here.model.num_stages:
    old, new = there.model.num_stages, here.model.num_stages
    found = [line for line in found if ".stages[" not in line]
    found.insert(0, f"the model has {old} stages there, {new} here")
  return found


def find(
  workdir: Path,
  config: Config,
  splitter: Splitter,
  tokenizer: Tokenizer | None,
) -> Origin:
  """The newest undamaged checkpoint of `train.init_from`, if it fits the run.

  Raises: ValueError naming every difference in one line, CheckpointError where
    there is no checkpoint, or its splitting tables or tokenizer differ.
  """
  source = buckets.path(config.train.init_from, "train.init_from")
  if source.resolve() == buckets.path(workdir).resolve():
    raise ValueError(
      f"train.init_from={str(source)!r} is the --workdir itself, which goes on "
      f"from its own checkpoints; leave it out, or name another --workdir."
    )
  found = differences(layout.read_config(source), config)
  if found:
    raise ValueError(
      f"train.init_from={str(source)!r} holds another model: "
      f"{'; '.join(found)}."
    )
  step, _ = newest_undamaged(source, items=("params", "host"))
  if step is None:
    raise layout.CheckpointError(
      f"train.init_from={str(source)!r} has no checkpoint yet; train it first."
    )
  host = layout.read_host(source, step)
  host["splitter_hash"] = host["splitter_hash"].removesuffix("+roles")
  load.check_splitter(host, Splitter(splitter.rules))
  load.check_tokenizer(host, tokenizer)
  return Origin(source, step, host["splitter_hash"])


def read(origin: Origin, targets: dict[str, object]) -> dict[str, object]:
  """Arrays of its checkpoint. Every process must call this.

  Arguments, result and errors as `checkpoints.read_items`.
  """
  directory = origin.workdir.absolute() / layout.CHECKPOINTS
  with ocp.CheckpointManager(directory) as manager:
    return read_items(manager, origin.step, targets)


def params_hash(params: dict) -> str:
  """Of names, shapes, types and values; not of how devices share them.

  Every process must call this: the values are gathered one array at a time.
  """
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.ascontiguousarray(leaf)
    name = jax.tree_util.keystr(path)
    digest.update(f"{name} {array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def keep(
  workdir: Path | BucketPath, origin: Origin, params_hash: str, name: str = FILE
) -> None:
  """Writes down in WORKDIR/NAME what the run began with."""
  said = {
    "workdir": str(origin.workdir.absolute()),
    "step": origin.step,
    "params_hash": params_hash,
    "splitter_hash": origin.splitter_hash,
  }
  workdir.mkdir(parents=True, exist_ok=True)
  buckets.write_whole(workdir / name, json.dumps(said, indent=2) + "\n")
