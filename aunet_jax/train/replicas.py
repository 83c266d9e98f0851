"""Finding hardware that computes other numbers than its replicas do.

Devices that hold the same part of a parameter run the same program on the same
numbers, so their copies are equal to the last bit. A chip or host that is
broken without saying so shows as a copy that is not.

Letters: P parameters, D devices.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from aunet_jax.aunet import sharding


@functools.partial(jax.jit, static_argnames=("mesh", "specs"))
def _checksums(leaves: list[jax.Array], mesh: Mesh, specs: tuple) -> jax.Array:
  def of_device(shards):
    return jnp.stack([_checksum(shard) for shard in shards])[:, None]

  sums_PD = jax.shard_map(
    of_device,
    mesh=mesh,
    in_specs=(list(specs),),
    out_specs=PartitionSpec(None, mesh.axis_names),
    check_vma=False,  # that copies are equal is what is asked
  )(leaves)
  return jax.lax.with_sharding_constraint(sums_PD, sharding.replicated(mesh))


def checksums(params: dict, mesh: Mesh) -> np.ndarray:
  """uint32 (P, D): of what each device holds of each parameter.

  Each device reads its own copy once; nothing but the sums travels.
  """
  leaves = jax.tree.leaves(params)
  specs = tuple(leaf.sharding.spec for leaf in leaves)
  return np.asarray(_checksums(leaves, mesh, specs))


def _checksum(x: jax.Array) -> jax.Array:
  """Of the bits, each weighted by an odd number of its place."""
  words = jnp.uint8 if x.dtype == jnp.bool_ else f"uint{8 * x.dtype.itemsize}"
  bits = jax.lax.bitcast_convert_type(x, words).reshape(-1).astype(jnp.uint32)
  place = jax.lax.iota(jnp.uint32, bits.size)
  return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


def differing(params: dict, mesh: Mesh) -> list[jax.Device]:
  """Devices whose copy of a parameter is not that of most of its replicas.

  All of them where there is no majority. Every process must call this, and
  all get the same answer.
  """
  if mesh.size == 1:
    return []
  sums_PD = checksums(params, mesh)
  order = {device: i for i, device in enumerate(mesh.devices.flat)}
  found = set()
  for sums_D, leaf in zip(sums_PD, jax.tree.leaves(params), strict=True):
    where = leaf.sharding.devices_indices_map(leaf.shape)
    replicas = collections.defaultdict(list)
    for device, index in where.items():
      replicas[str(index)].append(device)
    for devices in replicas.values():
      counts = collections.Counter(int(sums_D[order[d]]) for d in devices)
      usual, count = counts.most_common(1)[0]
      if 2 * count <= len(devices):
        found.update(devices if len(counts) > 1 else ())
      else:
        found.update(d for d in devices if sums_D[order[d]] != usual)
  return sorted(found, key=lambda device: device.id)
