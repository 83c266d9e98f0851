"""Copies of parameters that differ are found, and nothing of them is saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aunet_jax.aunet import sharding
from aunet_jax.config import MeshConfig
from aunet_jax.train import loop, replicas
from aunet_jax.workdir import layout
from tests import tiny_runs


def placed(mesh, changed: dict[int, int] | None = None) -> dict:
  """Three parameters, with one bit flipped on the devices in `changed`."""
  changed = changed or {}
  rng = np.random.default_rng(0)
  shapes = {
    "whole": ((3, 5), np.float32, PartitionSpec()),
    "split": ((8, 4), jnp.bfloat16, PartitionSpec("fsdp", None)),
    "count": ((), np.int32, PartitionSpec()),
  }
  tree = {}
  for name, (shape, dtype, spec) in shapes.items():
    value = np.asarray(rng.normal(size=shape), dtype)
    where = NamedSharding(mesh, spec)
    parts = []
    for device, index in where.addressable_devices_indices_map(shape).items():
      part = np.array(value[index])
      if name == "split" and device.id in changed:
        part.view(np.uint16).flat[changed[device.id]] ^= 1
      parts.append(jax.device_put(part, device))
    tree[name] = jax.make_array_from_single_device_arrays(shape, where, parts)
  return tree


def found(mesh, changed=None) -> list[int]:
  return [
    device.id for device in replicas.differing(placed(mesh, changed), mesh)
  ]


def test_the_device_that_differs_is_named():
  mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
  assert found(mesh) == []
  assert found(mesh, {3: 5}) == [3]
  assert found(mesh, {3: 5, 4: 0}) == [3, 4]


def test_of_two_that_differ_both_are_named():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
  ones, others = mesh.devices.reshape(2, 4)
  assert found(mesh, {ones[1].id: 2}) == sorted([ones[1].id, others[1].id])


def test_without_replicas_there_is_nothing_to_compare():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
  assert found(mesh, {2: 0}) == []


def test_two_flips_of_one_bit_show():
  """Also where a plain sum would be the same."""
  mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
  tree = {"x": jax.device_put(jnp.zeros((2, 2)), sharding.replicated(mesh))}
  sums = {int(x) for x in replicas.checksums(tree, mesh).flat}
  tree = {"x": tree["x"].at[0, 1].set(1.0)}
  one = {int(x) for x in replicas.checksums(tree, mesh).flat}
  tree = {"x": jnp.roll(tree["x"], 1, axis=1)}
  tree = jax.device_put(tree, sharding.replicated(mesh))
  other = {int(x) for x in replicas.checksums(tree, mesh).flat}
  assert len(sums | one | other) == 3


def test_a_run_ends_before_it_saves_what_differs(tmp_path, monkeypatch, capsys):
  """A bit of one device's copy is flipped between two steps."""
  corpus = tiny_runs.write_corpus(tmp_path / "corpus")
  real_save, steps = loop.save, []

  def flip(x):
    parts = [np.array(shard.data) for shard in x.addressable_shards]
    parts[2].view(np.uint32).flat[0] ^= 1
    devices = [shard.device for shard in x.addressable_shards]
    arrays = map(jax.device_put, parts, devices)
    return jax.make_array_from_single_device_arrays(
      x.shape, x.sharding, list(arrays)
    )

  def save(setup, step, train_state, position):
    if steps:
      params = jax.tree.map(flip, train_state.params)
      train_state = train_state.replace(params=params)
    steps.append(step)
    real_save(setup, step, train_state, position)

  monkeypatch.setattr(loop, "save", save)
  assert tiny_runs.run(corpus, tmp_path / "run") == 1
  assert "step 6: the parameters on device 2 of process 0" in (
    capsys.readouterr().err
  )
  assert layout.steps(tmp_path / "run") == [3]


@pytest.mark.parametrize(
  "processes, words",
  [
    ([0], "device 0 of process 0"),
    ([0, 0, 1], "devices 0, 1 of process 0; device 2 of process 1"),
  ],
)
def test_devices_are_named_by_process(processes, words):
  class Device:
    def __init__(self, number, process):
      self.id, self.process_index = number, process

  assert loop.named([Device(*pair) for pair in enumerate(processes)]) == words
