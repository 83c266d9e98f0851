"""Everything before the first step: config, data, checkpoint, log."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from aunet_jax.aunet import attention, counts, devices, kernels, sharding
from aunet_jax.config import Config
from aunet_jax.data import building
from aunet_jax.data.corpora import Corpus, open_corpora
from aunet_jax.data.loader import Loader, check_memory, make_loader
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import (
  branch,
  changes,
  metrics,
  optimizer,
  state,
  wandb_run,
)
from aunet_jax.train.cluster import keep_compiled_programs
from aunet_jax.train.evaluator import Evaluator
from aunet_jax.train.state import TrainState
from aunet_jax.train.stopwatch import History, Stopwatch
from aunet_jax.workdir import (
  buckets,
  checkpoints,
  layout,
  load,
  origin,
  tables,
  together,
)
from aunet_jax.workdir.buckets import BucketPath


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises: ValueError where rows do not divide over devices."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = config.train.batch_size // config.train.grad_accumulation
  if rows % shards:
    raise ValueError(
      f"train.batch_size={config.train.batch_size} in "
      f"{config.train.grad_accumulation} microbatches gives {rows} rows, which "
      f"do not divide over {shards} devices (mesh data="
      f"{mesh.shape['data']}, fsdp={mesh.shape['fsdp']}); use a batch_size "
      f"that is a multiple of {shards * config.train.grad_accumulation}."
    )


def check_width(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises: ValueError where matrices do not divide over `fsdp`."""
  fsdp = mesh.shape["fsdp"]
  widths = [stage.dim for stage in config.model.stages]
  if any(width % fsdp for width in widths):
    raise ValueError(
      f"mesh.fsdp={fsdp} must divide the width of every stage, "
      f"{', '.join(map(str, widths))}; use a divisor of "
      f"{math.gcd(*widths)}, and mesh.data for the other devices."
    )


