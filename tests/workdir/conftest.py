"""What tests of several processes share."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils


@pytest.fixture
def two_processes(monkeypatch):
  """This process as the first of two; yields what the other one reports."""
  other = np.zeros(501, np.uint8)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: x)
  monkeypatch.setattr(
    multihost_utils, "process_allgather", lambda x: np.stack([x, other])
  )
  return other
