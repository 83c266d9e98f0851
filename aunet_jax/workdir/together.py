"""What the processes of a run do all alike.

Every process must call these, in the same order; one process alone decides
for itself.
"""

import contextlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from aunet_jax.terminal import EXIT_FAILED, Failure, status_of

_MESSAGE_BYTES = 500  # of a failure, as the other processes print it


class ElsewhereError(Failure):
  """Another process of the run failed."""


@contextlib.contextmanager
def _meeting():
  """Of a process that is gone JAX says so as a ValueError, or as its own."""
  try:
    yield
  except (ValueError, RuntimeError) as error:
    raise gone(error) from error


@contextlib.contextmanager
def noticing_the_gone():
  """The same for whatever else the processes do together; of CPUs alone.

  On other devices the runtime ends the processes that are left.
  """
  try:
    yield
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    if jax.process_count() == 1 or "Gloo" not in str(error):
      raise
    raise gone(error) from error


def gone(error: Exception) -> ElsewhereError:
  """What to raise where another process has not answered."""
  reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
  return ElsewhereError(
    f"another process of the run is gone ({reason}); run the same command "
    f"again on every host."
  )


def broadcast(number: int) -> int:
  """The number that process 0 has."""
  if jax.process_count() == 1:
    return number
  with _meeting():
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def gather(number: float) -> list[float]:
  """The number that each process has, process 0 first."""
  if jax.process_count() == 1:
    return [number]
  with _meeting():
    return multihost_utils.process_allgather(np.float32(number)).tolist()


@contextlib.contextmanager
def all_or_none():
  """Where one process fails inside, all do, with the same exit status.

  Without it the others would wait for the one that is gone, and end with a
  status of their own. Inside, no process may wait for another.

  Raises: what was raised inside, or ElsewhereError. Where the statuses differ,
    the one after which a launcher tries again wins.
  """
  failure = None
  try:
    yield
  except (ValueError, OSError, Failure) as error:
    if jax.process_count() == 1:
      raise
    failure = error
  if jax.process_count() == 1:
    return
  report = np.zeros(1 + _MESSAGE_BYTES, np.uint8)
  if failure is not None:
    message = str(failure).encode(errors="replace")[:_MESSAGE_BYTES]
    report[0] = status_of(failure)
    report[1 : 1 + len(message)] = list(message)
  with _meeting():
    reports = multihost_utils.process_allgather(report)
  failed = [i for i, row in enumerate(reports) if row[0]]
  if not failed:
    return
  statuses = {int(reports[i][0]) for i in failed}
  status = EXIT_FAILED if EXIT_FAILED in statuses else max(statuses)
  if failure is not None and status_of(failure) == status:
    raise failure
  message = bytes(reports[failed[0]][1:]).rstrip(b"\0").decode(errors="replace")
  elsewhere = ElsewhereError(
    str(failure) if failure is not None else f"process {failed[0]}: {message}"
  )
  elsewhere.status = status
  raise elsewhere from failure
