"""What a width multiplies, parameter by parameter, and that 1 is the default.

Letters: u and v, how much wider a matrix's input and output are.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding, width
from aunet_jax.config import ModelConfig, StageConfig
from aunet_jax.train import optimizer

ROOT2, ROOT3 = math.sqrt(2), math.sqrt(3)
INIT = jax.jit(network.init_params, static_argnums=0)


def model_of(*stages, **fields) -> ModelConfig:
  """Stages as (width, base width)."""
  made = [
    StageConfig(
      dim=dim,
      base_dim=base,
      ffn_dim=2 * dim,
      num_layers=1,
      head_dim=8,
      window=None,
      capacity=32 >> i,
      rule=f"word@{i}" if i else None,
    )
    for i, (dim, base) in enumerate(stages)
  ]
  return ModelConfig(stages=tuple(made), **fields)


def flat(tree, is_leaf=None) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): x
    for path, x in leaves
  }


def scales_of(model) -> dict:
  """By name, without norms and with one of a group that is alike."""
  found = width.scales(network.abstract_params(model), model)
  found = flat(found, lambda x: isinstance(x, width.Scales))
  assert all(tuple(x) == (1, 1, 1) for k, x in found.items() if "norm" in k)
  same, result = {}, {}
  for name, x in found.items():
    if "norm" in name:
      continue
    group = name.replace("/blocks/", " ").partition("/")[0]
    group = group if " " in group else name
    assert same.setdefault(group, x) == pytest.approx(x), name
    result[group] = same[group]
  return result


def check(model, expected):
  found = scales_of(model)
  assert found.keys() == expected.keys()
  for name, x in found.items():
    assert tuple(x) == pytest.approx(expected[name]), name


def test_two_stages_twice_and_three_times_as_wide():
  model = model_of((32, 16), (96, 32), level_loss_weight=0.1)
  # First values, Adam's rate, Muon's rate.
  check(
    model,
    {
      "embed": (ROOT2, 1, 1),
      "head": (1 / ROOT2, 1 / 2, 1 / 2),
      "level_head": (1 / ROOT2, 1 / 2, 1 / 2),
      "contract_1 attention": (1, 1 / 2, 1 / ROOT2),
      "contract_1 ffn": (1, 1 / 2, 1 / ROOT2),
      "expand_1 attention": (1, 1 / 2, 1 / ROOT2),
      "expand_1 ffn": (1, 1 / 2, 1 / ROOT2),
      # From 32 to 96, of 16 to 32: u = 2, v = 3, the larger side 3 times.
      "pool_1/kernel": (1, 1 / 2, 1 / ROOT2),
      "upsample_1/kernel": (math.sqrt(2 / 3), 1 / 3, ROOT2 / 3),
      "upsample_1/offsets": (math.sqrt(2 / 3), 1 / 3, ROOT2 / 3),
      "deepest attention": (1, 1 / 3, 1 / ROOT3),
      "deepest ffn": (1, 1 / 3, 1 / ROOT3),
    },
  )


def test_three_stages_of_which_the_middle_one_has_no_base():
  model = model_of((32, 16), (48, None), (72, 24), upsampling="repeat",
                   tie_embeddings=True, heads=2, ngram_rows=4)  # fmt: skip
  assert width.head_scale(model) == 1 / 2
  check(
    model,
    {
      "embed": (ROOT2, 1, 1),
      "ngrams/table": (ROOT2, 1, 1),
      "heads/ahead_2/into": (1, 1 / 2, 1 / ROOT2),
      "heads/ahead_2/out_of": (1, 1 / 2, 1 / ROOT2),
      "contract_1 attention": (1, 1 / 2, 1 / ROOT2),
      "contract_1 ffn": (1, 1 / 2, 1 / ROOT2),
      "expand_1 attention": (1, 1 / 2, 1 / ROOT2),
      "expand_1 ffn": (1, 1 / 2, 1 / ROOT2),
      # Into a stage as wide as ever: the larger side, 48, has not grown.
      "pool_1/kernel": (1 / ROOT2, 1 / 2, 1 / ROOT2),
      "upsample_1/kernel": (1, 1, ROOT2),
      "upsample_1/offsets": (1, 1, 1),  # a table of the coarse width
      "contract_2 attention": (1, 1, 1),
      "contract_2 ffn": (1, 1, 1),
      "expand_2 attention": (1, 1, 1),
      "expand_2 ffn": (1, 1, 1),
      # 48 to 72, of 48 to 24: the larger side was 48.
      "pool_2/kernel": (1, 1, ROOT2),
      "upsample_2/kernel": (1 / ROOT3, 1 / 3, 1 / ROOT3 / math.sqrt(1.5)),
      "upsample_2/offsets": (ROOT3, 1, 1),
      "deepest attention": (1, 1 / 3, 1 / ROOT3),
      "deepest ffn": (1, 1 / 3, 1 / ROOT3),
    },
  )


def test_the_feed_forward_grows_as_the_papers_does():
  stage = dataclasses.replace(model_of((512, 64)).stages[0], ffn_dim=None)
  scales = scales_of_ffn(ModelConfig(stages=(stage,)))
  # 1536 numbers for 512, 256 for 64: six times where the stage has eight.
  assert scales["down"].adamw == pytest.approx(1 / 6)
  assert scales["down"].init == 1
  assert scales["gate"].adamw == scales["up"].adamw == 1 / 8
  assert scales["gate"].init == pytest.approx(math.sqrt(6 / 8))


def scales_of_ffn(model) -> dict:
  found = width.scales(network.abstract_params(model), model)
  return found["deepest"]["blocks"]["ffn"]


def test_at_base_width_nothing_changes():
  off, base, wide = (
    model_of((16, b1), (24, b2), tie_embeddings=True)
    for b1, b2 in ((None, None), (16, 24), (8, 8))
  )
  key = jax.random.key(0)
  params = [flat(sharding.unbox(INIT(m, key))) for m in (off, base, wide)]
  for name, x in params[0].items():
    np.testing.assert_array_equal(x, params[1][name])
  # First values of a base of its own differ by the scale alone.
  scale = math.sqrt(2)
  np.testing.assert_allclose(params[2]["embed"], params[0]["embed"] * scale)
  assert width.head_scale(base) == 1
  for name in ("adamw", "muon"):
    settings = config_lib.OptimizerConfig(name=name)
    for model in (off, base):
      config = config_lib.Config(model=model, optimizer=settings)
      factors = flat(optimizer.factors(config))
      assert set(factors.values()) == {1.0}


def test_rates_fall_and_decay_of_a_step_stays():
  model = model_of((32, 16), (96, 32))
  settings = config_lib.OptimizerConfig(name="muon", stage_lr="3,1")
  config = config_lib.Config(model=model, optimizer=settings)
  found = optimizer.factors(config)
  query = found["contract_1"]["blocks"]["attention"]["query"]
  assert query == pytest.approx((3 / ROOT2, ROOT2))
  assert found["head"] == pytest.approx((3 / 2, 2))


def test_a_head_of_zeros_leaves_all_else_as_it_is():
  usual, zero = (model_of((16, None), zero_head=zero) for zero in (False, True))
  usual, zero = (
    flat(sharding.unbox(INIT(m, jax.random.key(0)))) for m in (usual, zero)
  )
  assert usual["head"].any() and not zero["head"].any()
  for name in usual.keys() - {"head"}:
    np.testing.assert_array_equal(usual[name], zero[name])
  with pytest.raises(ValueError, match="zero_head=True with .*leave one"):
    model_of((16, None), zero_head=True, tie_embeddings=True)


@pytest.mark.parametrize(
  "base, says", [(0, "base_dim=0 must be"), (20, "Try base_dim=24")]
)
def test_bad_base_widths_are_refused(base, says):
  with pytest.raises(ValueError, match=says):
    model_of((16, base))
