"""The device mesh, and the one table that maps logical dims to its axes.

The model names logical dims ("batch", "embed", "heads", …); only this file
knows the mesh axes: `data` splits the batch, `fsdp` splits the batch and the
parameters, `tensor` splits heads and feed-forward columns.
"""

import functools
import hashlib

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aunet_jax.aunet import devices as devices_lib
from aunet_jax.config import MeshConfig

Batch = dict[str, np.ndarray]

AXES = ("data", "fsdp", "tensor")

BATCH_AXES = ("data", "fsdp")

# Logical dim -> mesh axes. The 258-row byte table stays whole: splitting it
# makes XLA rebuild it on every device at every look-up.
RULES = (
  ("batch", BATCH_AXES),
  ("length", None),
  ("embed", "fsdp"),  # residual width of parameters
  ("transition", "tensor"),  # output width of pooling and upsampling
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("layers", None),
  ("offset", None),
  ("taps", None),
  ("vocab", None),
  ("ngram", "fsdp"),  # rows of hash tables, which may be large
  ("activation", None),  # residual width of activations
)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
  """Sizes of (data, fsdp, tensor); the one None takes the devices left.

  Raises: ValueError where the sizes do not multiply to `num_devices`.
  """
  sizes = [config.data, config.fsdp, config.tensor]
  named = dict(zip(AXES, sizes, strict=True))
  for axis, size in named.items():
    if size is not None and size < 1:
      raise ValueError(f"mesh.{axis}={size} must be a positive number or None.")
  free = [axis for axis, size in named.items() if size is None]
  if len(free) > 1:
    raise ValueError(f"mesh: only one of {' and '.join(free)} may be None.")
  fixed = int(np.prod([size for size in sizes if size is not None]))
  if free:
    if num_devices % fixed:
      raise ValueError(
        f"mesh {named} does not divide {num_devices} devices: {fixed} devices "
        f"are fixed and {num_devices} is not a multiple of it."
      )
    sizes[sizes.index(None)] = num_devices // fixed
  elif fixed != num_devices:
    raise ValueError(
      f"mesh {named} needs {fixed} devices but there are {num_devices}; set "
      f"one of them to None to take what is left."
    )
  return tuple(sizes)


