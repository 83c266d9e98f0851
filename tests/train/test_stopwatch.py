"""Wall time of a run by what it went into."""

import json

import pytest

from aunet_jax.train import stopwatch


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


def test_every_second_is_of_one_thing():
  clock = Clock()
  watch = stopwatch.Stopwatch(clock=clock)
  clock.now += 5
  with watch.within("step"):
    watch.lap()
    clock.now += 3
    with watch.within("data"):
      clock.now += 2
    watch.step(70)
    clock.now += 1
    with pytest.raises(ValueError), watch.within("save"):
      clock.now += 10
      raise ValueError
    lap = watch.lap()
    clock.now += 4
  assert lap.seconds == {"start": 0, "step": 4, "data": 2, "save": 10}
  assert (lap.steps, lap.num_bytes) == (1, 70)
  after = watch.lap()
  assert after.seconds["step"] == 4 and after.seconds["save"] == 0
  assert (after.steps, after.num_bytes) == (0, 0)
  assert watch.seconds == {"start": 5, "step": 8, "data": 2, "save": 10}


def test_goodput_counts_no_step_twice_and_no_time_between_starts(tmp_path):
  clock = Clock()
  first = stopwatch.History(tmp_path, 0, True, clock)
  clock.now += 100
  row = first.note(50, {"step": 80.0, "compile": 20.0})
  assert row == {"goodput": 0.8, "goodput_all_starts": 0.8}
  clock.now += 100  # killed, and started again from step 30
  second = stopwatch.History(tmp_path, 30, True, clock)
  clock.now += 100
  row = second.note(80, {"step": 60.0, "compile": 40.0})
  assert row["goodput"] == pytest.approx(0.6)
  # 30 of the first 50 steps count: 48 s; 60 s of the second; 300 s passed.
  assert row["goodput_all_starts"] == pytest.approx((48 + 60) / 300)
  assert "over 2 starts 36.0% of the" in second.summary()


def test_times_are_written_now_and_then_and_at_the_end(tmp_path):
  clock = Clock()
  history = stopwatch.History(tmp_path, 0, True, clock)
  path = tmp_path / stopwatch.TIMES_FILE
  for step in range(1, 4):
    history.note(step, {"step": float(step)})
    clock.now += 1
  assert json.loads(path.read_text())["starts"][0]["last_step"] == 1
  history.note(None, {"step": 3.0})
  assert json.loads(path.read_text())["starts"][0]["last_step"] == 3


@pytest.mark.parametrize(
  "content",
  ["", "5", "{}", '{"starts": 5}', '{"starts": [5]}', '{"starts": [{}]}',
   '{"starts": [{"began": "x", "until": 1, "first_step": 1, "last_step": 1, '
   '"seconds": {}}]}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_file_of_times_stops_no_run(tmp_path, content):
  (tmp_path / stopwatch.TIMES_FILE).write_text(content)
  history = stopwatch.History(tmp_path, 0, True, Clock())
  history.note(1, {"step": 1.0})
  assert "time: step 100.0%" in history.summary()


def test_other_processes_write_nothing(tmp_path):
  stopwatch.History(tmp_path, 0, False, Clock()).note(None, {})
  assert not list(tmp_path.iterdir())
