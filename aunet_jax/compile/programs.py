"""Programs of a run, compiled for devices that need not be here.

Arguments are shapes with shardings; nothing is allocated and nothing runs.
"""

import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from aunet_jax.aunet import network, sharding
from aunet_jax.aunet.devices import GIB, present
from aunet_jax.config import Config
from aunet_jax.data import packing
from aunet_jax.data.rows import make_rows
from aunet_jax.generate import decode, generator, prefill, sampling
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import optimizer, state, step

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 1 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class DoesNotFit(Exception):
  """The compiler found no room; `needed_bytes` None where it did not say."""

  def __init__(self, needed_bytes: float | None):
    super().__init__(needed_bytes)
    self.needed_bytes = needed_bytes


# ----- devices --------------------------------------------------------------


def compile_elsewhere(topology: str) -> None:
  """Sets this process up to compile for a topology; call it before any device
  is asked for. Compiling asks no accelerator, and several may compile at once.
  """
  jax.config.update("jax_platforms", "cpu")
  if topology.startswith("h100"):
    flags = os.environ.get("XLA_FLAGS", "")  # no kernel can be timed here
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    return
  for key, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),
    ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ("TPU_WORKER_HOSTNAMES", "localhost"),
    ("TPU_WORKER_ID", "0"),
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
  ):
    os.environ.setdefault(key, value)


def topology_devices(name: str | None, num_slices: int = 1) -> list:
  """Devices to compile for (after `compile_elsewhere`); None: this machine's.

  Raises: ValueError where the topology, or what compiles for it, is unknown.
  """
  if name is None:
    if num_slices > 1:
      raise ValueError("--slices needs a --topology; this machine is one.")
    return present()
  kind, _, size = name.partition(":")
  if kind == "h100":
    return _h100s(name, size or "1", num_slices)
  options = {"num_slices": num_slices} if num_slices > 1 else {}
  if size in ("1", "1x1"):
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    ).devices
  except RuntimeError as error:
    if "not installed" in str(error) or "libtpu" in str(error):
      raise ValueError(
        f"--topology={name} needs the TPU compiler, which is not installed: "
        f"pip install -e '.[tpu]'"
      ) from None
    raise ValueError(
      f"--topology={name} is none the TPU compiler knows: {error}. Name the "
      f"generation and the chips along each side, as v5e:4x4, v6e:16x16, "
      f"v5p:4x4x4 or tpu7x:2x2x1."
    ) from None


def _h100s(name: str, size: str, num_hosts: int) -> list:
  if not size.isdigit() or int(size) < 1:
    raise ValueError(f"--topology={name} must be h100:N, N GPUs of one host.")
  try:
    return topologies.get_topology_desc(
      platform="cuda",
      topology_name="",
      target_config=_H100,
      topology=f"1x{num_hosts}x{size}",
    ).devices
  except (RuntimeError, NotImplementedError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(
      f"--topology={name} needs JAX's CUDA plugin, pip install -e '.[cuda]', "
      f"which does not answer: {reason}"
    ) from None


# ----- programs -------------------------------------------------------------


def _compile(lowered):
  """Raises: DoesNotFit."""
  try:
    return lowered()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) or "Shared mem" in str(error):
      raise
    needed = re.search(r"([\d.]+)([GM]) of [\d.]+G hbm", str(error))
    needed = needed or re.search(r"\(([\d.]+)([GM])\) exceeds", str(error))
    unit = {"G": GIB, "M": 2**20}
    size = float(needed[1]) * unit[needed[2]] if needed else None
    raise DoesNotFit(size) from None


def compile_train(config: Config, mesh):
  """The training step as `train` compiles it, for abstract arguments."""
  tx = optimizer.make_optimizer(config)
  abstract, shardings = state.abstract_state(config.model, tx, mesh)
  batch = packing.abstract_batch(
    config.train.batch_size,
    config.model.capacities[0],
    sizes_targets=step.sizes_targets(config),
    sharding=sharding.batch_sharding(mesh),
  )
  return _compile(
    lambda: step.compile_step(
      config, tx, mesh, shardings, sharding.placed(abstract, shardings), batch
    )
  )


def decode_schedule(config: Config, mesh, num_rows: int) -> decode.Schedule:
  """That `generate` takes for so many rows."""
  name = generator.default_schedule(num_rows, mesh)
  return decode.make_schedule(name, num_rows, config.model)


def compile_decode(config: Config, mesh, num_rows: int, num_bytes: int):
  """A call of the decoding loop, with `num_bytes` of history in its caches."""
  model = config.model
  splitter = Splitter(model.rules, config.has_roles)
  boxed = network.abstract_params(model)
  params = sharding.placed(
    sharding.unbox(boxed), sharding.tree_shardings(boxed, mesh)
  )
  rows = make_rows([b""] * num_rows, splitter, model.num_stages)
  slots = prefill.cache_sizes(model, (0,) * model.num_stages, num_bytes)
  choice = sampling.make_choice(
    sampling.Sampling(), [b""] * num_rows, [0] * num_rows, range(num_rows)
  )
  short = model.with_attention("xla").with_capacities(rows.capacities)

  def make_weights(params):
    return network.make_weights(params, model)

  def start(params):
    prefilled, _ = prefill.prefill(
      params, make_weights(params), *rows[:4], config=short, slots=slots
    )
    limit_B = np.full((num_rows,), num_bytes, np.int32)
    return decode.start(
      prefilled, rows, limit_B, choice, decode.num_phases(model)
    )

  schedule = decode_schedule(config, mesh, num_rows)
  decode_state = jax.eval_shape(start, params)
  decode_state = sharding.placed(
    decode_state, generator.state_shardings(decode_state, mesh)
  )
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    made = jax.jit(make_weights).lower(params).compile()
    weights = sharding.placed(
      jax.eval_shape(make_weights, params), made.output_shardings
    )
    turns = jax.ShapeDtypeStruct(
      (), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    return _compile(
      lambda: generator.run_program.lower(
        weights,
        decode_state,
        turns,
        config=model,
        splitter_step=splitter.step,
        choose=sampling.choose,
        schedule=schedule,
        max_turns=generator.MAX_TURNS,
      ).compile()
    )


def memory(compiled, limit: float | None) -> dict:
  """Bytes of one device. needed: all that is there at once with the program."""
  sizes = compiled.memory_analysis()
  result = {
    "arguments": sizes.argument_size_in_bytes,
    "outputs": sizes.output_size_in_bytes,
    "outputs_in_place": sizes.alias_size_in_bytes,
    "temporary": sizes.temp_size_in_bytes,
  }
  result["needed"] = (
    result["arguments"]
    + result["outputs"]
    - result["outputs_in_place"]
    + result["temporary"]
  )
  result["available"] = limit
  result["margin"] = None if limit is None else 1 - result["needed"] / limit
  return result
