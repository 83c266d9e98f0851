"""Everything before the first step: config, data, checkpoint, log."""

import contextlib
import fcntl
import os
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from aunet_jax import (
  attention,
  checkpoint,
  data,
  metrics,
  optimizer,
  sharding,
  state,
)
from aunet_jax.config import Config
from aunet_jax.splitting import Splitter
from aunet_jax.state import TrainState
from aunet_jax.tokenizer import Tokenizer

EXIT_FAILED = 1  # the run failed; the same command may be tried again


def join_cluster(
  multihost: bool,
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout_seconds: int,
  heartbeat_seconds: int,
) -> None:
  """Connects the processes of a run; does nothing for a run of one.

  Args:
    multihost: find the others as the platform says (TPU, GKE, SLURM).
    coordinator: HOST:PORT of process 0, where the platform does not say.
    num_processes: with `coordinator`, how many there are; with `multihost`,
      how many there must be.
    timeout_seconds: how long to wait for the others; then the process ends
      with EXIT_FAILED.
    heartbeat_seconds: how long a process may be silent, later on, before the
      runtime ends all the others (with its own message and SIGABRT).
  Raises: ValueError where the flags contradict each other, ConnectionError
    where processes are missing.
  """
  if coordinator is not None:
    if multihost or num_processes is None or process_id is None:
      raise ValueError(
        "--coordinator needs --num_processes and --process_id, and no "
        "--multihost."
      )
  elif process_id is not None or (num_processes is not None and not multihost):
    raise ValueError(
      "--num_processes and --process_id need --coordinator=HOST:PORT (or "
      "--multihost, which finds the processes by itself)."
    )
  elif not multihost:
    return

  def give_up():
    print(
      f"error: the processes of this run did not all connect within "
      f"{timeout_seconds} s. Start the same command on every host; "
      f"--start_timeout waits longer.",
      file=sys.stderr,
      flush=True,
    )
    os._exit(EXIT_FAILED)

  # The runtime ends the process with a stack dump at its own time-out, and no
  # exception to catch; this speaks first.
  watch = threading.Timer(timeout_seconds, give_up)
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
      coordinator_address=coordinator,
      num_processes=num_processes if coordinator else None,
      process_id=process_id,
      initialization_timeout=timeout_seconds + 60,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ConnectionError(f"cannot join the run: {reason}") from error
  finally:
    watch.cancel()
  if num_processes is not None and jax.process_count() != num_processes:
    raise ConnectionError(
      f"--num_processes={num_processes} but {jax.process_count()} processes "
      f"are connected; start the missing ones, or change the flag."
    )


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


def check_workdir(workdir: Path, config: Config, step: int | None, say) -> None:
  """Refuses a workdir that another config made, once it has a checkpoint.

  A converted model has no training to continue: there only `model` must agree.

  Args: step: of the checkpoint to go on from; None where there is none.
  Raises: ValueError naming every field that differs.
  """
  if not (workdir / checkpoint.CONFIG_FILE).exists():
    return
  old = checkpoint.read_config(workdir)
  forbidden, allowed = checkpoint.changed_fields(old, config)
  if step is None:
    allowed, forbidden = forbidden + allowed, []
  elif checkpoint.is_converted(workdir, step):
    allowed += [line for line in forbidden if not line.startswith("model.")]
    forbidden = [line for line in forbidden if line.startswith("model.")]
  if forbidden:
    raise ValueError(
      f"{workdir} holds a run with another config; use another --workdir, or "
      "undo these changes:\n  " + "\n  ".join(forbidden)
    )
  for line in allowed:
    say(f"changed since the last start: {line}")


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


