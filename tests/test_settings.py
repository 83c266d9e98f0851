"""Settings are checked wherever they come from, and say what is wrong."""

import dataclasses

import pytest

from aunet_jax import settings
from tests.tiny_runs import tiny


def test_feed_forward_widths_are_those_of_the_paper():
  """Table 9 of arXiv 2506.14761."""
  widths = {512: 1536, 2048: 5632, 3072: 8192, 4608: 12288}
  assert {dim: settings.swiglu_dim(dim) for dim in widths} == widths


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"head_dim": 15}, "multiple of head_dim=15"),
    ({"capacity": 10**12}, "capacity=1000000000000 must be 1 to"),
    ({"window": 2**31}, "window=2147483648 must be 1 to"),
    ({"num_layers": 0}, "num_layers=0 must be 1 to"),
    ({"window": 0}, "window=0"),
    ({"capacity": 10**30}, "capacity=1000"),
    ({"remat": "ful"}, "Did you mean 'full'?"),
    ({"attention": "flash"}, "must be one of auto, xla"),
  ],
)
def test_a_wrong_stage_is_refused(change, message):
  stage = tiny().model.stages[0]
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(stage, **change)


def test_a_long_value_is_shown_short():
  assert settings.shown("x" * 500).endswith("…")
  assert len(settings.shown("x" * 500)) <= 60
  assert settings.hint("sed", ["seed", "train"]) == " Did you mean 'seed'?"
  assert settings.hint("zzz", ["seed"]) == ""
