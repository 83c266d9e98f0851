"""What a model to begin with must share with the run, and how it is named."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.workdir import origin

TINY = "--config=tests/tiny.py"


def tiny(*settings) -> config_lib.Config:
  return config_lib.parse_flags([TINY, *(f"--config.{s}" for s in settings)])


@pytest.mark.parametrize(
  "setting",
  [
    "model.stages[0].capacity=256",
    "model.stages[1].remat=full",
    "model.dtype=bfloat16",
    "model.document_mask=False",
    "train.num_steps=5",
    "data.train=elsewhere",
  ],
)
def test_what_changes_no_parameter_may_differ(setting):
  assert not origin.differences(tiny(), tiny(setting))


def test_every_difference_is_named():
  here = tiny(
    "model.stages[1].dim=80",
    "model.stages[0].window=8",
    "model.stages[1].rule=word@2",
    "model.rope_theta=1",
  )
  assert origin.differences(tiny(), here) == [
    "model.rope_theta is 500000.0 there, 1.0 here",
    "model.stages[0].window is 16 there, 8 here",
    "model.stages[1].dim is 64 there, 80 here",
    "model.stages[1].rule is 'word@1' there, 'word@2' here",
  ]
  no_window = tiny("model.stages[0].window=None")
  (line,) = origin.differences(tiny(), no_window)
  assert line == "model.stages[0].window is 16 there, nothing here"


def test_another_number_of_stages_is_one_difference():
  one = dataclasses.replace(
    tiny().model, stages=tiny().model.stages[:1], parametric=False
  )
  found = origin.differences(tiny(), dataclasses.replace(tiny(), model=one))
  assert found[0] == "the model has 2 stages there, 1 here"
  assert found[1:] == ["model.parametric is True there, False here"]


def test_the_hash_is_of_names_shapes_types_and_values():
  params = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 2))}}
  known = origin.params_hash(params)
  assert known == origin.params_hash(
    {"b": {"c": np.ones((2, 2), np.float32)}, "a": jnp.arange(6.0)}
  )
  others = [
    {**params, "a": params["a"].at[3].add(1e-6)},
    {**params, "a": params["a"].reshape(2, 3)},
    {**params, "a": params["a"].astype(jnp.int32)},
    {"z": params["a"], "b": params["b"]},
    {"b": params["b"]},
  ]
  assert known not in {origin.params_hash(other) for other in others}
