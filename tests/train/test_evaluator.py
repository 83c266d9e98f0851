"""When held-out text is evaluated."""

import dataclasses

import jax
import pytest

from aunet_jax.aunet import sharding
from aunet_jax.train.evaluator import Evaluator
from tests.tiny_runs import tiny


@pytest.mark.parametrize(
  ("every", "heldout", "expected"),
  [
    (5, "text", [5, 10, 12]),  # and at the last step
    (0, "text", [12]),
    (5, None, []),
  ],
)
def test_held_out_text_is_due_every_so_many_steps(every, heldout, expected):
  config = tiny()
  train = dataclasses.replace(config.train, eval_every_steps=every)
  config = dataclasses.replace(config, train=train)
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  evaluator = Evaluator(config, heldout, mesh)
  assert [step for step in range(1, 13) if evaluator.due(step)] == expected
