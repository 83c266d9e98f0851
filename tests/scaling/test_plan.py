"""Planning and running a scaling study, as its user does."""

import json
from pathlib import Path

import pytest

from aunet_jax import config
from aunet_jax.scaling import __main__ as scaling_main
from aunet_jax.scaling import laws
from aunet_jax.scaling.plan import Grid, make_runs, read_laws
from aunet_jax.scaling.sample import Sample
from aunet_jax.scaling.study import read_study
from tests.scaling.published_runs import LADDERS

ROOT = Path(__file__).parents[2]
MODEL = f"{Path(__file__).parents[1] / 'tiny.py'}:for_budget"


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture
def text(tmp_path) -> Path:
  path = tmp_path / "text.txt"
  path.write_text("The word is longer than the byte, and 42 is a number. " * 99)
  return path


def plan(*args) -> int:
  return scaling_main.main(["plan", *map(str, args)])


@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_papers_budgets_give_the_papers_runs(num_stages):
  published = LADDERS[num_stages]
  grid = Grid(
    models=[f"aunet{num_stages}"], budgets=[run.compute for run in published]
  )
  planned = make_runs(grid, Sample(None, 8192))
  assert len(planned) == 12
  for theirs, (run, planned_config) in zip(published, planned, strict=True):
    assert planned_config.model == theirs.model
    assert run.learning_rate == pytest.approx(theirs.learning_rate, rel=0.01)
    assert run.batch_bytes == pytest.approx(
      theirs.printed_units_per_step, rel=0.07
    )
    assert run.bytes == pytest.approx(theirs.units, rel=0.01)


def test_dear_budgets_may_have_one_seed():
  grid = Grid(
    models=["aunet2"], budgets=[1e18, 1e19], seeds=[3, 4],
    single_seed_above=1e18,
  )  # fmt: skip
  runs = [run for run, _ in make_runs(grid, Sample(None, 8192))]
  assert [(run.budget_flops, run.seed) for run in runs] == [
    (1e18, 3),
    (1e18, 4),
    (1e19, 3),
  ]


def test_isoflop_cells_spend_one_budget_on_several_sizes():
  models = ["aunet2", "byte", "stride@4"]
  grid = Grid(models=models, budgets=[1e18], sizes=[0.5, 1, 2])
  runs = [run for run, _ in make_runs(grid, Sample(None, 8192))]
  for model in models:
    some = [run for run in runs if run.model == model]
    assert len(some) == 3
    sizes = [run.flops_per_byte for run in some]
    assert 1.4 < sizes[1] / sizes[0] < 2.8 and 1.4 < sizes[2] / sizes[1] < 2.8
    for run in some:
      spent = run.flops_per_byte * run.bytes
      assert spent == pytest.approx(1e18, rel=0.01)


def test_a_sweep_has_a_cell_for_every_batch_and_rate(tmp_path, text):
  study = tmp_path / "hp"
  sweep = ("--batch_bytes=512,1024", "--learning_rates=0.001,0.002")
  own = ("--models=aunet2", "--budgets=1e9", f"--data={text}")
  own += ("--row_bytes=64", "--ratio=1e-8")
  assert plan(study, *own, *sweep) == 0
  _, runs = read_study(study)
  pairs = {(run.batch_bytes, run.learning_rate) for run in runs}
  assert len(pairs) == len(runs) == 4


def test_a_directory_holds_one_study(tmp_path, text, capsys):
  flags = (f"--models={MODEL}", "--budgets=1e9", f"--data={text}")
  assert plan(tmp_path / "study", *flags) == 0
  assert plan(tmp_path / "study", *flags) == 2
  assert "holds a study already" in capsys.readouterr().err


def test_a_config_is_read_from_json_as_from_python(tmp_path):
  whole = config.parse_flags(["--config=tests/tiny.py"])
  path = tmp_path / "config.json"
  path.write_text(whole.to_json())
  assert config.parse_flags([f"--config={path}"]) == whole
  changed = config.parse_flags([f"--config={path}", "--config.seed=3"])
  assert changed.seed == 3
  with pytest.raises(ValueError, match="Did you mean --config.seed"):
    config.parse_flags([f"--config={path}", "--config.sed=3"])
  path.write_text("{")
  with pytest.raises(ValueError, match="config.json"):
    config.parse_flags([f"--config={path}"])


def test_laws_of_ones_own_are_followed(tmp_path, capsys):
  path = tmp_path / "laws.json"
  laws_of = {"learning_rate": [2.0, -0.1], "batch_bytes": [16384, 0]}
  path.write_text(json.dumps({"byte": laws_of | {"budgets": [1e18, 1e19]}}))
  models = ["byte", "aunet2"]
  grid = Grid(models=models, budgets=[1e19], own_laws=read_laws(str(path)))
  byte, aunet = make_runs(grid, Sample(None, 8192))
  assert byte.config.optimizer.learning_rate == pytest.approx(2.0 * 1e19**-0.1)
  assert byte.config.train.batch_size == 2
  rate = laws.aunet_learning_rate(1e19)
  assert aunet.config.optimizer.learning_rate == pytest.approx(rate)

  flags = ("--models=byte,aunet2", f"--laws={path}")
  assert plan(*flags, "--budgets=1e18,1e20") == 0
  out = capsys.readouterr().out
  assert "byte were fitted to 1e+18 to 1e+19 FLOPs; 1e+20 lie outside" in out
  assert "no laws for" not in out
  assert plan("--models=byte", "--budgets=1e17") == 0
  assert "no laws for byte" in capsys.readouterr().out


@pytest.mark.parametrize(
  "content, message",
  [
    ("{", "laws.json is damaged"),
    ("[]", "object of models"),
    ('{"byte": {"rate": [1, 2]}}', "must be an object of batch_bytes"),
    ('{"byte": {"learning_rate": [-1, 2]}}', "byte: learning_rate=[-1, 2]"),
    ('{"byte": {"learning_rate": 3}}', "byte: learning_rate=3 must be a list"),
    ('{"bpe": {"learning_rate": [1, 0]}}', "laws are of bpe"),
  ],
)
def test_laws_that_cannot_be_followed_are_named(
  content, message, tmp_path, capsys
):
  path = tmp_path / "laws.json"
  path.write_text(content)
  assert plan("--models=byte", "--budgets=1e19", f"--laws={path}") == 2
  assert message in capsys.readouterr().err
