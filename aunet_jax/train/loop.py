"""The training loop: from the first step to the last, or to a signal.

`run` is the loop; the functions before it are what it does at some steps.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Sequence

import jax

from aunet_jax.aunet import counts, devices, sharding
from aunet_jax.terminal import Failure
from aunet_jax.train import replicas
from aunet_jax.train.profile import Recorder
from aunet_jax.train.setup import Setup
from aunet_jax.train.state import TrainState
from aunet_jax.train.step import compile_step
from aunet_jax.train.stop import Stop, Votes
from aunet_jax.train.watchdog import Watchdog
from aunet_jax.workdir import buckets, layout, together


class TrainingError(Failure):
  """The run cannot go on; the message says at which step and why."""


class NotFiniteError(TrainingError):
  """Too many steps in a row were skipped, from step `first` on."""

  def __init__(self, first: int, message: str):
    super().__init__(message)
    self.first = first


class Arrivals:
  """Metrics of the steps in their order, read one step late.

  The metrics of a step are read from the devices while the next step runs,
  so that the devices never wait for this process.
  """

  def __init__(self, read: Callable[[int, dict], dict]):
    self._read, self._pending = read, None

  def push(self, step: int, device_metrics: dict) -> None:
    """Takes those of a step that has just begun; reads those before."""
    before, self._pending = self._pending, (step, device_metrics)
    if before is not None:
      self._read(*before)

  def settle(self) -> dict:
    """Waits for the newest step; returns its metrics."""
    newest, self._pending = self._pending, None
    return self._read(*newest)

  def forget(self) -> None:
    self._pending = None


# ----- what the loop does ---------------------------------------------------


def absorb(setup: Setup, step: int, device_metrics: dict) -> dict:
  """Reads the metrics of a step and adds them up.

  Raises: NotFiniteError where too many steps in a row were skipped.
  """
  config = setup.config
  step_metrics = jax.device_get(device_metrics)
  setup.interval.add(step_metrics)
  setup.watch.step(int(step_metrics["bytes"]))
  spike = setup.interval.spike(step, step_metrics, config.train.spike_sigmas)
  if spike is not None:
    setup.log.say(
      f"step {step}: {spike['spike_bits_per_byte']:.3f} bits/byte, usual is "
      f"{spike['usual_bits_per_byte']:.3f}"
    )
    setup.log.row(spike)
  in_row = int(step_metrics["nonfinite_in_row"])
  if in_row >= config.train.max_nonfinite_steps:
    raise NotFiniteError(
      step - in_row + 1,
      f"loss or gradient was not finite in the last {in_row} steps, up to "
      f"step {step}; those steps changed nothing. Lower "
      f"optimizer.learning_rate={config.optimizer.learning_rate:g}, look "
      f"at the data, or let the run go back with train.max_roll_backs; the "
      f"newest checkpoint is {setup.saver.latest_step()}.",
    )
  return step_metrics


def log(setup: Setup, step: int, step_metrics: dict) -> None:
  """Writes the row of the steps since the last one, and the progress line."""
  config, interval = setup.config, setup.interval
  lap = setup.watch.lap()
  # Steps and the wait for their data; evaluations and saves are no speed.
  waiting = lap.seconds.get("data", 0.0)
  seconds = lap.seconds.get("step", 0.0) + waiting
  row = interval.row(config, step, step_metrics)
  useful = counts.useful_train_flops(config.model, interval.positions)
  useful *= lap.steps / interval.steps
  peak_flops = devices.peak_flops(jax.devices()[0])
  row["bytes_per_second"] = lap.num_bytes / seconds
  shares = together.gather(waiting / seconds)  # the others wait for the worst
  row["data_wait_share"] = max(shares)
  if len(shares) > 1:
    row["data_wait_process"] = shares.index(max(shares))
  row["useful_mfu"] = (
    useful / (seconds * peak_flops * jax.device_count()) if peak_flops else None
  )
  row |= setup.history.note(step, setup.watch.seconds)
  left = config.train.num_steps - step
  setup.log.progress(row, left * seconds / lap.steps)
  setup.log.row(row)
  interval.reset()


def compile_for(setup: Setup, batch) -> Callable:
  """The step, compiled for the shapes of that batch.

  Every process must have it before any begins: the first exchange between
  processes waits for half a minute only on CPUs.
  """
  began = time.perf_counter()
  with setup.watch.within("compile"), together.all_or_none():
    step_fn = compile_step(
      setup.config, setup.tx, setup.mesh, setup.shardings, setup.train_state,
      batch,
    )  # fmt: skip
  setup.log.say(f"compiled the step in {time.perf_counter() - began:.1f} s")
  return step_fn


def evaluate(
  setup: Setup, step: int, params, go_on: Callable[[], bool]
) -> bool:
  """Evaluates held-out text; False where it was told to stop before the end.

  The next start then makes up for it.
  """
  with setup.watch.within("evaluate"):
    result = setup.evaluator.evaluate(params, go_on)
  if result is None:
    setup.log.say(
      f"step {step}: the evaluation stops; the next start repeats it"
    )
    return False
  setup.log.say(
    f"step {step}: held-out {result['bits_per_byte']:.4f} bits/byte over "
    f"{result['bytes']:,} bytes"
  )
  setup.log.row(
    {
      "step": step,
      "bytes_seen": setup.interval.bytes_seen,
      "heldout_loss_nats": result["loss_nats"],
      "heldout_bits_per_byte": result["bits_per_byte"],
      "heldout_bytes": result["bytes"],
    }
  )
  return True


def is_evaluated(setup: Setup, step: int) -> bool:
  """Whether the log has that step's evaluation; the same on all processes."""
  with together.all_or_none():
    rows = layout.read_rows(setup.workdir / layout.METRICS_FILE)
  found = [r for r in rows if r["step"] == step and "heldout_loss_nats" in r]
  return bool(together.broadcast(len(found)))


