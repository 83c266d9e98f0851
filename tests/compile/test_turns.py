"""What an average turn of decoding runs."""

import pytest

from aunet_jax import config as config_lib
from aunet_jax.compile import turns
from aunet_jax.generate import decode


def model(*capacities):
  stages = [
    config_lib.StageConfig(
      dim=16,
      num_layers=1,
      head_dim=8,
      window=8,
      capacity=capacity,
      rule=None if i == 0 else "word@1",
    )
    for i, capacity in enumerate(capacities)
  ]
  return config_lib.ModelConfig(stages=tuple(stages))


@pytest.mark.parametrize(
  ("num_stages", "expected"),
  [
    (2, [(0, 1), (0, 0)]),
    # Contracting 2, the deepest, expanding 2.
    (3, [(0, 1), (3, 2), (3, 3), (0, 0)]),
    (4, [(0, 1), (5, 2), (4, 3), (4, 4), (5, 5), (0, 0)]),
  ],
)
def test_rows_go_down_and_come_back_up(num_stages, expected):
  found = [turns.after(p, num_stages) for p in range(len(expected))]
  assert found == expected
  shape = model(*[8] * num_stages)
  assert len(turns.names(shape)) == decode.num_phases(shape)


def of(shape, schedule, num_rows, num_turns=turns.NUM_TURNS):
  schedule = decode.make_schedule(schedule, num_rows, shape)
  return turns.expected(shape, schedule, num_rows, num_turns)


def test_one_row_runs_a_stage_as_often_as_it_gets_positions():
  # A byte, and for a quarter of them stage 2, down and back; for half of those
  # stage 3: of 1 + 2 / 4 + 1 / 8 turns.
  found = of(model(64, 16, 8), "any", 1)
  calls = (1, 1 / 4, 1 / 8, 1 / 4)
  expected = [x / sum(calls) for x in calls]
  assert found.shares == pytest.approx(expected, rel=0.1)
  assert found.rows == (1, 1, 1, 1)
  assert found.bytes == found.shares[0]


def test_where_every_byte_is_a_boundary_all_rows_go_together():
  found = of(model(64, 64), "sync", 4, 100)
  assert found.shares == (0.5, 0.5) and found.rows == (4, 4)
  assert found.bytes == 2


def test_blocks_serve_as_many_rows_as_they_wait_for():
  found = of(model(64, 16), "pack", 16)
  assert found.rows[1] == 4  # a quarter of the batch
  # As many rows go down as a quarter of the bytes says.
  deep = found.shares[1] * found.rows[1]
  assert deep == pytest.approx(found.bytes / 4, rel=0.1)


def test_a_model_of_one_stage_has_one_phase():
  assert of(model(64), "any", 3, 10) == turns.Turns((1.0,), (3.0,))
  assert turns.names(model(64)) == ("a byte",)
