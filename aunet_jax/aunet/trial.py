"""Tries attention kernels on a GPU: which are right there, and how fast.

A kernel is taken on a device only after it has shown itself right and fast on
that device (`kernels`). Each candidate (`xla`, and our kernel with each of
`attention_gpu.TILES`) computes values and gradients for a small packed batch of
a stage's own shape. They are compared with the reference in float32 and timed;
the fastest one that is right wins.

*Right*: no position's vector (of the values, or of the gradient of queries,
keys or values) differs from the reference by more than FLOORS of its size, or
twice what `xla` itself differs by in the run's own precision. By position,
since one key too many would hide in an error over the largest entry.

The candidates run in a process of their own (`python -m
aunet_jax.aunet.trial`): a kernel that has never run on a device may end the
process, hang, or leave the device unusable to it.

Letters: B batch, L positions, H query heads, G key/value heads, K head dim.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax import files
from aunet_jax.aunet import attention, attention_gpu

NUM_ROWS = 2
SECONDS = 300  # for one process of a trial; some kernels take long to compile
# Of a vector's size. bfloat16 has 8 bits, and a few roundings add up.
FLOORS = {"float32": 1e-4, "bfloat16": 2e-2}
PARTS = ("values", "query gradient", "key gradient", "value gradient")


class TrialError(Exception):
  """No kernel could be tried."""


class Shape(NamedTuple):
  """What of a stage decides how fast a kernel is, on one device."""

  length: int
  heads: int
  kv_heads: int
  head_dim: int
  window: int | None
  dtype: str


class Tried(NamedTuple):
  """How a candidate did. seconds, errors: None where it failed."""

  seconds: float | None  # of one run, values and gradients
  errors: Mapping[str, float] | None  # the largest, by part of PARTS
  failure: str | None  # one line


# ----- one candidate --------------------------------------------------------


def candidates(shape: Shape) -> tuple[str, ...]:
  """Kernels to try on a GPU, the reference first."""
  if shape.head_dim > attention_gpu.MAX_HEAD_DIM:
    return ("xla",)
  return ("xla", *attention_gpu.TILES)


def batch(shape: Shape) -> tuple[jax.Array, ...]:
  """q_BLHK, k_BLGK, v_BLGK, documents_BL and the gradient of the values.

  About eight documents a row, and padding at its end.
  """
  B, L, K = NUM_ROWS, shape.length, shape.head_dim
  heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
  keys = jax.random.split(jax.random.key(0), 4)
  q_BLHK, k_BLGK, v_BLGK, do_BLHK = (
    jax.random.normal(key, (B, L, number, K), jnp.dtype(shape.dtype))
    for key, number in zip(keys, heads, strict=True)
  )
  cuts = np.sort(np.random.default_rng(0).integers(1, L, (B, 8)), axis=1)
  documents_BL = (np.arange(L) >= cuts[:, :, None]).sum(axis=1) + 1
  documents_BL[:, L - L // 50 :] = 0
  return q_BLHK, k_BLGK, v_BLGK, jnp.asarray(documents_BL, jnp.int32), do_BLHK


def with_gradients(kernel: Callable, window: int | None) -> Callable:
  """A function of `batch`: the values and the gradients of q, k and v."""

  def run(q_BLHK, k_BLGK, v_BLGK, documents_BL, do_BLHK):
    o_BLHK, pull = jax.vjp(
      lambda *qkv: kernel(*qkv, documents_BL, window), q_BLHK, k_BLGK, v_BLGK
    )
    return o_BLHK, *pull(do_BLHK)

  return run


def reference(shape: Shape, inputs: Sequence[jax.Array]) -> list[np.ndarray]:
  """What a candidate should give: the plain path, in float32 throughout."""
  exact = [
    x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    for x in inputs
  ]
  with jax.default_matmul_precision("highest"):
    found = jax.jit(with_gradients(attention.blockwise, shape.window))(*exact)
  return [np.asarray(x) for x in found]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
  """The largest of any vector, over its size; NaN where there is one.

  A vector smaller than most is measured by the middle size: the first query of
  a document, which sees one key, has a gradient of 0.
  """
  size_BLH = np.linalg.norm(expected, axis=-1)
  size_BLH = np.maximum(size_BLH, np.median(size_BLH))
  off_BLH = np.linalg.norm(found.astype(np.float32) - expected, axis=-1)
  return float((off_BLH / size_BLH).max())


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
  """The shortest of a few runs, after two that warm up."""
  times = []
  for _ in range(2 + repeats):
    began = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - began)
  return min(times[2:])


def try_kernel(
  kernel: Callable,
  shape: Shape,
  inputs: Sequence[jax.Array],
  expected: Sequence[np.ndarray],
  timer: Callable[[Callable[[], object]], float] = seconds,
) -> Tried:
  """Compiles, runs and times a candidate. It raises nothing."""
  try:
    run = with_gradients(kernel, shape.window)
    program = jax.jit(run).lower(*inputs).compile()
    found = [np.asarray(x) for x in program(*inputs)]
    errors = map(difference, found, expected)
    return Tried(
      timer(lambda: program(*inputs)),
      dict(zip(PARTS, errors, strict=True)),
      None,
    )
  except Exception as error:  # compilers raise what they like
    lines = str(error).strip().splitlines()
    return Tried(None, None, f"{type(error).__name__}: {(lines or [''])[0]}")


# ----- the choice -----------------------------------------------------------


def wrong_part(tried: Tried, dtype: str, base: Tried) -> str | None:
  """The part of PARTS that differs too much, if one does.

  Args: base: how `xla` did.
  """
  for part, error in tried.errors.items():
    allowed = FLOORS[dtype]
    if base.errors is not None:
      allowed = max(allowed, 2 * base.errors[part])
    if not error <= allowed:
      return part
  return None


def choose(dtype: str, tried: Mapping[str, Tried]) -> tuple[str, str]:
  """(kernel, why): the fastest that is right, else xla."""
  base, rejected, right = tried["xla"], {}, {}
  for name, one in tried.items():
    if name == "xla":
      continue
    if one.failure is not None:
      rejected.setdefault(f"failed: {one.failure[:80]}", []).append(name)
      continue
    part = wrong_part(one, dtype, base)
    if part is None:
      right[name] = one.seconds
    else:
      reason = f"wrong: {part} off by {one.errors[part]:.2g} of its size"
      rejected.setdefault(reason, []).append(name)
  if base.failure is None:
    right["xla"] = base.seconds
  best = min(right, key=right.get, default="xla")
  why = [
    f"{1e3 * right[name]:.3g} ms"
    if name == best
    else f"{name} {1e3 * right[name]:.3g}"
    for name in sorted(right, key=right.get)
  ]
  if base.failure is not None:
    why.append(f"xla failed: {base.failure[:80]}")
  for reason, names in rejected.items():
    why.append(f"{' and '.join(names)} {reason}")
  return best, ", ".join(why)


# ----- a process of its own -------------------------------------------------


def serve(request: str, timer: Callable = seconds) -> Iterator[str]:
  """What the other process writes: a line when it is ready, then one for each
  candidate, up to the first that fails, after which nothing can be trusted.

  Args: request: JSON of {"shape": Shape, "kernels": names, "device": kind}.
  Raises: TrialError where JAX has another device here: it takes the CPU where
    it cannot have the GPU.
  """
  values = json.loads(request)
  kind = jax.local_devices()[0].device_kind
  if kind != values["device"]:
    raise TrialError(f"the trial has {kind!r}, not {values['device']!r}")
  shape = Shape(*values["shape"])
  inputs = batch(shape)
  expected = reference(shape, inputs)
  yield json.dumps({"ready": True})
  for name in values["kernels"]:
    one = try_kernel(attention.KERNELS[name], shape, inputs, expected, timer)
    yield json.dumps({"kernel": name, **one._asdict()})
    if one.failure is not None:
      return


def visible(named: str | None, number: int) -> str:
  """What lets a process see the `number`-th GPU of this one alone.

  Args: named: CUDA_VISIBLE_DEVICES of this process.
  """
  names = [x.strip() for x in (named or "").split(",") if x.strip()]
  return names[number] if number < len(names) else str(number)


def _start(shape: Shape, names: Sequence[str]) -> tuple[list[dict], str]:
  """The lines of one process, and how it ended where that was not well."""
  package = str(Path(__file__).parents[2])
  path = os.environ.get("PYTHONPATH")
  environment = os.environ | {
    "PYTHONPATH": package + (os.pathsep + path if path else ""),
    # This process may hold most of the device's memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "CUDA_VISIBLE_DEVICES": visible(
      os.environ.get("CUDA_VISIBLE_DEVICES"),
      jax.local_devices()[0].local_hardware_id,
    ),
  }
  kind = jax.local_devices()[0].device_kind
  request = json.dumps({"shape": shape, "kernels": names, "device": kind})
  try:
    done = subprocess.run(
      [sys.executable, "-m", "aunet_jax.aunet.trial"],
      input=request,
      capture_output=True,
      text=True,
      timeout=SECONDS,
      env=environment,
    )
    out, end = done.stdout, ""
    if done.returncode:
      last = (done.stderr.strip().splitlines() or [""])[-1]
      end = f"ended with status {done.returncode}: {last}"
  except subprocess.TimeoutExpired as error:
    out = error.stdout or b""
    out = out if isinstance(out, str) else out.decode(errors="replace")
    end = f"not done in {SECONDS} s"
  lines = [line for line in out.splitlines() if line.startswith("{")]
  return [files.parse_json(line) for line in lines], end


def measure(
  shape: Shape, start: Callable[..., tuple[list[dict], str]] = _start
) -> dict[str, Tried]:
  """Tries every candidate on the first device of this process.

  Args: start: `_start`, or what stands in for it.
  Raises: TrialError where not even the reference ran there.
  """
  names, tried = list(candidates(shape)), {}
  while names:
    try:
      lines, end = start(shape, names)
    except (OSError, ValueError) as error:
      raise TrialError(str(error)) from error
    if not lines:
      raise TrialError(end or "it said nothing")
    for line in lines[1:]:
      name = line.pop("kernel")
      tried[name] = Tried(**line)
      names.remove(name)
    if names and (end or len(lines) == 1):
      tried[names.pop(0)] = Tried(None, None, end or "it gave no answer")
  return tried


if __name__ == "__main__":
  for answer in serve(sys.stdin.read()):
    print(answer, flush=True)
