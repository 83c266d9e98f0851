"""Everything before the first step: config, data, checkpoint, log."""

from pathlib import Path
from typing import NamedTuple

import jax
import optax

from aunet_jax import files
from aunet_jax.aunet import attention, sharding
from aunet_jax.config import Config
from aunet_jax.data.corpora import Corpus, open_corpora
from aunet_jax.data.loader import Loader, make_loader
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import metrics, optimizer, state
from aunet_jax.train.cluster import keep_compiled_programs
from aunet_jax.train.evaluator import Evaluator
from aunet_jax.train.state import TrainState
from aunet_jax.train.stopwatch import History, Stopwatch
from aunet_jax.workdir import (
  checkpoints,
  layout,
  load,
  origin,
  tables,
  together,
)

# Settings that do not change what is learned from which bytes. Everything
# else must equal the workdir's own config when a run continues.
FREE_FIELDS = (
  "mesh.",
  "checkpoint.",
  "data.cache_dir",
  "data.num_workers",
  "data.tokenizer",  # its content is compared, wherever the file is
  "data.max_skip_fraction",
  "train.log_every_steps",
  "train.eval_every_steps",
  "train.eval_bytes",
  "train.sample_",
  "train.tensorboard",
  "train.grad_accumulation",
  "train.max_nonfinite_steps",
  "train.max_roll_backs",
  "train.spike_sigmas",
  "train.hang_",
  "model.unroll_layers",
)
FREE_STAGE_FIELDS = ("remat", "attention")


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


def check_workdir(
  workdir: Path, config: Config, host: dict | None, say
) -> None:
  """Refuses a workdir that another config made, once it has a checkpoint.

  A converted model has no training to continue: there only `model` must agree.

  Args: host: of the checkpoint to go on from; None where there is none.
  Raises: ValueError naming every field that differs.
  """
  if not (workdir / layout.CONFIG_FILE).exists():
    return
  old = layout.read_config(workdir)
  forbidden, allowed = changed_fields(old, config)
  if host is None:
    allowed, forbidden = forbidden + allowed, []
  elif layout.is_converted(host):
    allowed += [line for line in forbidden if not line.startswith("model.")]
    forbidden = [line for line in forbidden if line.startswith("model.")]
  if forbidden:
    raise ValueError(
      f"{workdir} holds a run with another config; use another --workdir, or "
      "undo these changes:\n  " + "\n  ".join(forbidden)
    )
  for line in allowed:
    say(f"changed since the last start: {line}")


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


class Setup(NamedTuple):
  """A run ready for its next step."""

  config: Config
  workdir: Path
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
  identity: dict  # hashes stored in every checkpoint


class Restored(NamedTuple):
  """Where a run begins."""

  train_state: TrainState
  loader: dict | None  # position in the data; None = at its beginning
  interval: dict | None  # sums of the rows not yet logged; None = nothing


def restore(
  config: Config,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  saver: checkpoints.Checkpointer,
  step: int | None,
  host: dict,
  begins_with: origin.Origin | None = None,
) -> Restored:
  """The state of a checkpoint, or a new one.

  Args:
    step, host: the checkpoint's; None and {} where there is none.
    begins_with: the model that a new state takes; None = a random one.
  Raises: CheckpointError where it cannot be read.
  """
  if step is None and begins_with is None:
    fresh = state.create_state(config.model, tx, mesh, config.seed)
    return Restored(fresh, None, None)
  abstract, shardings = state.abstract_state(config.model, tx, mesh)
  targets = sharding.placed(abstract, shardings).items()
  if step is None:
    params = origin.read_params(begins_with, targets["params"])
    fresh = state.with_params(params, config.model, tx, mesh)
    return Restored(fresh, None, None)
  if layout.is_converted(host):  # a model alone: its training is new
    params = saver.restore(step, {"params": targets["params"]})["params"]
    fresh = state.with_params(params, config.model, tx, mesh)
    return Restored(fresh, None, None)
  restored = TrainState.from_items(saver.restore(step, targets))
  return Restored(restored, host["loader"], host.get("interval"))


