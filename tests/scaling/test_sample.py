"""Samples of a text: the bytes its rows hold."""

from pathlib import Path

import pytest

from aunet_jax.scaling.plan import Grid, make_runs
from aunet_jax.scaling.sample import Sample

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def test_rows_of_a_text_fill_and_bytes_are_those_that_are_read(tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("Some words of a text that is long enough. " * 2000)
  grid = Grid(models=["aunet2"], budgets=[1e11], ratio=0.0005)
  ((run, planned),) = make_runs(grid, Sample(str(text), 512))
  assert planned.model.capacities[0] == 512
  assert 0.8 < run.fill[0] < 1 and run.fill[1] > 0.9
  assert run.useful_flops < run.padded_flops
  rows = planned.train.num_steps * planned.train.batch_size
  assert run.bytes == pytest.approx(rows * 512 * run.fill[0])
