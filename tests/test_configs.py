"""Every experiment file loads, initialises and has the size it claims."""

import pathlib

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import counts, sharding
from aunet_jax.aunet.network import AUNet
from tests.scaling.published_runs import FIXED_BUDGET_RUNS

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
# Billions of parameters: sums over the shapes of the paper's Table 9.
SIZES = {
  "aunet2_1b": 1.324,
  "aunet3_1b": 2.500,
  "aunet4_1b": 4.170,
  "aunet2_8b": 7.961,
  "byte_transformer_1b": 1.286,
}
RUNS = {
  "aunet2_1b": "AU-Net 2-1B",
  "aunet3_1b": "AU-Net 3-1B",
  "aunet4_1b": "AU-Net 4-1B",
  "aunet2_8b": "AU-Net 2-7B",
}


def load(name):
  path = CONFIGS[0].parent / f"{name}.py"
  return config_lib.parse_flags([f"--config={path}"])


def abstract_size(model):
  tokens = jax.ShapeDtypeStruct((1, model.capacities[0]), np.int32)
  params = jax.eval_shape(AUNet(model).init, jax.random.key(0), tokens, tokens)[
    "params"
  ]
  return sum(leaf.size for leaf in jax.tree.leaves(sharding.unbox(params)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_initialises_with_the_parameters_counted(path):
  model = load(path.stem).model
  size = abstract_size(model)
  assert size == counts.num_parameters(model)
  if path.stem in SIZES:
    assert size == pytest.approx(SIZES[path.stem] * 1e9, rel=1e-3)


def test_every_sized_config_exists():
  assert set(SIZES) <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", RUNS)
def test_a_published_config_is_the_published_run(name):
  config = load(name)
  (run,) = [r for r in FIXED_BUDGET_RUNS if r.name == RUNS[name]]
  assert config.train.num_steps == run.num_steps
  assert config.train.batch_size * run.length == run.units_per_step
  assert config.optimizer.learning_rate == run.learning_rate
  for stage, published in zip(
    config.model.stages, run.model.stages, strict=True
  ):
    assert (stage.dim, stage.num_layers) == (
      published.dim,
      published.num_layers,
    )
    assert (stage.ffn, stage.head_dim) == (published.ffn, published.head_dim)
    assert (stage.window, stage.capacity, stage.rule) == (
      published.window,
      published.capacity,
      published.rule,
    )


@pytest.mark.parametrize("name", SIZES)
def test_a_large_run_survives_preemptions_by_default(name):
  """Saves by the clock, and evaluates a sample while it trains."""
  config = load(name)
  assert config.checkpoint.every_minutes == 20
  milestone, last = config.checkpoint.milestone_steps, config.train.num_steps
  assert config.checkpoint.every_steps <= milestone < last
  assert 0 < config.train.eval_every_steps < last
  assert 0 < config.train.eval_bytes <= 1e8  # minutes


@pytest.mark.parametrize(
  "override, message",
  [
    (
      "--config.trian.num_steps=5",
      "trian.num_steps is not a setting. Did you mean --config.train.num_steps",
    ),
    ("--config.num_steps=5", "Did you mean --config.train.num_steps"),
    ("--config.learning_rat=1", "mean --config.optimizer.learning_rate"),
    (
      "--config.model.stages[1].hed_dim=64",
      r"Did you mean --config.model.stages\[1\].head_dim",
    ),
    ("--config.model.stages[7].dim=64", r"stages\[7\].dim=64: no such stage"),
    ("--config.model.stages[7].window=None", r"stages\[7\].*no such stage"),
    ("--config.zzz=1", "--config.zzz is not a setting"),
    ("--config.train.num_steps=abc", "num_steps=abc: invalid literal for int"),
    ("--config.train.num_steps=1.5", "num_steps=1.5: invalid literal for int"),
    ("--config.optimizer.learning_rate=high", "learning_rate=high.*float"),
    ("--config.train.tensorboard=maybe", "tensorboard=maybe.*boolean"),
    ("--config.optimizer.schedule=cosin", "Did you mean 'cosine'"),
    ("--config.seed=None", "config.seed=None is of type NoneType; .* int"),
    (
      "--config.model.stages[1].dim=250",
      r"model.stages\[1\]: dim=250 must be a multiple of head_dim=32",
    ),
    ("--confg.seed=1", "confg.seed"),
    ("more", "unknown arguments: more"),
  ],
)
def test_a_wrong_override_is_named(override, message):
  with pytest.raises(ValueError, match=message):
    config_lib.parse_flags(["--config=configs/quickstart.py", override])


def test_an_override_can_clear_a_setting():
  quickstart = "--config=configs/quickstart.py"
  assert config_lib.parse_flags([quickstart]).model.stages[0].window
  cleared = config_lib.parse_flags(
    [quickstart, "--config.model.stages[0].window=None"]
  )
  assert cleared.model.stages[0].window is None


@pytest.mark.parametrize(
  "line, message",
  [
    ("c.modle.dtype = 'float32'", 'Did you mean "model"'),
    ("c.model.dtyp = 'float32'", "config.model.dtyp is not a setting"),
    ("c.seed = 'many'", "config.seed='many' is of type str; it must be int"),
    ("c.seed = )", "does not parse"),
    ("c.seed = sed", "sed"),
  ],
)
def test_a_mistake_in_a_config_file_is_named(tmp_path, line, message):
  path = tmp_path / "mine.py"
  path.write_text(
    "from aunet_jax import config\n\n\ndef get_config():\n"
    "  c = config.default(stages=[config.stage(dim=64, num_layers=1,\n"
    f"    head_dim=32, window=8, capacity=64)])\n  {line}\n  return c\n"
  )
  with pytest.raises(ValueError, match=message):
    config_lib.parse_flags([f"--config={path}"])
