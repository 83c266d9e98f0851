"""The kernel for GPUs: what it refuses."""

import dataclasses

import pytest

from aunet_jax.aunet import attention
from aunet_jax.config import (
  StageConfig,
)


def test_heads_too_wide_for_shared_memory_are_refused_by_triton():
  stage = StageConfig(dim=256, num_layers=1, head_dim=256, window=4, capacity=4)
  stage = dataclasses.replace(stage, attention="triton")
  with pytest.raises(ValueError, match="stage 1.*at most 128.*is 256"):
    attention.check([stage], "gpu")
