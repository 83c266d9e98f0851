"""When held-out text is evaluated."""

import dataclasses

import jax
import pytest

from aunet_jax.aunet import sharding
from aunet_jax.data import loader
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


def test_processes_that_hold_the_same_rows_evaluate_the_same_rows(monkeypatch):
  config, asked = tiny(), []
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  monkeypatch.setattr(sharding, "batch_share", lambda mesh: (1, 2))
  monkeypatch.setattr(
    loader, "evaluation_batches", lambda _, **share: asked.append(share) or ()
  )
  with pytest.raises(ValueError, match="no text"):
    Evaluator(config, "text", mesh).evaluate({}, lambda: True)
  (share,) = asked
  assert (share["share_index"], share["share_count"]) == (1, 2)
