"""Train an AU-Net, or continue a run that stopped.

  python -m aunet_jax.train --config=configs/quickstart.py --workdir=runs/demo

Run the same command again after any interruption: it continues from the newest
checkpoint, on the same bytes in the same order.
"""

import argparse
import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aunet_jax import (
  checkpoint,
  counts,
  data,
  evaluate,
  loss,
  metrics,
  sharding,
)
from aunet_jax import config as config_lib
from aunet_jax.aunet import AUNet
from aunet_jax.config import Config, ModelConfig
from aunet_jax.generator import Generator
from aunet_jax.profiling import Recorder, parse_steps
from aunet_jax.sampling import Sampling
from aunet_jax.startup import (
  EXIT_FAILED,
  Setup,
  join_cluster,
  lock_workdir,
  prepare,
)
from aunet_jax.state import TrainState

# Exit status after a stop by signal with everything saved (sysexits'
# EX_TEMPFAIL): a launcher may run the same command again.
EXIT_STOPPED = 75
MAX_COMPRESSED_BYTES = 64 << 20  # xz -9 takes about a second per megabyte
HELP = """any setting of the config can be changed on the command line:

  --config.train.num_steps=500          run shorter
  --config.data.train='books/*.txt'     your own text: file, directory or glob
  --config.model.stages[1].dim=256      a wider second stage
  --config.mesh.fsdp=4                  split parameters over four devices

the workdir then holds config.json, checkpoints/, metrics.jsonl, tensorboard/
and loss_curve.png. Exit status: 0 finished, 2 bad input, 1 the run failed,
75 stopped by a signal with everything saved (run the same command again).
"""


# ----- the step -------------------------------------------------------------


