"""Every experiment file loads, initialises and has the size it claims."""

import pathlib

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax import counts, laws, sharding
from aunet_jax.aunet import AUNet

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
  (run,) = [r for r in laws.FIXED_BUDGET_RUNS if r.name == RUNS[name]]
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