def named(devices: Sequence[jax.Device]) -> str:
  """ "devices 3, 4 of process 1; device 8 of process 2"."""
  of_process = collections.defaultdict(list)
  for device in devices:
    of_process[device.process_index].append(str(device.id))
  return "; ".join(
    f"device{'s' * (len(ids) > 1)} {', '.join(ids)} of process {process}"
    for process, ids in sorted(of_process.items())
  )


def put_log(setup: Setup) -> None:
  """Has the workdir hold all that was logged. Every process must call this.

  Raises: SaveError.
  """
  with together.all_or_none():
    try:
      setup.log.put()
    except buckets.BucketError as error:
      raise layout.SaveError(
        f"{error}; when that is repaired, run the same command again to "
        f"continue from checkpoint {setup.saver.latest_step()}."
      ) from error


def save(setup: Setup, step: int, train_state: TrainState, position) -> None:
  """Saves what every device agrees on.

  Args: position: of the data, after the batch of this step.
  Raises: TrainingError where a device holds other parameters than its replicas.
  """
  host = {
    **setup.identity, "loader": position, "interval": setup.interval.to_json()
  }  # fmt: skip
  with setup.watch.within("save"):
    put_log(setup)  # a resume has the rows up to its step
    differing = replicas.differing(train_state.params, setup.mesh)
    if differing:
      raise TrainingError(
        f"step {step}: the parameters on {named(differing)} are not those of "
        f"their replicas, so that hardware computes other numbers. Nothing of "
        f"this step is saved; take it out of the run and start again from "
        f"checkpoint {setup.saver.latest_step()}."
      )
    setup.saver.save(step, train_state.items(), host)
  for line in setup.saver.complaints():
    setup.log.say(line)


