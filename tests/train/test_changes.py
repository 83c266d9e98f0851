"""What a run that goes on may have otherwise."""

import dataclasses

import pytest

from aunet_jax import config as config_lib
from aunet_jax.train import changes


def with_steps(num_steps: int, **optimizer) -> config_lib.Config:
  stage = config_lib.StageConfig(
    dim=32, num_layers=1, head_dim=16, window=16, capacity=64
  )
  return config_lib.Config(
    model=config_lib.ModelConfig(stages=(stage,)),
    train=config_lib.TrainConfig(num_steps=num_steps),
    optimizer=config_lib.OptimizerConfig(
      learning_rate=1.0, warmup_steps=10, **optimizer
    ),
  )


@pytest.mark.parametrize(
  ("optimizer", "count", "jumps"),
  [
    ({}, 1000, True),  # finished: from 1% of the peak to 50%
    ({}, 800, True),
    ({}, 200, False),  # 0.9 -> 0.98
    ({}, 5, False),  # the warmup is the same
    ({"schedule": "wsd"}, 700, False),  # before its decay
    ({"schedule": "wsd"}, 950, True),
    ({"schedule": "constant"}, 1000, False),
  ],
)
def test_a_jump_of_the_learning_rate_is_asked_about(optimizer, count, jumps):
  old, new = with_steps(1000, **optimizer), with_steps(2000, **optimizer)
  said = []
  changes.check_rate(old, old, count, False, said.append)
  assert not said
  if not jumps:
    changes.check_rate(old, new, count, False, said.append)
    assert len(said) <= 1
    return
  with pytest.raises(ValueError, match="--accept_learning_rate"):
    changes.check_rate(old, new, count, False, said.append)
  changes.check_rate(old, new, count, True, said.append)
  assert "1000 -> 2000: " in said[0] and "->" in said[0].rpartition(":")[2]


def test_how_often_to_save_and_when_to_give_up_may_change():
  old = with_steps(1000)
  new = dataclasses.replace(
    old,
    train=dataclasses.replace(old.train, hang_seconds=None, hang_factor=3.0),
    checkpoint=config_lib.CheckpointConfig(
      every_minutes=None, milestone_steps=100
    ),
  )
  forbidden, allowed = changes.changed_fields(old, new)
  assert not forbidden and len(allowed) == 4
