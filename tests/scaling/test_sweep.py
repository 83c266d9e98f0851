"""Sweeping settings of a config: what is planned, kept and shown."""

import json
import math
from pathlib import Path

import pytest

from aunet_jax import config as config_lib
from aunet_jax.scaling import __main__ as scaling_main
from aunet_jax.scaling import study, sweep
from tests.scaling.test_collect import GOOD, log, write_run

ROOT = Path(__file__).parents[2]
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"
RATES = "--set=optimizer.learning_rate=1e-3,2e-3,4e-3"


@pytest.fixture
def text(tmp_path) -> Path:
  path = tmp_path / "text.txt"
  path.write_text("The word is longer than the byte, and 42 is a number. " * 99)
  return path


@pytest.fixture
def hp(text, tmp_path):
  """The command, run or not run on a short text."""

  def call(*flags) -> int:
    short = (f"--config.data.train={text}", f"--config.data.heldout={text}")
    short += ("--config.train.num_steps=6",)
    return scaling_main.main(["hp", TINY, *short, *flags])

  return call


def axes(sets, cases=()):
  return [(a.name, a.points) for a in sweep.parse_axes(sets, cases)]


def test_values_and_cases_are_read():
  assert axes(["optimizer.stage_lr=0,1;1,1"]) == [
    (
      "optimizer.stage_lr",
      {"0,1": ("optimizer.stage_lr=0,1",), "1,1": ("optimizer.stage_lr=1,1",)},
    )
  ]
  named = "wide one: model.stages[0].dim=64 model.stages[1].dim=128"
  bare = "model.stages[0].dim=32 optimizer.name=muon"
  assert axes([], [named, bare]) == [
    (
      "case",
      {
        "wide one": ("model.stages[0].dim=64", "model.stages[1].dim=128"),
        "stages[0].dim=32 name=muon": tuple(bare.split()),
      },
    )
  ]


@pytest.mark.parametrize(
  "sets, cases, says",
  [
    ([], [], "nothing is swept"),
    (["seed"], [], "--set=seed: write a setting and its values"),
    (["a=1,1"], [], "has a value twice"),
    (["a=1,2", "a=3"], [], "a is swept by two"),
    ([], ["wide:"], "--case='wide:'"),
    ([], ["w: a=1", "w: a=2"], "two --case have one name"),
  ],
)
def test_what_cannot_be_swept_is_named(sets, cases, says):
  with pytest.raises(ValueError, match=says):
    sweep.parse_axes(sets, cases)


def test_a_cell_for_every_combination_and_seed():
  config = config_lib.parse_flags([TINY, "--config.seed=5"])
  swept = sweep.parse_axes(
    ["optimizer.learning_rate=1e-3,2e-3"],
    ["base: model.stages[0].dim=32", "wide: model.stages[0].dim=64"],
  )
  cells = sweep.make_cells(config, swept, seeds=2)
  assert len(cells.planned) == 8 == len(cells.swept)
  run, own = cells.planned[3]
  assert run.id == "learning_rate-1e-3-wide-s6"
  assert own.seed == run.seed == 6 and own.model.stages[0].dim == 64
  assert own.optimizer.learning_rate == run.learning_rate == 1e-3
  assert cells.swept[run.id] == {
    "optimizer.learning_rate": "1e-3",
    "case": "wide",
  }
  with pytest.raises(ValueError, match="dim-33-s5: .*multiple of head_dim"):
    wrong = sweep.parse_axes(["model.stages[0].dim=32,33"], [])
    sweep.make_cells(config, wrong, seeds=1)


def test_a_dry_run_shows_cells_and_cost_and_writes_nothing(
  hp, tmp_path, capsys
):
  flags = (RATES, f"--study={tmp_path / 'lr'}", "--flops_per_second=1e9")
  assert hp(*flags, "--price_per_hour=2", "--dry-run") == 0
  out = capsys.readouterr().out
  assert "3 cells" in out and "costs" in out and "nothing was written" in out
  assert not (tmp_path / "lr").exists()


def test_unknown_settings_and_arguments_are_named(hp, capsys):
  assert hp("--set=optimizer.rate=1,2") == 2
  assert "optimizer.rate is not a setting" in capsys.readouterr().err
  assert hp(RATES, "--models=byte") == 2
  assert "unknown arguments: --models=byte" in capsys.readouterr().err