def roll_back(setup: Setup, error: NotFiniteError, step: int) -> TrainState:
  """The newest state saved before the loss stopped being finite.

  The data go on from where they are, so that the run does not meet what broke
  it again: the rows since that checkpoint are given up, and that is logged.

  Args: step: the last one that ran.
  Raises: NotFiniteError where there is no such checkpoint.
  """
  target = setup.saver.newest_before(error.first)
  if target is None:
    raise error
  host = layout.read_host(setup.workdir, target)
  if layout.is_converted(host):
    raise error
  setup.saver.drop_after(target)
  abstract = jax.eval_shape(lambda s: s, setup.train_state)
  targets = sharding.placed(abstract, setup.shardings).items()
  train_state = TrainState.from_items(setup.saver.restore(target, targets))
  setup.interval.restore(host["interval"])
  with together.all_or_none():
    setup.log.rewind(target)
  given_up = step - target
  setup.log.say(
    f"step {step}: not finite since step {error.first}; back to checkpoint "
    f"{target}, past the data of the {given_up} steps since"
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


# ----- the loop -------------------------------------------------------------


def run(
  setup: Setup, stop: Stop, profile: tuple[int, int] | None = None
) -> str | None:
  """Trains to the last step, or until a signal.

  Args: profile: first and last step to record into WORKDIR/profile.
  Returns: None at the end; else what stopped it, with everything saved.
  Raises: TrainingError, CheckpointError.
  """
  config, saver, watch = setup.config, setup.saver, setup.watch
  stop.begin()
  votes = Votes(setup.mesh, 4)
  recorder = Recorder(profile, setup.workdir)
  hang = (config.train.hang_seconds, config.train.hang_factor)
  with (
    Watchdog(*hang) as watchdog,
    watch.within("step"),
    contextlib.closing(recorder),
  ):

    def ask() -> tuple[bool, bool, bool]:
      """Whether to stop, save and record now, as all processes agree.

      Raises: what kept a process from writing its part of a save.
      """
      *wanted, failed = votes.turn(
        bool(stop.requested), saver.late(), recorder.wanted(), saver.failed()
      )
      if failed:
        saver.raise_failure()
      return tuple(map(bool, wanted))

    def evaluate_at(step, params) -> bool:
      def go_on():
        watchdog.alive(f"the evaluation of step {step}")
        return not ask()[0]

      return evaluate(setup, step, params, go_on)

    step, last = int(setup.train_state.step), config.train.num_steps
    stopping = False
    if step and setup.evaluator.due(step) and not is_evaluated(setup, step):
      stopping = not evaluate_at(step, setup.train_state.model_params)
    if step < last and not stopping:
      stopping = take_steps(setup, watchdog, ask, evaluate_at, recorder)
    watchdog.alive("the last save")
    saver.wait()
    for line in saver.complaints():
      setup.log.say(line)
    put_log(setup)
  setup.history.note(None, watch.seconds)
  return (stop.requested or "a signal to another process") if stopping else None


def take_steps(
  setup: Setup,
  watchdog: Watchdog,
  ask: Callable[[], tuple[bool, bool, bool]],
  evaluate_at: Callable[[int, dict], bool],
  recorder: Recorder,
) -> bool:
  """Trains to the last step; True where it was told to stop before the end."""
  config, watch, train_state = setup.config, setup.watch, setup.train_state
  step, last = int(train_state.step), config.train.num_steps

  def fetch():
    with watch.within("data"):
      return sharding.to_device(next(setup.loader), setup.mesh)

  batch = fetch()
  sharding.check_replicas(batch)
  step_fn = compile_for(setup, batch)
  watchdog.alive(f"step {step + 1}")
  arrivals = Arrivals(lambda *arrived: absorb(setup, *arrived))
  roll_backs, stopping = 0, False
  watch.lap()
  while step < last and not stopping:
    step += 1
    recorder.before(step, step_fn.as_text)
    train_state, device_metrics = step_fn(train_state, batch)
    position = setup.loader.get_state()  # before the batch after this
    batch = fetch() if step < last else None
    recorder.after(step, device_metrics, setup.log.say)

    stopping, late, record = ask()
    if record:
      recorder.record_next(step)
    logs = step == last or step % config.train.log_every_steps == 0
    saves = step == last or stopping or late or setup.saver.due(step)
    evaluates = setup.evaluator.due(step)
    try:
      arrivals.push(step, device_metrics)
      watchdog.step(step)
      if not (logs or saves or evaluates):
        continue
      step_metrics = arrivals.settle()
    except NotFiniteError as error:
      if roll_backs == config.train.max_roll_backs:
        raise
      roll_backs += 1
      train_state = roll_back(setup, error, step)
      batch = fetch() if batch is None else batch
      step, stopping = int(train_state.step), False
      arrivals.forget()
      watch.lap()
      continue

    if logs:
      log(setup, step, step_metrics)
    if saves:
      save(setup, step, train_state, position)
    # After the save: an evaluation that is killed costs no steps, and the next
    # start repeats it.
    if evaluates and not stopping:
      stopping = not evaluate_at(step, train_state.model_params)
      if stopping and not saves:
        save(setup, step, train_state, position)
    elif step == last and stopping and not evaluates:
      stopping = False  # nothing is left to do
    if saves or evaluates:
      watchdog.alive(f"step {step + 1}")
  return stopping