def keep_compiled_programs() -> None:
  """Keeps compiled programs on disk: a restart need not compile again.

  On accelerators, where compiling takes minutes. JAX_COMPILATION_CACHE_DIR
  names another directory, or none where it is empty.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  if jax.default_backend() == "cpu":
    return
  cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  jax.config.update(
    "jax_compilation_cache_dir", str(cache / "aunet_jax" / "compiled")
  )


class Setup(NamedTuple):
  """A run ready for its next step."""

  config: Config
  workdir: Path
  mesh: jax.sharding.Mesh
  tx: optax.GradientTransformation
  train_state: TrainState
  shardings: TrainState
  loader: data.Loader
  heldout: data.Corpus | None
  saver: checkpoint.Checkpointer
  log: metrics.Log
  interval: metrics.Interval
  identity: dict  # hashes stored in every checkpoint


def prepare(config: Config, workdir: Path) -> Setup:
  """Opens data and workdir, and restores what is there.

  Order of a resume: 1. the newest whole checkpoint is chosen; 2. the config is
  compared with the workdir's; 3. the data opens; 4. the checkpoint is restored;
  5. its splitting tables, tokenizer and data are compared; 6. the data iterator
  is set; 7. config.json is written; 8. the log loses its rows past the restored
  step.

  Raises: ValueError, CheckpointError.
  """
  is_main = jax.process_index() == 0

  def say(line):
    if is_main:
      print(line, flush=True)

  keep_compiled_programs()
  mesh = sharding.make_mesh(config.mesh)
  check_batch(config, mesh)
  say(attention.describe(config.model.stages, sharding.platform(mesh)))
  tx = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
  splitter = Splitter(config.model.rules)
  tokenizer = open_tokenizer(config)
  newest = checkpoint.choose(workdir, say)
  check_workdir(workdir, config, newest, say)

  cache = config.data.cache_dir
  corpus, heldout = data.open_corpora(
    config.data,
    splitter,
    config.model.capacities,
    cache_dir=workdir / "data" if cache is None else Path(cache),
    log=say,
  )
  loader = data.make_loader(
    corpus,
    seed=config.seed,
    batch_size=config.train.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_workers=config.data.num_workers,
  )

  saver = checkpoint.Checkpointer(workdir, config.checkpoint.keep)
  abstract, shardings = state.abstract_state(config.model, tx, mesh)
  identity = {
    "splitter_hash": splitter.hash,
    "data_fingerprint": corpus.fingerprint,
    "tokenizer_hash": None if tokenizer is None else tokenizer.hash,
  }
  if newest is None:
    train_state = state.create_state(config.model, tx, mesh, config.seed)
    saved = {}
  else:
    train_state, host = saver.restore(newest, abstract, shardings)
    checkpoint.check_splitter(host, splitter)
    if train_state.opt_state is not None:
      checkpoint.check_tokenizer(host, tokenizer)
    if train_state.opt_state is None:  # a converted model: training is new
      train_state = state.with_params(
        train_state.params, config.model, tx, mesh
      )
      saved = {}
    else:
      saved = host
      if saved["data_fingerprint"] != corpus.fingerprint:
        raise ValueError(
          f"the data under data.train={config.data.train!r} is not what "
          f"{workdir} was trained on (fingerprint {corpus.fingerprint}, the "
          f"checkpoint has {saved['data_fingerprint']}): files were added, "
          f"removed or edited. Restore them or use another --workdir."
        )
      loader.set_state(saved["loader"])
      say(f"continuing from checkpoint {int(train_state.step)}")
  if is_main:
    checkpoint.write_config(workdir, config)
    if tokenizer is not None:
      content = Path(tokenizer.path).read_bytes()
      (workdir / checkpoint.TOKENIZER_FILE).write_bytes(content)
  log = metrics.Log(workdir, config, int(train_state.step), is_main)
  return Setup(
    config=config,
    workdir=workdir,
    mesh=mesh,
    tx=tx,
    train_state=train_state,
    shardings=shardings,
    loader=loader,
    heldout=heldout,
    saver=saver,
    log=log,
    interval=metrics.Interval(saved.get("interval")),
    identity=identity,
  )
