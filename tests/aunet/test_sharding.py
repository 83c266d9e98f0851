"""Which process reads which rows, and meshes JAX alone would not make."""

import jax
import numpy as np
import pytest

from aunet_jax.aunet import sharding
from aunet_jax.config import MeshConfig


def grid(*shape, per_process):
  """Processes of devices that are numbered along the last axis first."""
  return (np.arange(np.prod(shape)) // per_process).reshape(shape)


def test_processes_that_hold_the_same_rows_read_the_same_part():
  # data, fsdp, tensor: two devices a process, tensor over two processes.
  found = sharding.shares(grid(2, 1, 4, per_process=2))
  assert found == [({0}, {0, 1}), ({1}, {2, 3})]
  found = sharding.shares(grid(1, 1, 4, per_process=2))
  assert found == [({0}, {0, 1})]
  found = sharding.shares(grid(2, 2, 2, per_process=4))
  assert found == [({0, 1}, {0}), ({2, 3}, {1})]
  # A process may hold shards that are not neighbours.
  found = sharding.shares(np.array([[[0]], [[1]], [[0]], [[1]]]))
  assert found == [({0, 2}, {0}), ({1, 3}, {1})]


@pytest.mark.parametrize(
  "process_DFT",
  [
    grid(2, 1, 3, per_process=2),  # process 1 has half of both
    np.array([[[0]], [[0]], [[1]]]),  # not as many each
  ],
)
def test_parts_that_are_no_parts_are_refused(process_DFT):
  with pytest.raises(ValueError, match="only partly agree"):
    sharding.shares(process_DFT)


def test_one_process_reads_all_rows():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  assert sharding.batch_share(mesh) == (0, 1)


def test_an_axis_may_take_part_of_an_axis_of_the_chips(monkeypatch):
  def refuse(*arguments, **settings):
    raise NotImplementedError("Failed to find assignment")

  monkeypatch.setattr(jax, "make_mesh", refuse)
  mesh = sharding.make_mesh(MeshConfig(data=4, tensor=2))
  assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}


def test_processes_with_other_rows_are_named(monkeypatch):
  mesh = sharding.make_mesh(MeshConfig(data=8))
  batch = {"bytes": np.arange(16, dtype=np.int32).reshape(8, 2)}
  placed = sharding.to_device(batch, mesh)
  other = None  # what process 1 has; None = the same

  def gather(mine):
    nonlocal other
    other = mine.copy() if other is None else other
    return np.stack([mine, other])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(sharding.multihost_utils, "process_allgather", gather)
  sharding.check_replicas(placed)
  other[3, 1] += 1
  with pytest.raises(ValueError, match=r"processes \[0, 1\] hold the same"):
    sharding.check_replicas(placed)
  other[:, 0] += 8  # another part of the batch: nothing to compare
  sharding.check_replicas(placed)
