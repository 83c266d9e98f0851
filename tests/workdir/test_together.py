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


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_process_that_is_gone_is_worth_another_try(
  two_processes, monkeypatch, kind
):
  def lost(*args, **kwargs):
    raise kind("UNKNOWN: Gloo AllGather failed: closed by peer\nmore")

  for name in ("broadcast_one_to_all", "process_allgather"):
    monkeypatch.setattr(together.multihost_utils, name, lost)

  def meet():
    with together.all_or_none():
      pass

  for use in (meet, lambda: together.broadcast(1), lambda: together.gather(1)):
    with pytest.raises(
      together.ElsewhereError, match="is gone .*by peer.; run"
    ):
      use()
  assert together.ElsewhereError.status == 1
  with pytest.raises(together.ElsewhereError), together.noticing_the_gone():
    raise ValueError("UNKNOWN: Gloo AllReduce failed")
  with pytest.raises(ValueError, match="^a bad flag$"):
    with together.noticing_the_gone():
      raise ValueError("a bad flag")