def check_identity(
  host: dict, config: Config, workdir: Path, splitter, tokenizer, corpus
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


JUMP = 1.5  # of the learning rate, that a resume must be told to accept


def check_rate(
  old: Config, config: Config, count: int, accepted: bool, say
) -> None:
  """Compares the learning rates that a run and its continuation give a step.

  A schedule that ends with the run is another one for more steps.

  Args: count: updates made so far. accepted: whether a jump is wanted.
  Raises: ValueError where it jumps and that was not accepted.
  """
  before, after = (
    float(
      optimizer.learning_rate_schedule(c.optimizer, c.train.num_steps)(count)
    )
    for c in (old, config)
  )
  if before == after:
    return
  steps = f"train.num_steps {old.train.num_steps} -> {config.train.num_steps}"
  rates = f"{before:.3g} -> {after:.3g}"
  if max(before, after) <= JUMP * min(before, after) or accepted:
    say(f"learning rate of the next step, with {steps}: {rates}")
    return
  raise ValueError(
    f"{steps} makes the learning rate of the next step jump, {rates} "
    f"({after / before if before else float('inf'):.1f} times), since "
    f"optimizer.schedule={config.optimizer.schedule!r} ends with the run. Add "
    f"--accept_learning_rate to go on like that, or train in a new workdir "
    f"with schedule='wsd' or 'constant', which can be continued."
  )


def set_up(
  config: Config, workdir: Path, accept_learning_rate: bool = False
) -> Setup:
  """Opens data and workdir, and restores what is there.

  Order of a resume: 1. the newest undamaged checkpoint is chosen; 2. the config
  is compared with the workdir's; 3. the data opens; 4. the checkpoint's
  splitting tables, tokenizer and data are compared; 5. it is restored (of a run
  without a checkpoint, `train.init_from` or random parameters); 6. the
  data iterator is set; 7. config.json is written; 8. the log loses its rows
  past the restored step.

  Where a process of several fails, all do.

  Args: accept_learning_rate: see `check_rate`.
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
    say(attention.describe(config.model.stages, sharding.platform(mesh)))
    tx = optimizer.make_optimizer(config)
    splitter = Splitter(config.model.rules, config.has_roles)
    tokenizer = open_tokenizer(config)
  newest = checkpoints.choose(workdir, say)

  with together.all_or_none():
    old = config
    host = {} if newest is None else layout.read_host(workdir, newest)
    if newest is not None and not layout.is_converted(host):
      old = layout.read_config(workdir)
    check_workdir(workdir, config, None if newest is None else host, say)
    begins_with = None
    if config.train.init_from is not None and layout.is_converted(host):
      if newest is not None:
        raise ValueError(
          f"{workdir} holds a converted model already; leave out "
          f"train.init_from to train it, or name another --workdir."
        )
      begins_with = origin.find(workdir, config, splitter, tokenizer)
    cache = config.data.cache_dir
    corpus, heldout = open_corpora(
      config.data,
      splitter,
      config.model.capacities,
      cache_dir=workdir / "data" if cache is None else cache,
      log=say,
      begun_with=host.get("data_fingerprint"),
      begun_with_heldout=host.get("heldout_fingerprint"),
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
    if newest is not None:
      check_identity(host, config, workdir, splitter, tokenizer, corpus)

  saver = checkpoints.Checkpointer(workdir, config.checkpoint)
  restored = restore(config, tx, mesh, saver, newest, host, begins_with)
  if begins_with is not None:
    params_hash = origin.params_hash(restored.train_state.params)
    say(
      f"parameters of {begins_with.workdir}, checkpoint {begins_with.step} "
      f"(hash {params_hash}); the rest is new"
    )
  step = int(restored.train_state.step)
  with together.all_or_none():
    updates = step - int(restored.train_state.nonfinite_total)
    check_rate(old, config, updates, accept_learning_rate, say)
    if restored.loader is not None:
      loader.set_state(restored.loader)
      say(f"continuing from checkpoint {step}")
    interval = metrics.Interval(restored.interval)
    if is_main:
      layout.write_config(workdir, config)
      if begins_with is not None:
        origin.keep(workdir, begins_with, params_hash)
      tables.keep(workdir, config.model.rules)
      if tokenizer is not None:
        content = Path(tokenizer.path).read_bytes()
        files.write_whole(workdir / layout.TOKENIZER_FILE, content)
    log = metrics.Log(workdir, config, step, is_main)
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
    },
  )


# ----- config.json ----------------------------------------------------------


def changed_fields(old: Config, new: Config) -> tuple[list[str], list[str]]:
  """Differences that forbid continuing a run, and those that are allowed.

  Returns: two lists of lines such as "seed: 0 -> 1".
  """
  before, after = map(layout.flat_fields, (old, new))
  forbidden, allowed = [], []
  for field in sorted(before.keys() | after.keys()):
    a, b = before.get(field), after.get(field)
    if a == b:
      continue
    line = f"{field}: {a!r} -> {b!r}"
    # The content of a rule's table is compared, wherever the file is.
    moved = field.endswith(".rule") and tables.same_kind(a, b)
    longer = field == "train.num_steps" and b > a
    free = field.startswith(FREE_FIELDS) or (
      field.startswith("model.stages[")
      and field.endswith(tuple(f".{name}" for name in FREE_STAGE_FIELDS))
    )
    (allowed if free or longer or moved else forbidden).append(line)
  return forbidden, allowed
