"""The text of a program, read."""

import functools

import pytest

from aunet_jax.compile import collectives


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="HLO"):
    collectives.find("loss 1.0\n")


def test_dtypes_have_their_widths():
  widths = functools.partial(collectives.Collective, "all-reduce")

  def size(dtype):
    return widths(((dtype, (6,)),), 2, 8, "").bytes

  assert size("bf16") == 24 and size("f32") == 48 and size("pred") == 12
  assert size("f8e4m3fn") == 12 and size("s4") == 6
  assert size("token") == 0  # what orders instructions takes no memory
