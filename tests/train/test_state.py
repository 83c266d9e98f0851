"""Where a training state lives."""

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax import config as config_lib
from aunet_jax.aunet import sharding
from aunet_jax.train import optimizer, state
from tests.tiny_runs import new_params, tiny


def test_no_large_parameter_is_replicated_by_accident():
  config = tiny()
  tx = optimizer.make_optimizer(config)
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=1, fsdp=4, tensor=2))
  abstract, shardings = state.abstract_state(config.model, tx, mesh)
  whole = []
  for (path, leaf), where in zip(
    jax.tree_util.tree_leaves_with_path(abstract),
    jax.tree.leaves(shardings),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    table = "embed" in name or "head" in name  # 258 rows: whole on purpose
    if leaf.size >= 1024 and where.is_fully_replicated and not table:
      whole.append(name)
  assert not whole


def test_a_checkpoint_keeps_the_model_apart_from_the_rest():
  counters = [jnp.int32(n) for n in (7, 1, 2)]
  before = state.TrainState(counters[0], {"w": 1}, {"mu": 2}, *counters[1:])
  items = before.items()
  assert items["params"] == {"w": 1} and "params" not in items["optimizer"]
  assert state.TrainState.from_items(items) == before


def test_a_seed_decides_the_parameters_and_every_array_is_its_own():
  config = tiny(**{"optimizer.average": 0.9})
  tx = optimizer.make_optimizer(config)
  mesh = sharding.make_mesh(config.mesh)
  first, second = (
    state.create_state(config.model, tx, mesh, seed) for seed in (0, 1)
  )
  expected = new_params(config.model, jax.random.key(1))
  jax.tree.map(np.testing.assert_allclose, second.params, expected)
  assert (first.params["embed"] != second.params["embed"]).any()
  # The step is given the memory of all of them, so none may be two's.
  where = [
    x.addressable_shards[0].data.unsafe_buffer_pointer()
    for x in jax.tree.leaves((first.params, first.opt_state.average))
  ]
  assert len(set(where)) == len(where)
