"""What one device can do, from the makers' data sheets: one record a device.

A device is what JAX calls one: a chip, but of TPU v4 ahead of time and of TPU7x
each of a chip's two cores. Sources: cloud.google.com/tpu/docs (the pages v4,
v5e, v5p, v6e and tpu7x) and NVIDIA's data sheets of A100, H100 and H200, whose
figures "with sparsity" are halved.
"""

import dataclasses
import os

import jax

from aunet_jax.terminal import EXIT_BAD_INPUT, EXIT_FAILED, Failure

GIB = 2**30


class DeviceError(Failure):
  """JAX finds no device."""


def present() -> list[jax.Device]:
  """The devices that a run has.

  Raises: DeviceError where there are none, as where JAX_PLATFORMS names a kind
    that this machine lacks.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # without any CUDA plugin
    reason = (str(error).splitlines() or ["no such device is here"])[0]
    platforms = os.environ.get("JAX_PLATFORMS")
    failure = DeviceError(
      f"JAX finds no device with JAX_PLATFORMS={platforms}: {reason}. Unset "
      f"it, or set it to cpu, to use what is here."
      if platforms
      else f"JAX finds no device: {reason}"
    )
    in_use = "already in use" in str(error)
    failure.status = EXIT_FAILED if in_use else EXIT_BAD_INPUT
    raise failure from error


@dataclasses.dataclass(frozen=True)
class Device:
  """None where no source says it."""

  name: str  # part of JAX's `device_kind`, in lower case
  flops: float  # dense bfloat16 FLOP/s
  memory_bandwidth: float  # bytes/s of its main memory
  # Bytes/s to all other devices together, out and in added, as sheets say it.
  link_bandwidth: float | None
  # What XLA says is there for a program.
  memory: float | None = None
  # Cycles/s in which its compiler estimates: the peak over the FLOPs of a cycle
  # of its matrix units. Where the compiler gives none, a cycle is a nanosecond.
  clock: float = 1e9


# The first whose name is part of a device's kind is that device.
DEVICES = (
  Device("h200 nvl", 835e12, 4.8e12, 900e9),
  Device("h200", 989e12, 4.8e12, 900e9),
  Device("h100 nvl", 835e12, 3.9e12, 600e9),
  Device("h100 pcie", 756e12, 2.0e12, 600e9),
  # memory: the share JAX takes unless told otherwise
  Device("h100", 989e12, 3.35e12, 900e9, 0.75 * 84929347584),
  Device("a100-sxm4-40gb", 312e12, 1.555e12, 600e9),
  Device("a100-pcie-40gb", 312e12, 1.555e12, 600e9),
  Device("a100 80gb pcie", 312e12, 1.935e12, 600e9),
  Device("a100", 312e12, 2.039e12, 600e9),
  # clock: with matrix units as v6e's
  Device("tpu7x", 2307e12 / 2, 7.38e12 / 2, 1200e9 / 2, 94.75 * GIB, 2.2e9),
  Device("v6e", 918e12, 1.64e12, 800e9, 31.25 * GIB, 1.75e9),
  Device("v6 lite", 918e12, 1.64e12, 800e9, 31.25 * GIB, 1.75e9),
  Device("v5e", 197e12, 0.819e12, 400e9, 15.75 * GIB, 1.5e9),
  Device("v5 lite", 197e12, 0.819e12, 400e9, 15.75 * GIB, 1.5e9),
  # v5p names itself so
  Device("v5", 459e12, 2.765e12, 1200e9, 95.74 * GIB, 1.75e9),
  # A running v4 joins its two cores; ahead of time each is a device, and XLA
  # then gives a program half of the chip's memory.
  Device("v4", 275e12, 1.228e12, 300e9, 15.25 * GIB, 1.05e9),
)


def find(device: jax.Device) -> Device | None:
  """The record of a device; None where there is none."""
  kind = device.device_kind.lower()
  return next((known for known in DEVICES if known.name in kind), None)


def memory_limit(device: jax.Device) -> float | None:
  """Bytes a program may use on `device`; None where nothing says it."""
  known = find(device)
  return None if known is None else known.memory


def peak_flops(device: jax.Device) -> float | None:
  """Dense bfloat16 FLOP/s of `device`; None where we do not know it."""
  known = find(device)
  return None if known is None else known.flops
