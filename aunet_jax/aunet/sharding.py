"""The device mesh, and the one table that maps logical dims to its axes.

The model names logical dims ("batch", "embed", "heads", …); only this file
knows the mesh axes: `data` splits the batch, `fsdp` splits the batch and the
parameters, `tensor` splits heads and feed-forward columns.
"""

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
  ("vocab", None),
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
  devices = jax.devices() if devices is None else devices
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
    grid = mesh_utils.create_hybrid_device_mesh(
      (data // num_slices, fsdp, tensor), (num_slices, 1, 1), devices
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
  # Auto axes: Linen layers raise under the newer explicit sharding types.
  return jax.make_mesh(
    shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
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


def to_device(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a global batch, placed on its devices."""
  where = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(where, value)
    for name, value in batch.items()
  }
