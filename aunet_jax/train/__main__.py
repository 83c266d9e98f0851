"""Train an AU-Net, or continue a run that stopped.

  python -m aunet_jax.train --config=configs/quickstart.py --workdir=runs/demo

Run the same command again after any interruption: it continues from the newest
checkpoint, on the same bytes in the same order.
"""

import signal

if __name__ == "__main__":
  # Kept until `Stop` listens: what is loaded first takes seconds.
  signal.pthread_sigmask(
    signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  )

import argparse
import contextlib
import logging
import os
import statistics
import sys
import threading

from aunet_jax import memory, terminal

if __name__ == "__main__":
  memory.use_huge_pages()

import absl.logging
import jax

from aunet_jax import config as config_lib
from aunet_jax.aunet import devices
from aunet_jax.data import roles
from aunet_jax.evaluate import bits_per_byte
from aunet_jax.generate.generator import Generator
from aunet_jax.generate.sampling import Sampling
from aunet_jax.terminal import EXIT_STOPPED
from aunet_jax.train import metrics
from aunet_jax.train.cluster import join_cluster
from aunet_jax.train.loop import TrainingError, run
from aunet_jax.train.profile import parse_steps
from aunet_jax.train.setup import Setup, set_up
from aunet_jax.train.stop import SIGNALS, Stop
from aunet_jax.workdir import buckets, layout, together
from aunet_jax.workdir.layout import lock_workdir

LEAVE_SECONDS = 5  # for the other processes of a failed run to end, too
MAX_COMPRESSED_BYTES = 64 << 20  # xz -9 takes about a second per megabyte


HELP = """any setting of the config can be changed on the command line:

  --config.train.num_steps=500          run shorter
  --config.data.train='books/*.txt'     your own text: file, directory or glob
  --config.model.stages[1].dim=256      a wider second stage
  --config.mesh.fsdp=4                  split parameters over four devices

a config.json as --config may name code as a splitting rule (MODULE:NAME) only
with --trust_rules; a Python file, and the command line, may name any.

the workdir then holds config.json, checkpoints/, metrics.jsonl, tensorboard/
and loss_curve.png. Exit status: 0 finished, 2 bad input, 1 the run failed,
75 stopped by a signal with everything saved (run the same command again).
"""


# ----- after the last step --------------------------------------------------


def summarise(setup: Setup) -> None:
  """Draws the loss curve and prints how the run ended."""
  config, workdir, log = setup.config, setup.workdir, setup.log
  rows = layout.read_rows(workdir / layout.METRICS_FILE)
  try:
    log.say(f"loss curve: {metrics.draw_loss_curve(workdir)}")
  except OSError as error:  # the run itself is complete
    log.say(f"no loss curve: {error}")
  speeds = layout.column(rows, "bytes_per_second", "data_wait_share")
  if speeds:
    middle, waiting = map(statistics.median, zip(*speeds, strict=True))
    log.say(
      f"speed: {terminal.si(middle)}B/s of text, {100 * waiting:.2f}% of the "
      f"time spent making batches (medians over logged steps)"
    )
  log.say(setup.history.summary())
  heldout = layout.column(
    rows, "heldout_bits_per_byte", "heldout_bytes", "step"
  )
  if heldout and setup.heldout is not None:
    bits, num_bytes, step = heldout[-1]
    log.say(
      f"held-out text: {bits:.3f} bits per byte ({num_bytes:,} bytes, step "
      f"{step})"
    )
    complete = num_bytes == setup.heldout.num_bytes
    if complete and setup.heldout.num_bytes <= MAX_COMPRESSED_BYTES:
      packed = bits_per_byte.compressor_bits_per_byte(setup.heldout)
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
  generator = Generator.from_workdir(setup.workdir, trust_rules=True)
  prompt = config.sample_prompt.encode(errors="surrogateescape")
  stop = ()
  if setup.config.has_roles:
    user = roles.turn_of("user", config.sample_prompt)
    prompt, stop = roles.encode_prompt([user]), [roles.END_TEXT]
  size = config.sample_bytes
  if generator.tokenizer is None:  # a text of tokens ends with the row
    size = min(size, setup.config.model.capacities[0] - len(prompt) - 1)
  (completion,) = generator.generate(
    [prompt],
    max_bytes=size,
    settings=Sampling(temperature=0.8, top_p=0.95),
    stop=stop,
  )
  setup.log.say(
    f"sample (temperature 0.8, top_p 0.95):\n{'-' * 72}\n"
    f"{config.sample_prompt}{completion.text}\n{'-' * 72}"
  )