def check_size(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises: ValueError where a batch or the state can fit no such machine.

  Said before any data are read; what else a step takes, its compiler knows.
  """
  _, share_count = sharding.batch_share(mesh)
  rows, length = config.train.batch_size, config.model.capacities[0]
  check_memory(rows // share_count, length)
  host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    there = host * jax.process_count()
  else:
    there = (devices.memory_limit(device) or host) * mesh.size
  number = counts.num_parameters(config.model)
  size = 3 * 4 * number
  if size > there:
    raise ValueError(
      f"a model of {number:,} parameters takes {size / 1e9:,.1f} GB with its "
      f"optimizer state, and these devices have {there / 1e9:,.1f} GB; use a "
      f"smaller model or more devices."
    )


def open_tokenizer(config: Config) -> Tokenizer | None:
  """The tokenizer of a config; None where it reads bytes.

  Raises: ValueError where the model has another vocabulary.
  """
  if config.data.tokenizer is None:
    return None
  tokenizer = Tokenizer(config.data.tokenizer)
  if config.model.vocab_size != tokenizer.vocab_size:
    raise ValueError(
      f"model.vocab_size={config.model.vocab_size}, but data.tokenizer="
      f"{config.data.tokenizer!r} has {tokenizer.size} tokens and BOS and EOS; "
      f"set model.vocab_size={tokenizer.vocab_size}."
    )
  return tokenizer


_MOST_AT_START = 10e9  # bytes of files: some minutes of one core


def who_builds(config: Config, cache: Path, num_processes: int) -> building.How:
  """Whether this run builds a missing index; see `data.build_index`.

  Args: num_processes: of the run, that wait while one builds.
  """
  wanted = config.data.build_index
  if wanted or (wanted is None and num_processes == 1):
    return building.ALONE
  return building.How(
    most_bytes=-1 if wanted is False else _MOST_AT_START,
    refusal=(
      f"{num_processes} processes would wait while it is built. Build it once, "
      f"where no accelerator waits: `python -m aunet_jax.prepare --index="
      f"{cache.absolute()} --workers=N`, with this --config and its settings; "
      f"then start this run with data.cache_dir={cache.absolute()}. Or set "
      f"data.build_index=True to build it here."
    ),
  )


class Setup(NamedTuple):
  """A run ready for its next step."""

  config: Config  # on GPUs with a kernel for each `attention="auto"`
  workdir: Path | BucketPath
  mesh: jax.sharding.Mesh
  tx: optax.GradientTransformation
  train_state: TrainState
  shardings: TrainState
  loader: Loader
  heldout: Corpus | None
  evaluator: Evaluator
  saver: checkpoints.Checkpointer
  log: metrics.Log
  watch: Stopwatch
  history: History
  interval: metrics.Interval
  identity: dict  # hashes and kernels stored in every checkpoint


class Restored(NamedTuple):
  """Where a run begins."""

  train_state: TrainState
  loader: dict | None  # position in the data; None = at its beginning
  interval: dict | None  # sums of the rows not yet logged; None = nothing


def restore(
  config: Config,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  read: Callable[[dict], dict] | None,
  host: dict,
) -> Restored:
  """The state of a checkpoint, or a new one.

  Args:
    read: arrays of the checkpoint for trees of shapes with shardings (see
      `checkpoints.read_items`); None = begin with random parameters.
    host: its JSON values; where they have no position in the data, its model is
      taken alone.
  Raises: CheckpointError where it cannot be read.
  """
  if read is None:
    fresh = state.create_state(config.model, tx, mesh, config.seed)
    return Restored(fresh, None, None)
  abstract, shardings = state.abstract_state(config.model, tx, mesh)
  targets = sharding.placed(abstract, shardings).items()
  if layout.is_converted(host):
    params = read({"params": targets["params"]})["params"]
    fresh = state.with_params(params, config.model, tx, mesh)
    return Restored(fresh, None, None)
  restored = TrainState.from_items(read(targets))
  return Restored(restored, host["loader"], host.get("interval"))


def check_identity(
  host: dict, config: Config, workdir, splitter, tokenizer, corpus
) -> None:
  """Compares a checkpoint with what would continue it.

  Raises: CheckpointError where rules or tokenizer differ, ValueError where the
    data do.
  """
  load.check_splitter(host, splitter)
  if layout.is_converted(host):
    return
  load.check_tokenizer(host, tokenizer)
  if host["data_fingerprint"] != corpus.fingerprint:
    raise ValueError(
      f"the data under data.train={config.data.train!r} is not what "
      f"{workdir} was trained on (fingerprint {corpus.fingerprint}, the "
      f"checkpoint has {host['data_fingerprint']}): files were added, "
      f"removed or edited, or another version packed them, and the index it "
      f"began with is gone. Restore them or use another --workdir."
    )


def cache_of(config: Config, workdir: Path | BucketPath) -> Path | str:
  """Where the packed index is kept. Raises: ValueError for a bucket."""
  if config.data.cache_dir is not None:
    return config.data.cache_dir
  if isinstance(workdir, BucketPath):
    raise ValueError(
      f"--workdir={workdir} is a bucket, and the packed index is read at "
      f"random: name a directory of this machine for it, as "
      f"--config.data.cache_dir=/tmp/aunet_data."
    )
  return workdir / "data"


def set_up(
  config: Config,
  workdir: Path | BucketPath,
  accept_learning_rate: bool = False,
) -> Setup:
  """Opens data and workdir, and restores what is there.

  Order of a resume: 1. the newest undamaged checkpoint is chosen; 2. the config
  is compared with the workdir's; 3. the data opens; 4. the checkpoint's
  splitting tables, tokenizer and data are compared; 5. attention kernels are
  found (on GPUs those of the checkpoint, where nothing has changed); 6. it is
  restored (of a run without a checkpoint, `train.branch_from`,
  `train.init_from` or random parameters); 7. the data iterator is set;
  8. config.json is written, and a branch saves what it begins with; 9. the log
  loses its rows past the restored step.

  Where a process of several fails, all do.

  Args: accept_learning_rate: see `changes.check_rate`.
  Raises: ValueError, CheckpointError.
  """
  watch = Stopwatch()
  is_main = jax.process_index() == 0

  def say(line):
    if is_main:
      print(line, flush=True)

  keep_compiled_programs()
  with together.all_or_none():
    mesh = sharding.make_mesh(config.mesh)
    check_batch(config, mesh)
    check_width(config, mesh)
    check_size(config, mesh)
    wandb_run.check(config)
    cache = cache_of(config, workdir)
    attention.check(config.model.stages, sharding.platform(mesh))
    tx = optimizer.make_optimizer(config)
    splitter = Splitter(config.model.rules, config.has_roles)
    tokenizer = open_tokenizer(config)
  newest = checkpoints.choose(workdir, say)
  branched = None
  if newest is None and config.train.branch_from is not None:
    branched = branch.find(workdir, config, say)

  with together.all_or_none():
    old = config
    host = {} if newest is None else layout.read_host(workdir, newest)
    if newest is not None and not layout.is_converted(host):
      old = layout.read_config(workdir)
    changes.check_workdir(
      workdir, config, None if newest is None else host, say
    )
    if newest is not None and layout.is_converted(host):
      for name in ("init_from", "branch_from"):
        if getattr(config.train, name) is not None:
          raise ValueError(
            f"{workdir} holds a converted model already; leave out "
            f"train.{name} to train it, or name another --workdir."
          )
    begins_with = None
    if newest is None and config.train.init_from is not None:
      begins_with = origin.find(workdir, config, splitter, tokenizer)
    if branched is not None:
      host = branched.host
    corpus, heldout = open_corpora(
      config.data,
      splitter,
      config.model.capacities,
      cache_dir=cache,
      log=say,
      begun_with=host.get("data_fingerprint"),
      begun_with_heldout=host.get("heldout_fingerprint"),
      how=who_builds(config, Path(cache), jax.process_count()),
    )
    share_index, share_count = sharding.batch_share(mesh)
    loader = make_loader(
      corpus,
      seed=config.seed,
      batch_size=config.train.batch_size,
      share_index=share_index,
      share_count=share_count,
      num_workers=config.data.num_workers,
    )
    if host:
      made_by = workdir if branched is None else branched.workdir
      check_identity(host, config, made_by, splitter, tokenizer, corpus)

  model, chosen = kernels.resolve(
    config.model, mesh, kept=host.get("attention"), say=say
  )
  say(attention.describe(model.stages, sharding.platform(mesh)))
  saver = checkpoints.Checkpointer(workdir, config.checkpoint)
  source = begins_with if branched is None else branched.origin
  read = None
  if newest is not None:
    read = functools.partial(saver.restore, newest)
  elif source is not None:
    read = functools.partial(origin.read, source)
  restored = restore(config, tx, mesh, read, host)
  if source is not None:
    params_hash = origin.params_hash(restored.train_state.params)
    rest = "is new" if branched is None else "goes on from there, too"
    say(
      f"parameters of {source.workdir}, checkpoint {source.step} (hash "
      f"{params_hash}); the rest {rest}"
    )
  step = int(restored.train_state.step)
  with together.all_or_none():
    updates = step - int(restored.train_state.nonfinite_total)
    changes.check_rate(old, config, updates, accept_learning_rate, say)
    if restored.loader is not None:
      loader.set_state(restored.loader)
      say(f"continuing from checkpoint {step}")
    interval = metrics.Interval(restored.interval)
    if is_main:
      layout.write_config(workdir, config)
      if begins_with is not None:
        origin.keep(workdir, begins_with, params_hash)
      if branched is not None:
        branch.keep(workdir, branched, params_hash)
      tables.keep(workdir, config.model.rules)
      if tokenizer is not None:
        content = Path(tokenizer.path).read_bytes()
        buckets.write_whole(workdir / layout.TOKENIZER_FILE, content)
    log = metrics.Log(workdir, config, step, is_main)
  if branched is not None:  # from here on the source is not needed
    saver.save(step, restored.train_state.items(), host)
    saver.wait()
  config = dataclasses.replace(config, model=model)
  return Setup(
    config=config,
    workdir=workdir,
    mesh=mesh,
    tx=tx,
    train_state=restored.train_state,
    shardings=state.abstract_state(config.model, tx, mesh)[1],
    loader=loader,
    heldout=heldout,
    evaluator=Evaluator(config, heldout, mesh),
    saver=saver,
    log=log,
    watch=watch,
    history=History(workdir, step, is_main),
    interval=interval,
    identity={
      "splitter_hash": splitter.hash,
      "data_fingerprint": corpus.fingerprint,
      "heldout_fingerprint": heldout and heldout.fingerprint,
      "tokenizer_hash": None if tokenizer is None else tokenizer.hash,
    }
    | ({} if chosen is None else {"attention": chosen}),
  )
