"""What every benchmark needs: times, a matmul ceiling, the machine's name."""

import importlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def compared_with(package: str):
  """A package whose speed ours is compared with.

  Raises:
    SystemExit: it is not installed.
  """
  try:
    return importlib.import_module(package)
  except ImportError:
    raise SystemExit(
      f"This compares with the package {package}, which is not installed: "
      f"pip install -e '.[bench]'"
    ) from None


def machine(module: str) -> dict:
  device = jax.devices()[0]
  return {
    "command": shlex.join(
      ["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]
    ),
    "platform": device.platform,
    "device": device.device_kind,
    "machine": platform.processor() or platform.machine(),
    "cpu_count": os.cpu_count(),
    "jax": jax.__version__,
  }


def seconds(function: Callable, *arrays, repeats: int = 5) -> float:
  """Median of several calls after one that warms up."""
  jax.block_until_ready(function(*arrays))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    times.append(time.perf_counter() - began)
  return float(np.median(times))


def matmul_flops(dtype="float32", size: int | None = None) -> float:
  """Best FLOP/s of a square product: the ceiling of this run."""
  if size is None:
    size = 2048 if jax.default_backend() == "cpu" else 8192
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  product = jax.jit(jnp.matmul)
  best = min(seconds(product, x, x, repeats=1) for _ in range(5))
  return 2 * size**3 / best


def memory_bandwidth() -> float:
  """Bytes per second of reading one large array, best of several."""
  size = 2**26 if jax.default_backend() == "cpu" else 2**28
  x = jnp.ones((size,), jnp.float32)
  total = jax.jit(jnp.sum)
  return 4 * size / min(seconds(total, x, repeats=1) for _ in range(5))
