"""The training loop: from the first step to the last, or to a signal."""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax

from aunet_jax.aunet import counts, devices, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.data import loader
from aunet_jax.evaluate import bits_per_byte
from aunet_jax.train.setup import Setup
from aunet_jax.train.state import TrainState
from aunet_jax.train.step import compile_step
from aunet_jax.workdir import layout


class Recorder:
  """Records steps first to last, and nothing without any."""

  def __init__(self, steps: tuple[int, int] | None, workdir: Path):
    self._steps, self._folder = steps, workdir / "profile"
    self._running = False

  def before(self, step: int) -> None:
    if self._steps is not None and not self._running:
      if self._steps[0] <= step <= self._steps[1]:
        jax.profiler.start_trace(str(self._folder))
        self._running = True

  def after(self, step: int, device_metrics: dict, say: Callable) -> None:
    if self._running and step >= self._steps[1]:
      jax.block_until_ready(device_metrics)
      self.close()
      say(f"profile of steps up to {step}: {self._folder}")

  def close(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running, self._steps = False, None


def parse_steps(text: str | None) -> tuple[int, int] | None:
  """ "20:25" as (20, 25).

  Raises: ValueError where it is nothing like that.
  """
  if text is None:
    return None
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
    raise ValueError(
      f"--profile={text} must be FIRST:LAST, two steps, for example 20:25."
    )
  return int(first), int(last)


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
  batches = loader.evaluation_batches(
    setup.heldout,
    batch_size=setup.config.train.batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    max_bytes=setup.config.train.eval_bytes,
  )
  return bits_per_byte.evaluate_batches(eval_step, params, batches, setup.mesh)


def roll_back(setup: Setup, error: NotFiniteError, step: int) -> TrainState:
  """The newest state saved before the loss stopped being finite.

  The data go on from where they are, so that the run does not meet what broke
  it again: the rows since that checkpoint are given up, and it is said.

  Args: step: the last one that ran.
  Raises: NotFiniteError where there is no such checkpoint.
  """
  target = setup.saver.newest_before(error.first)
  if target is None or layout.is_converted(setup.workdir, target):
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
  batch = sharding.to_device(next(setup.loader), setup.mesh)
  began = time.perf_counter()
  step_fn = compile_step(
    config, setup.tx, setup.mesh, setup.shardings, train_state, batch
  )
  log.say(f"compiled the step in {time.perf_counter() - began:.1f} s")
  eval_step = jax.jit(
    bits_per_byte.make_eval_step(AUNet(config.model)),
    out_shardings=sharding.replicated(setup.mesh),
  )
  peak_flops = devices.peak_flops(jax.devices()[0])

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
        batch = sharding.to_device(next(setup.loader), setup.mesh)
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
          batch = sharding.to_device(next(setup.loader), setup.mesh)
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