@terminal.command
def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.train",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog=HELP,
  )
  parser.add_argument(
    "--workdir",
    required=True,
    help="where checkpoints and logs go: a directory, or gs://BUCKET/PATH",
  )
  parser.add_argument(
    "--config", required=True, metavar="FILE", help="a file of configs/"
  )
  parser.add_argument(
    "--profile",
    metavar="FIRST:LAST",
    help="record these steps into WORKDIR/profile, for TensorBoard and "
    "xprof; while a run is going, touch WORKDIR/profile_now instead",
  )
  parser.add_argument(
    "--accept_learning_rate",
    action="store_true",
    help="continue although more steps make the learning rate jump",
  )
  hosts = parser.add_argument_group("several hosts or processes")
  hosts.add_argument(
    "--multihost",
    action="store_true",
    help="join the other hosts of a TPU VM slice, GKE or SLURM job",
  )
  hosts.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="address of process 0, if you start processes by hand",
  )
  hosts.add_argument(
    "--num_processes", type=int, help="start only with this many processes"
  )
  hosts.add_argument(
    "--process_id", type=int, help="number of this process, from 0"
  )
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
  if not args.workdir:
    raise ValueError("--workdir is empty; name a directory.")
  workdir = buckets.path(args.workdir)
  profile = parse_steps(args.profile)
  alone = args.coordinator is None and not args.multihost
  with contextlib.ExitStack() as open_things:
    stop = open_things.enter_context(Stop(workdir, alone))
    join_cluster(
      args.multihost,
      args.coordinator,
      args.num_processes,
      args.process_id,
      args.start_timeout,
      args.heartbeat_timeout,
    )
    devices.present()
    open_things.enter_context(together.noticing_the_gone())
    with together.all_or_none():
      stop.leave_if_asked()  # while another may not have been
      config = config_lib.parse_flags([f"--config={args.config}", *overrides])
    open_things.enter_context(lock_workdir(workdir))
    setup = set_up(config, workdir, args.accept_learning_rate)
    open_things.callback(setup.log.close)
    open_things.callback(setup.loader.close)
    return train(setup, stop, profile)


def train(
  setup: Setup, stop: Stop, profile: tuple[int, int] | None = None
) -> int:
  """Runs, and says how it ended; returns the exit status.

  Raises: what `run` does.
  """
  try:
    stopped_by = run(setup, stop, profile)
  except (TrainingError, OSError, layout.CheckpointError) as error:
    setup.saver.settle()  # a save that began before may still succeed
    if isinstance(error, OSError):
      newest = setup.saver.latest_step()
      raise TrainingError(
        f"{error}. When that is repaired, run the same command again to "
        f"continue from checkpoint {newest}."
      ) from error
    raise
  if stopped_by:
    setup.log.say(
      f"stopped by {stopped_by}; everything is saved. Run the same command "
      f"to continue."
    )
    return EXIT_STOPPED
  if jax.process_index() == 0:
    summarise(setup)
  return 0


def quieten_libraries() -> None:
  """Keeps libraries from printing a failed save beside our error line.

  Orbax logs a failed background save with tracebacks of its threads. It then
  closes its event loop, and every other write that was under way prints that
  the loop is closed. `Checkpointer` raises the failure itself.
  """
  absl.logging.set_verbosity(absl.logging.ERROR)
  logging.getLogger("absl").propagate = False
  logging.getLogger("absl").addHandler(logging.NullHandler())
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  others = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      others(unraisable)

  sys.unraisablehook = hook


def leave_together(status: int) -> None:
  """Ends a process of several whose run has failed.

  A thread that still saves may wait for another process for ten minutes, and
  Python would wait for the thread. The first process must be the last to go:
  the runtime of the others dies with it.
  """
  is_first = jax.process_index() == 0
  timer = threading.Timer(LEAVE_SECONDS + 2 * is_first, os._exit, (status,))
  timer.start()
  with contextlib.suppress(RuntimeError):
    jax.distributed.shutdown()  # waits for the others
  os._exit(status)


if __name__ == "__main__":
  quieten_libraries()
  status = main()
  # A stop sent to one process after the other may come when all is saved and
  # the libraries shut down: it must not change the status.
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  if status not in (0, EXIT_STOPPED) and jax.distributed.is_initialized():
    leave_together(status)
  sys.exit(status)
