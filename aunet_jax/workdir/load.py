"""A model out of a workdir, and a workdir around a model."""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from aunet_jax.aunet import devices, kernels, sharding
from aunet_jax.aunet.network import AUNet, abstract_params
from aunet_jax.config import Config
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.workdir import buckets, manifest, tables
from aunet_jax.workdir.buckets import BucketPath
from aunet_jax.workdir.checkpoints import newest_undamaged, read_items
from aunet_jax.workdir.layout import (
  CHECKPOINTS,
  TOKENIZER_FILE,
  CheckpointError,
  check_name,
  read_config,
  read_host,
  write_config,
)


def save_params(
  workdir: str | Path | BucketPath, config: Config, params: dict
) -> None:
  """Writes a workdir that holds a model and no training state.

  `generate`, `evaluate` and `train` accept it; training starts at step 0.

  Raises: ValueError where no checkpoint can be in a directory of that name.
  """
  check_name(buckets.path(workdir))
  splitter = Splitter(config.model.rules, config.has_roles)
  write_config(workdir, config)
  tables.keep(workdir, config.model.rules)
  directory = buckets.path(workdir).absolute() / CHECKPOINTS
  with ocp.CheckpointManager(directory) as manager:
    manager.save(
      0,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        host=ocp.args.JsonSave({"splitter_hash": splitter.hash}),
      ),
    )
    manager.wait_until_finished()
  manifest.write(directory / "0")


# ----- loading a model ------------------------------------------------------


class Loaded(NamedTuple):
  """A model out of a workdir, ready to apply."""

  model: AUNet
  params: dict
  splitter: Splitter
  config: Config
  step: int
  tokenizer: Tokenizer | None = None  # None: the model reads bytes


def load(
  workdir: str | Path | BucketPath,
  mesh: jax.sharding.Mesh | None = None,
  trust_rules: bool = False,
) -> Loaded:
  """Reads the model of the newest undamaged checkpoint.

  A newer one whose model is damaged is named on stderr, and left as it is. On
  GPUs the model gets the attention kernels that `kernels` finds.

  Args:
    mesh: where to put the parameters; None = the first device.
    trust_rules: whether the workdir may name code to run as a splitting rule,
      and files outside it as tables of one (see `tables`).
  Raises: CheckpointError where there is no undamaged checkpoint, or the
    splitting rule of this version of the package, or the workdir's
    tokenizer.json, is not the one the model was trained with.
  """
  workdir = buckets.path(workdir)
  config = read_config(workdir)
  model = tables.with_trusted_rules(workdir, config.model, trust_rules)
  splitter = Splitter(model.rules, config.has_roles)
  directory = workdir.absolute() / CHECKPOINTS
  step, damaged = newest_undamaged(workdir, items=("params", "host"))
  for number, reason in damaged.items():
    print(f"checkpoint {number} skipped: {reason}", file=sys.stderr)
  if step is None:
    raise CheckpointError(
      f"{workdir} has no checkpoint yet; train first, or wait for the first "
      f"save (every {config.checkpoint.every_steps} steps)."
    )
  boxed = abstract_params(config.model)
  if mesh is None:
    mesh = jax.sharding.Mesh(
      np.asarray(devices.present()[:1]).reshape(1, 1, 1), sharding.AXES
    )
  target = sharding.placed(
    sharding.unbox(boxed), sharding.tree_shardings(boxed, mesh)
  )
  host = read_host(workdir, step)
  check_splitter(host, splitter)
  with ocp.CheckpointManager(directory) as manager:
    params = read_items(manager, step, {"params": target})["params"]
  # The kernels it was trained with may not run on the devices here.
  model, _ = kernels.resolve(model.with_attention("auto"), mesh, say=_say)
  config = dataclasses.replace(config, model=model)
  tokenizer = None
  if config.data.tokenizer is not None:
    try:
      tokenizer = Tokenizer(buckets.here(workdir / TOKENIZER_FILE))
    except ValueError as error:
      raise CheckpointError(f"the workdir's tokenizer: {error}") from None
  check_tokenizer(host, tokenizer)
  return Loaded(AUNet(config.model), params, splitter, config, step, tokenizer)


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def check_tokenizer(host: dict, tokenizer: Tokenizer | None) -> None:
  """Raises: CheckpointError where it is not the one of the training run."""
  trained = host.get("tokenizer_hash")
  given = None if tokenizer is None else tokenizer.hash
  if trained != given:
    name = "bytes" if tokenizer is None else f"{tokenizer.path} (hash {given})"
    raise CheckpointError(
      f"the checkpoint was trained on "
      f"{'bytes' if trained is None else f'tokens of tokenizer {trained}'}, "
      f"but is now given {name}; restore the tokenizer.json it was trained "
      f"with, or use another workdir."
    )


def check_splitter(host: dict, splitter: Splitter) -> None:
  """Raises: CheckpointError where the rules' tables have changed."""
  if host["splitter_hash"] != splitter.hash:
    raise CheckpointError(
      f"the checkpoint was trained with splitting tables "
      f"{host['splitter_hash']}, this version makes {splitter.hash} for the "
      f"same rules: it would split text differently. Use the package version "
      f"that wrote the checkpoint."
    )