def loss_sums(
  model: AUNet, params, batch: dict[str, jax.Array], num_targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """This batch's share of the loss of a step with `num_targets` targets.

  Returns: (objective, (nats, level_nats)): sums over positions of the bytes'
    loss and of the level head's, 0 where there is none; the objective is the
    weighted sum of both, divided by num_targets.
  """
  inputs = (batch["bytes"], batch["levels"], batch["documents"])
  weight = model.config.level_loss_weight
  if weight == 0:
    logits_BLV = model.apply({"params": params}, *inputs)
    level_nats = jnp.float32(0)
  else:
    logits_BLV, level_logits_BLP = model.apply(
      {"params": params}, *inputs, batch["targets"]
    )
    level_BL, known_BL = loss.target_levels(
      batch["levels"], batch["documents"], batch["targets"]
    )
    nats_BL = loss.cross_entropy(level_logits_BLP, level_BL)
    level_nats = (nats_BL * known_BL * batch["weights"]).sum()
  nats_BL = loss.cross_entropy(logits_BLV, batch["targets"])
  nats = (nats_BL * batch["weights"]).sum()
  return (nats + weight * level_nats) / num_targets, (nats, level_nats)


def make_train_step(
  config: Config, tx: optax.GradientTransformation
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """The pure update (state, batch) -> (state, metrics).

  The gradient is that of the mean over all weighted targets of the global
  batch, whatever the number of microbatches. A step whose loss or gradient is
  not finite changes nothing but the counters.
  """
  model = AUNet(config.model)
  num_micro = config.train.grad_accumulation

  def train_step(train_state, batch):
    num_targets, num_bytes = loss.count_targets(batch)
    grad = jax.value_and_grad(loss_sums, argnums=1, has_aux=True)
    divisor = jnp.maximum(num_targets, 1.0)  # a batch of padding alone

    def micro(carry, microbatch):
      (_, sums), grads = grad(model, train_state.params, microbatch, divisor)
      return jax.tree.map(jnp.add, carry, (sums, grads)), None

    if num_micro == 1:
      (_, sums), grads = grad(model, train_state.params, batch, divisor)
    else:
      zeros = jax.tree.map(jnp.zeros_like, train_state.params)
      nothing = (jnp.float32(0), jnp.float32(0))
      (sums, grads), _ = jax.lax.scan(
        micro, (nothing, zeros), _microbatches(batch, num_micro)
      )

    nats, level_nats = sums
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(
      grads, train_state.opt_state, train_state.params
    )
    finite = (
      jnp.isfinite(nats)
      & jnp.isfinite(grad_norm)
      & jnp.isfinite(optax.tree.norm(updates))
    )
    params = optax.apply_updates(train_state.params, updates)

    def keep_finite(new, old):
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = 1 - finite.astype(jnp.int32)
    new_state = TrainState(
      step=train_state.step + 1,
      params=keep_finite(params, train_state.params),
      opt_state=keep_finite(opt_state, train_state.opt_state),
      nonfinite_in_row=(train_state.nonfinite_in_row + 1) * skipped,
      nonfinite_total=train_state.nonfinite_total + skipped,
    )
    step_metrics = {
      "nats": nats,
      "level_nats": level_nats,
      "targets": num_targets,
      "bytes": num_bytes,
      "positions": count_positions(config.model, batch),
      "grad_norm": grad_norm,
      "nonfinite_in_row": new_state.nonfinite_in_row,
      "nonfinite_total": new_state.nonfinite_total,
    }
    return new_state, step_metrics

  return train_step


def _microbatches(batch, num_micro):
  """(B, ...) -> (num_micro, B / num_micro, ...), each spread over devices."""

  def split(x):
    x = x.reshape(x.shape[0] // num_micro, num_micro, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 0)
    names = (None, "batch") + (None,) * (x.ndim - 2)
    return nn.with_logical_constraint(x, names)

  return jax.tree.map(split, batch)


def count_positions(
  config: ModelConfig, batch: dict[str, jax.Array]
) -> jax.Array:
  """Real positions of every stage in the batch, int32 (num_stages,)."""
  real_BL = batch["documents"] > 0
  return jnp.stack(
    [
      (real_BL & (batch["levels"] >= i)).sum(dtype=jnp.int32)
      for i in range(config.num_stages)
    ]
  )


def compile_step(config: Config, tx, mesh, shardings, abstract, batch):
  """Compiles the step ahead of the loop; donates the old state's memory."""
  step = jax.jit(
    make_train_step(config, tx),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    return step.lower(abstract, batch).compile()


# ----- the loop -------------------------------------------------------------


class Stop:
  """Turns SIGTERM and Ctrl-C into a clean stop after the current step."""

  def __init__(self):
    self.requested = None

  def __enter__(self):
    def ask(number, frame):
      self.requested = signal.Signals(number).name
      signal.signal(number, signal.default_int_handler)  # second: at once

    self._old = {
      number: signal.signal(number, ask)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __exit__(self, *exception):
    for number, handler in self._old.items():
      signal.signal(number, handler)


class TrainingError(RuntimeError):
  """The run cannot go on; the message says at which step and why."""


class NotFiniteError(TrainingError):
  """Too many steps in a row were skipped, from step `first` on."""

  def __init__(self, first: int, message: str):
    super().__init__(message)
    self.first = first


def evaluate_heldout(setup: Setup, eval_step: Callable, params) -> dict | None:
  """Corpus totals of the held-out text, or None where there is none."""
  if setup.heldout is None:
    return None
  batches = data.evaluation_batches(
    setup.heldout,
    batch_size=setup.config.train.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    max_bytes=setup.config.train.eval_bytes,
  )
  return evaluate.evaluate_batches(eval_step, params, batches, setup.mesh)


def roll_back(setup: Setup, error: NotFiniteError, step: int) -> TrainState:
  """The newest state saved before the loss stopped being finite.

  The data go on from where they are, so that the run does not meet what broke
  it again: the rows since that checkpoint are given up, and it is said.

  Args: step: the last one that ran.
  Raises: NotFiniteError where there is no such checkpoint.
  """
  target = setup.saver.newest_before(error.first)
  if target is None or checkpoint.is_converted(setup.workdir, target):
    raise error
  setup.saver.drop_after(target)
  abstract = jax.eval_shape(lambda s: s, setup.train_state)
  train_state, saved = setup.saver.restore(target, abstract, setup.shardings)
  setup.interval.restore(saved["interval"])
  setup.log.rewind(target)
  given_up = step - target
  setup.log.say(
    f"step {step}: not finite since step {error.first}; back to "
    f"checkpoint {target}, past the data of {given_up} steps"
  )
  # Of the first step to come: a resume from `target` comes here by itself.
  setup.log.row(
    {
      "step": target + 1,
      "rolled_back_from": step,
      "rows_given_up": given_up * setup.config.train.batch_size,
    }
  )
  return train_state


def run(setup: Setup, profile: tuple[int, int] | None = None) -> str | None:
  """Trains to the last step, or until a signal.

  Args: profile: first and last step to record into WORKDIR/profile.
  Returns: the name of the signal that stopped it, or None at the end.
  Raises: TrainingError, CheckpointError.
  """
  config, log, interval = setup.config, setup.log, setup.interval
  train_state = setup.train_state
  first, last = int(train_state.step) + 1, config.train.num_steps
  if first > last:
    return None

  # ----- compile
  batch = evaluate.to_device(next(setup.loader), setup.mesh)
  began = time.perf_counter()
  step_fn = compile_step(
    config, setup.tx, setup.mesh, setup.shardings, train_state, batch
  )
  log.say(f"compiled the step in {time.perf_counter() - began:.1f} s")
  eval_step = jax.jit(
    evaluate.make_eval_step(AUNet(config.model)),
    out_shardings=sharding.replicated(setup.mesh),
  )
  peak_flops = counts.peak_flops(jax.devices()[0])

  timed = {"bytes": 0, "steps": 0}  # since `since`, unlike the interval's

  def absorb(step, device_metrics):
    host_metrics = jax.device_get(device_metrics)
    interval.add(host_metrics)
    timed["bytes"] += int(host_metrics["bytes"])
    timed["steps"] += 1
    spike = interval.spike(step, host_metrics, config.train.spike_sigmas)
    if spike is not None:
      log.say(
        f"step {step}: {spike['spike_bits_per_byte']:.3f} bits/byte, usual is "
        f"{spike['usual_bits_per_byte']:.3f}"
      )
      log.row(spike)
    in_row = int(host_metrics["nonfinite_in_row"])
    if in_row >= config.train.max_nonfinite_steps:
      raise NotFiniteError(
        step - in_row + 1,
        f"loss or gradient was not finite in the last {in_row} steps, up to "
        f"step {step}; those steps changed nothing. Lower "
        f"optimizer.learning_rate={config.optimizer.learning_rate:g}, look "
        f"at the data, or let the run go back with train.max_roll_backs; the "
        f"newest checkpoint is {setup.saver.latest_step()}.",
      )
    return host_metrics

  # ----- steps
  pending = None  # metrics of the step before: read while this one runs
  since, fetching = time.perf_counter(), 0.0
  step, roll_backs = first - 1, 0
  recorder = Recorder(profile, setup.workdir)
  with Stop() as stop, contextlib.closing(recorder):
    while step < last:
      step += 1
      recorder.before(step)
      train_state, device_metrics = step_fn(train_state, batch)
      loader_state = setup.loader.get_state()  # before the batch after this
      if step < last:
        fetch = time.perf_counter()
        batch = evaluate.to_device(next(setup.loader), setup.mesh)
        fetching += time.perf_counter() - fetch
      recorder.after(step, device_metrics, log.say)
      previous, pending = pending, (step, device_metrics)

      stopping = setup.saver.reached_preemption(step) or stop.requested
      ends = step == last or stopping
      logs = step == last or step % config.train.log_every_steps == 0
      saves = ends or step % config.checkpoint.every_steps == 0
      every = config.train.eval_every_steps
      evaluates = step == last or (every > 0 and step % every == 0)
      try:
        if previous is not None:
          absorb(*previous)
        if not (logs or saves or evaluates):
          continue
        pending = None
        host_metrics = absorb(step, device_metrics)
      except NotFiniteError as error:
        if roll_backs == config.train.max_roll_backs:
          raise
        roll_backs += 1
        train_state = roll_back(setup, error, step)
        if step == last:  # its successor's batch was not made yet
          batch = evaluate.to_device(next(setup.loader), setup.mesh)
        step, pending = int(train_state.step), None
        since, fetching = time.perf_counter(), 0.0
        timed.update(bytes=0, steps=0)
        continue

      if logs:
        seconds = time.perf_counter() - since
        row = interval.row(config, step, host_metrics)
        useful = counts.useful_train_flops(config.model, interval.positions)
        useful *= timed["steps"] / interval.steps
        row["bytes_per_second"] = timed["bytes"] / seconds
        row["data_wait_share"] = fetching / seconds
        row["useful_mfu"] = (
          useful / (seconds * peak_flops * jax.device_count())
          if peak_flops
          else None
        )
        log.progress(row, (last - step) * seconds / timed["steps"])
        log.row(row)
        interval.reset()

      # Evaluated before it is saved: a run killed between the two evaluates
      # again, one killed after both has the row.
      if evaluates:
        result = evaluate_heldout(setup, eval_step, train_state.params)
        if result is not None:
          log.say(
            f"step {step}: held-out {result['bits_per_byte']:.4f} bits/byte "
            f"over {result['bytes']:,} bytes"
          )
          log.row(
            {
              "step": step,
              "bytes_seen": interval.bytes_seen,
              "heldout_loss_nats": result["loss_nats"],
              "heldout_bits_per_byte": result["bits_per_byte"],
              "heldout_bytes": result["bytes"],
            }
          )
      if saves:
        setup.saver.save(
          step,
          train_state,
          {
            **setup.identity,
            "loader": loader_state,
            "interval": interval.to_json(),
          },
        )
      if logs:
        since, fetching = time.perf_counter(), 0.0
        timed.update(bytes=0, steps=0)
      if stopping:
        break
  setup.saver.wait()
  return stop.requested if step < last else None


# ----- after the last step --------------------------------------------------


def summarise(setup: Setup) -> None:
  """Draws the loss curve and prints how the run ended."""
  config, workdir, log = setup.config, setup.workdir, setup.log
  rows = metrics.read_rows(workdir / metrics.METRICS_FILE)
  log.say(f"loss curve: {metrics.draw_loss_curve(workdir)}")
  logged = [row for row in rows if "bytes_per_second" in row]
  if logged:
    middle = statistics.median(row["bytes_per_second"] for row in logged)
    waiting = statistics.median(row["data_wait_share"] for row in logged)
    log.say(
      f"speed: {metrics.si(middle)}B/s of text, {100 * waiting:.2f}% of the "
      f"time spent making batches (medians over logged steps)"
    )
  heldout = [row for row in rows if "heldout_bits_per_byte" in row]
  if heldout:
    log.say(
      f"held-out text: {heldout[-1]['heldout_bits_per_byte']:.3f} bits per "
      f"byte ({heldout[-1]['heldout_bytes']:,} bytes, step "
      f"{heldout[-1]['step']})"
    )
    whole = heldout[-1]["heldout_bytes"] == setup.heldout.num_bytes
    if whole and setup.heldout.num_bytes <= MAX_COMPRESSED_BYTES:
      packed = evaluate.compressor_bits_per_byte(setup.heldout)
      log.say(
        "the same text packed: "
        + ", ".join(f"{name} {bpb:.3f}" for name, bpb in packed.items())
        + " bits per byte"
      )
  if config.train.sample_bytes:
    print_sample(setup)


def print_sample(setup: Setup) -> None:
  """Shows what the model writes; a fixed seed, so runs can be compared."""
  config = setup.config.train
  if jax.process_count() > 1:  # one process cannot read a sharded model alone
    setup.log.say("sample: python -m aunet_jax.generate shows one.")
    return
  if setup.config.data.tokenizer is not None:
    setup.log.say("sample: none; only models of bytes can generate.")
    return
  generator = Generator.from_workdir(setup.workdir)
  prompt = config.sample_prompt.encode()
  room = setup.config.model.capacities[0] - len(prompt) - 1
  (completion,) = generator.generate(
    [prompt],
    max_bytes=min(config.sample_bytes, room),
    settings=Sampling(temperature=0.8, top_p=0.95),
  )
  setup.log.say(
    f"sample (temperature 0.8, top_p 0.95):\n{'-' * 72}\n"
    f"{config.sample_prompt}{completion.text}\n{'-' * 72}"
  )


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.train",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog=HELP,
  )
  parser.add_argument(
    "--workdir", required=True, help="where checkpoints and logs go"
  )
  parser.add_argument(
    "--config", required=True, metavar="FILE", help="a file of configs/"
  )
  parser.add_argument(
    "--profile",
    metavar="FIRST:LAST",
    help="record these steps into WORKDIR/profile, for TensorBoard and xprof",
  )
  hosts = parser.add_argument_group("several hosts or processes")
  hosts.add_argument(
    "--multihost",
    action="store_true",
    help="join the other hosts as TPU VMs, GKE and SLURM describe them",
  )
  hosts.add_argument(
    "--coordinator", metavar="HOST:PORT", help="process 0, named by hand"
  )
  hosts.add_argument(
    "--num_processes", type=int, help="start only with this many processes"
  )
  hosts.add_argument("--process_id", type=int, help="this one, from 0")
  hosts.add_argument(
    "--start_timeout",
    type=int,
    default=300,
    metavar="SECONDS",
    help="how long to wait for the other processes (default 300)",
  )
  hosts.add_argument(
    "--heartbeat_timeout",
    type=int,
    default=100,
    metavar="SECONDS",
    help="how long a process may be silent before the others end (default 100)",
  )
  args, overrides = parser.parse_known_args(argv)
  workdir = Path(args.workdir)
  with contextlib.ExitStack() as open_things:
    try:
      profile = parse_steps(args.profile)
      join_cluster(
        args.multihost,
        args.coordinator,
        args.num_processes,
        args.process_id,
        args.start_timeout,
        args.heartbeat_timeout,
      )
      config = config_lib.parse_flags([f"--config={args.config}", *overrides])
      open_things.enter_context(lock_workdir(workdir))
      setup = prepare(config, workdir)
    except (ValueError, checkpoint.CheckpointError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 2
    except OSError as error:  # a missing process, a full disk: may pass
      print(f"error: {error}", file=sys.stderr)
      return EXIT_FAILED
    open_things.callback(setup.log.close)
    open_things.callback(setup.loader.close)
    return train(setup, profile)


def train(setup: Setup, profile: tuple[int, int] | None = None) -> int:
  """Runs, and says how it ended; returns the exit status."""
  try:
    stopped_by = run(setup, profile)
  except (TrainingError, OSError, checkpoint.CheckpointError) as error:
    print(f"\nerror: {error}", file=sys.stderr)
    if isinstance(error, OSError):
      print(
        "When that is mended, run the same command again to continue from "
        f"checkpoint {setup.saver.latest_step()}.",
        file=sys.stderr,
      )
    with contextlib.suppress(checkpoint.CheckpointError):
      setup.saver.wait()  # a save that began before may still be whole
    return EXIT_FAILED
  except KeyboardInterrupt:  # a second signal: leave at once
    newest = setup.saver.latest_step()
    print(f"\nstopped; the newest checkpoint is {newest}.", file=sys.stderr)
    return 130
  if stopped_by:
    setup.log.say(
      f"stopped by {stopped_by}; everything is saved. Run the same command "
      f"to continue."
    )
    return EXIT_STOPPED
  if jax.process_index() == 0:
    summarise(setup)
  return 0


if __name__ == "__main__":
  checkpoint.say_failed_saves_once()
  sys.exit(main())
