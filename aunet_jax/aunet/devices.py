"""What one device can do: FLOP/s and memory, from the makers' data sheets."""

import jax

GIB = 2**30
# What XLA says is there for a program, of the memory of one device.
_MEMORY_BYTES = (
  ("v5 lite", 15.75 * GIB),
  ("v6 lite", 31.25 * GIB),
  ("v5", 95.74 * GIB),
  ("v4", 15.25 * GIB),  # a topology's v4 device is one core of the chip's two
  ("h100", 0.75 * 84929347584),  # the share JAX takes unless told otherwise
)
# Dense bfloat16 FLOP/s of one device, from the makers' data sheets.
_PEAK_FLOPS = (
  ("h100", 989e12),
  ("h200", 989e12),
  ("a100", 312e12),
  ("v6e", 918e12),
  ("v6 lite", 918e12),
  ("v5e", 197e12),
  ("v5 lite", 197e12),
  ("v5p", 459e12),
  ("v5", 459e12),  # how v5p devices name themselves
  ("v4", 275e12),
)


def memory_limit(device: jax.Device) -> float | None:
  """Bytes a program may use on `device`; None where nothing says it."""
  kind = device.device_kind.lower()
  for name, size in _MEMORY_BYTES:
    if name in kind:
      return size
  return None


def peak_flops(device: jax.Device) -> float | None:
  """Dense bfloat16 FLOP/s of `device`; None where we do not know it."""
  kind = device.device_kind.lower()
  for name, flops in _PEAK_FLOPS:
    if name in kind:
      return flops
  return None