def count_slices(devices) -> int:
  """TPU slices the devices belong to; 1 for other devices."""
  # A lone slice's devices have no index.
  slices = {
    getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"
  }
  return max(1, len(slices))


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """A `data` x `fsdp` x `tensor` mesh over all (or the given) devices.

  Over several TPU slices, `data` alone crosses the network between them; the
  other axes stay inside a slice.

  Raises: ValueError where the sizes do not fit the devices or the slices.
  """
  devices = devices_lib.present() if devices is None else devices
  shape = mesh_shape(config, len(devices))
  num_slices = count_slices(devices)
  if num_slices > 1:
    data, fsdp, tensor = shape
    if data % num_slices:
      raise ValueError(
        f"mesh.data={data} must be a multiple of the {num_slices} slices: "
        f"fsdp={fsdp} and tensor={tensor} stay inside a slice of "
        f"{len(devices) // num_slices} devices."
      )
    make_grid = functools.partial(
      mesh_utils.create_hybrid_device_mesh,
      (data // num_slices, fsdp, tensor),
      (num_slices, 1, 1),
      devices,
    )
  else:
    make_grid = functools.partial(_one_slice, shape, devices)
  try:
    grid = make_grid()
  except NotImplementedError:
    # By itself JAX gives an axis of the mesh complete axes of a TPU's torus
    # alone, and tensor=2 finds none on 16 x 16 chips. A part of one will do.
    grid = make_grid(allow_split_physical_axes=True)
  # Auto axes: Linen layers raise under the newer explicit sharding types.
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _one_slice(
  shape, devices, allow_split_physical_axes: bool = False
) -> np.ndarray:
  if not allow_split_physical_axes:  # JAX's own choice, which differs by chip
    axis_types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    return mesh.devices
  return mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over `data` and `fsdp`; everything else whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def num_batch_shards() -> int:
  """Devices the batch is split over in the mesh of the current context."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return int(np.prod([sizes.get(axis, 1) for axis in BATCH_AXES]))


def row_axes(num_rows: int) -> tuple[str, ...] | None:
  """Axes of the context's mesh that rows are split over; None: they are not.

  Rows that do not divide over the devices are computed on each.
  """
  axes = jax.sharding.get_abstract_mesh().axis_names
  axes = tuple(axis for axis in BATCH_AXES if axis in axes)
  return None if num_rows % num_batch_shards() else axes


def axis_of(name: str) -> str | None:
  """The axis of the context's mesh that splits a logical dim."""
  axis = dict(RULES)[name]
  return axis if axis in jax.sharding.get_abstract_mesh().axis_names else None


def platform(mesh: Mesh | None = None) -> str:
  """cpu, gpu or tpu: the devices of a mesh, by default of the context's.

  Without any, the devices JAX puts arrays on by default.
  """
  mesh = (
    jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
  )
  device = mesh.abstract_device
  name = jax.default_backend() if device is None else device.platform
  return "gpu" if name in ("cuda", "rocm") else name


def unbox(tree):
  """Strips Linen's partitioning metadata.

  `nn.unbox` also applies sharding constraints, which fails on abstract values.
  """

  def is_box(x):
    return isinstance(x, nn.Partitioned)

  return jax.tree.map(
    lambda x: x.unbox(apply_constraint=False) if is_box(x) else x,
    tree,
    is_leaf=is_box,
  )


def tree_shardings(boxed, mesh: Mesh):
  """NamedSharding of every leaf of a tree of boxed (logical) values."""
  # An optimizer that leaves a parameter out masks the value inside its box.
  boxed = jax.tree.map(
    lambda x: x if jax.tree.leaves(x) else unbox(x),
    boxed,
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )
  specs = nn.get_partition_spec(boxed)
  return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def placed(shapes, shardings):
  """Shapes with the shardings their arrays will have; nothing is allocated."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    shapes,
    shardings,
  )


# ----- which process reads which rows ---------------------------------------


def shares(process_DFT: np.ndarray) -> list[tuple[set[int], set[int]]]:
  """The parts of a batch that processes read: (row shards, processes) each.

  Processes whose devices hold the same row shards read the same part, as
  where `tensor` spans several of them.

  Args: process_DFT: the process of every device of the mesh.
  Raises: ValueError where processes hold some of the same shards, but not all.
  """
  process_RT = process_DFT.reshape(-1, process_DFT.shape[-1])
  shards_of: dict[int, set[int]] = {}
  for shard, processes in enumerate(process_RT):
    for process in processes.tolist():
      shards_of.setdefault(process, set()).add(shard)
  parts: dict[frozenset, set[int]] = {}
  for process, shards in shards_of.items():
    parts.setdefault(frozenset(shards), set()).add(process)
  found = sorted(
    ((set(s), p) for s, p in parts.items()), key=lambda x: min(x[0])
  )
  sizes = {len(shards) for shards, _ in found}
  if len(sizes) > 1 or sum(len(s) for s, _ in found) != len(process_RT):
    raise ValueError(
      f"mesh data={process_DFT.shape[0]}, fsdp={process_DFT.shape[1]}, "
      f"tensor={process_DFT.shape[2]} gives processes batch shards that only "
      f"partly agree: { {p: sorted(s) for p, s in shards_of.items()} }. Use a "
      f"tensor that divides the devices of a process, or is a multiple of them."
    )
  return found


@functools.cache
def batch_share(mesh: Mesh) -> tuple[int, int]:
  """Which part of every batch this process reads, of how many; see `shares`."""
  process_DFT = np.vectorize(lambda device: device.process_index)(mesh.devices)
  found = shares(process_DFT)
  me = jax.process_index()
  return next(i for i, (_, p) in enumerate(found) if me in p), len(found)


def to_device(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a global batch, placed on its devices.

  Args: batch: the rows of `batch_share`.
  """
  where = batch_sharding(mesh)
  _, count = batch_share(mesh)
  return {
    name: jax.make_array_from_process_local_data(
      where, value, (value.shape[0] * count, *value.shape[1:])
    )
    for name, value in batch.items()
  }


def check_replicas(batch: dict[str, jax.Array]) -> None:
  """Compares the rows of processes that must hold the same ones.

  Raises: ValueError, on all processes, where they differ.
  """
  if jax.process_count() == 1:
    return
  digests = {}  # first row of a shard -> hash
  for name in sorted(batch):
    shards = {x.index[0].start or 0: x for x in batch[name].addressable_shards}
    for first, shard in shards.items():
      digest = digests.setdefault(first, hashlib.blake2b(digest_size=4))
      digest.update(np.asarray(shard.data).tobytes())
  mine = [
    (first, int.from_bytes(digest.digest(), "little", signed=True))
    for first, digest in digests.items()
  ]
  found_PS2 = multihost_utils.process_allgather(np.array(mine, np.int32))
  for first in np.unique(found_PS2[:, :, 0]):
    process, shard = np.nonzero(found_PS2[:, :, 0] == first)
    if len(np.unique(found_PS2[process, shard, 1])) > 1:
      raise ValueError(
        f"processes {process.tolist()} hold the same part of each batch but "
        f"read different rows of it: their data indexes differ. Give all "
        f"processes the same sources, or one data.cache_dir."
      )
