"""What several processes agree on, and how they fail alike."""

import pytest

from aunet_jax.terminal import Failure
from aunet_jax.workdir import together


def report(other, status: int, message: bytes) -> None:
  other[0] = status
  other[1 : 1 + len(message)] = list(message)


@pytest.mark.parametrize(
  ("mine", "others", "status", "said"),
  [
    (None, 1, 1, "process 1: the disk"),
    (None, 2, 2, "process 1: the disk"),
    (OSError("net"), 0, 1, "net"),
    (ValueError("flag"), 0, 2, "flag"),
    (ValueError("flag"), 2, 2, "flag"),
    (ValueError("flag"), 1, 1, "flag"),
    (OSError("net"), 2, 1, "net"),
  ],
)
def test_processes_fail_alike(two_processes, mine, others, status, said):
  if others:
    report(two_processes, others, b"the disk")
  with pytest.raises((Failure, OSError, ValueError)) as caught:
    with together.all_or_none():
      if mine is not None:
        raise mine
  from aunet_jax.terminal import status_of

  assert status_of(caught.value) == status
  assert said in str(caught.value)


def test_processes_without_failure_go_on(two_processes):
  with together.all_or_none():
    pass
  with pytest.raises(KeyError), together.all_or_none():
    raise KeyError  # a defect of ours keeps its traceback
