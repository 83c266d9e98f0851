"""Joining the other processes, and keeping compiled programs."""

import os
import sys
import threading

import jax

from aunet_jax import files
from aunet_jax.terminal import EXIT_FAILED


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

  # JAX's own handler of SIGTERM would take the place of ours (`stop.py`), which
  # makes all processes stop at the same step.
  jax.config.update("jax_enable_preemption_service", False)
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


def keep_compiled_programs() -> None:
  """Keeps compiled programs on disk: a restart need not compile again.

  On accelerators, where compiling takes minutes. JAX_COMPILATION_CACHE_DIR
  names another directory, or none where it is empty.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  if jax.default_backend() == "cpu":
    return
  folder = files.cache_folder() / "compiled"
  jax.config.update("jax_compilation_cache_dir", str(folder))