def made(directory, losses) -> None:
  """As if a trainer had run the cells: id -> held-out bits per byte."""
  for run in study.read_study(directory)[1]:
    if run.id in losses:
      write_run(directory / run.run, log(GOOD, losses[run.id]))


def test_it_goes_on_grows_and_shows_what_came_of_it(
  hp, tmp_path, capsys, monkeypatch
):
  directory, runs = tmp_path / "lr", []

  def train(study_directory, **flags):
    runs.append(flags)
    made(directory, {
      "learning_rate-1e-3-s0": 2.5, "learning_rate-1e-3-s1": 2.7,
      "learning_rate-2e-3-s0": 2.3, "learning_rate-2e-3-s1": 2.4,
    })  # fmt: skip
    return {"done": ["a"], "failed": [], "waiting": ["b"]}

  monkeypatch.setattr("aunet_jax.scaling.run.run", train)
  where = f"--study={directory}"
  assert hp("--set=optimizer.learning_rate=1e-3,2e-3", where, "--seeds=2") == 75
  out = capsys.readouterr().out
  assert "best: optimizer.learning_rate=2e-3 (2.350), at the edge" in out
  half = 12.706 * 0.1 / math.sqrt(2) / math.sqrt(2)  # Student's t, 1 degree
  assert f"{2.35 - half:.3f} to {2.35 + half:.3f}" in out
  drawn = (directory / sweep.CHART_FILE).read_text()
  assert "2e-3" in drawn and "held-out bits per byte" in drawn
  table = study.read_table(directory / study.NUMBERS_FILE)
  assert [run.loss for run in table.rows] == [2.5, 2.7, 2.3, 2.4]

  # More values: the old cells stay, the new one has not run.
  monkeypatch.setattr("aunet_jax.scaling.run.run", lambda *a, **k: {
    "done": [], "failed": [], "waiting": []})  # fmt: skip
  assert hp(RATES, where, "--seeds=2") == 0
  out = capsys.readouterr().out
  assert "best: optimizer.learning_rate=2e-3 (2.350)\n" in out
  assert "4e-3" in out and "has not finished" in out

  # Fewer, others, or another study's directory are refused.
  assert hp("--set=optimizer.learning_rate=1e-3", where) == 2
  assert "not of this sweep" in capsys.readouterr().err
  other = ("--config.train.batch_size=4", "--seeds=2")
  assert hp(RATES, where, *other) == 2
  assert "planned with other settings" in capsys.readouterr().err
  about = json.loads((directory / study.STUDY_FILE).read_text())
  del about["swept"]
  (directory / study.STUDY_FILE).write_text(json.dumps(about))
  assert hp(RATES, where, "--seeds=2") == 2
  assert "holds another study" in capsys.readouterr().err
  with pytest.raises(ValueError, match="is no sweep"):
    sweep.report(directory)


def test_a_line_for_each_combination_of_the_others():
  def point(rate, case, losses, reasons=()):
    values = {"optimizer.learning_rate": rate, "case": case}
    return sweep.Point(values, losses, list(reasons))

  points = [
    point("1", "narrow", [2.0]),
    point("1", "wide", [1.9]),
    point("2", "narrow", [1.8]),
    point("2", "wide", [], ["seed 0: diverged"]),
    point("4", "narrow", [2.1]),
    point("4", "wide", [2.4]),
  ]
  shown = sweep.show(points)
  assert "best of narrow: optimizer.learning_rate=2 (1.800)" in shown
  assert "best of wide: optimizer.learning_rate=1 (1.900), at the" in shown
  assert "seed 0: diverged" in shown
  chart = sweep.chart(points)
  lines = [s for s in chart.series if s.kind == "line"]
  assert [(s.label, list(s.x)) for s in lines] == [
    ("narrow", [0, 1, 2]),
    ("wide", [0, 2]),
  ]


@pytest.mark.slow  # two starts of the trainer, each compiles
def test_a_sweep_runs_from_end_to_end(hp, tmp_path, capsys):
  where = f"--study={tmp_path / 'lr'}"
  flags = ("--set=optimizer.learning_rate=1e-3,4e-3", where)
  assert hp(*flags) == 0
  assert "best: optimizer.learning_rate=" in capsys.readouterr().out
