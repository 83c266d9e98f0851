"""The attention kernels of a run: on GPUs, those that a trial there chose.

`auto` means the platform's kernel (`attention`). On GPUs it is resolved once,
before a run starts, to the fastest kernel that was right on that very device
(`trial`); whatever goes wrong there, it is `xla`, and the line says why. How
the candidates did is kept in the user's cache folder, by device, driver,
versions, the kernels' code and the shape, so the next start does not repeat it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import backend

from aunet_jax import files
from aunet_jax.aunet import attention, attention_gpu, sharding, trial
from aunet_jax.aunet.trial import Shape, TrialError, Tried
from aunet_jax.config import ATTENTIONS, ModelConfig

MOST_SCORES = 2**28  # that xla makes for a trial's batch: 1 GiB in float32

# ----- what is kept ---------------------------------------------------------


def _driver() -> str:
  """Of the NVIDIA kernel module, where this machine says it."""
  try:
    return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
  except (OSError, IndexError):
    return ""


def _code() -> str:
  digest = hashlib.blake2b(digest_size=8)
  for module in (attention.__file__, attention_gpu.__file__, trial.__file__):
    digest.update(Path(module).read_bytes())
  return digest.hexdigest()


def setting() -> dict[str, str]:
  """All but the shape that decides how a kernel does on this machine."""
  return {
    "device": jax.local_devices()[0].device_kind,
    "driver": _driver(),
    "runtime": backend.get_backend().platform_version,
    "jax": jax.__version__,
    "flags": os.environ.get("XLA_FLAGS", ""),
    "code": _code(),
  }


def _hash(value) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_kept(path: Path, key: dict, say) -> dict[str, Tried] | None:
  """What was kept for that key; None where nothing of use was."""
  try:
    values = files.parse_json(path.read_text())
    if values["key"] != key:
      raise ValueError("it is of something else")
    tried = {name: Tried(**one) for name, one in values["tried"].items()}
    trial.choose(key["shape"][-1], tried)
    return tried
  except FileNotFoundError:
    return None
  except (
    OSError, ValueError, TypeError, KeyError, AttributeError
  ) as error:  # fmt: skip
    reason = f"{type(error).__name__}: {error}"
    say(f"{path} is damaged and ignored ({reason}); kernels are tried again")
    return None


def _for_now(tried: Mapping[str, Tried]) -> bool:
  """Whether a failure may be gone at the next start: others had the memory."""
  failures = [one.failure or "" for one in tried.values()]
  return any(
    "RESOURCE_EXHAUSTED" in x and "hared mem" not in x for x in failures
  )


def tried_once(
  shape: Shape, here: dict, folder: Path, say, measure=trial.measure
) -> dict[str, Tried]:
  """How the candidates do, as kept in `folder` or measured now.

  Raises: TrialError where nothing is kept, and nothing could be tried.
  """
  key = {**here, "shape": list(shape)}
  path = folder / f"{_hash(key)}.json"
  tried = read_kept(path, key, say)
  if tried is not None:
    return tried
  say(f"trying attention kernels on this GPU, once for {shape}")
  tried = measure(shape)
  if not _for_now(tried):
    values = {name: one._asdict() for name, one in tried.items()}
    try:
      folder.mkdir(parents=True, exist_ok=True)
      files.write_whole(path, json.dumps({"key": key, "tried": values}))
    except OSError as error:
      say(f"how attention kernels did is not kept: {error}")
  return tried


# ----- a run's kernels ------------------------------------------------------


def shapes(model: ModelConfig, tensor: int) -> dict[int, Shape]:
  """Of the stages (from 0) whose kernel is to be found.

  Args: tensor: devices that heads are split over.
  """
  found = {}
  for i, stage in enumerate(model.stages):
    if stage.attention != "auto":
      continue
    length = stage.capacity
    heads = stage.num_heads // tensor

    def scores(length, stage=stage, heads=heads):
      pairs = attention.multiplied_pairs("xla", length, stage.window)
      return trial.NUM_ROWS * heads * pairs

    while length > 1 and scores(length) > MOST_SCORES:
      length //= 2
    found[i] = Shape(
      length,
      heads,
      stage.kv_heads // tensor,
      stage.head_dim,
      stage.window,
      model.dtype,
    )
  return found


def _decide(wanted: dict[int, Shape], say, measure) -> dict[int, str]:
  """Kernel of each stage; says why, in one line."""
  kernels, reasons, done = {}, [], {}
  try:
    here, folder = setting(), files.cache_folder() / "attention"
    for i, shape in wanted.items():
      if shape not in done:
        tried = tried_once(shape, here, folder, say, measure)
        done[shape] = trial.choose(shape.dtype, tried)
      kernels[i], why = done[shape]
      reasons.append(f"stage {i + 1} {kernels[i]} ({why})")
  except (TrialError, OSError, RuntimeError) as error:
    kernels = dict.fromkeys(wanted, "xla")
    reasons = [f"xla: no kernel could be tried ({error})"]
  say(f"attention, auto on this GPU: {'; '.join(reasons)}")
  return kernels


def resolve(
  model: ModelConfig,
  mesh: jax.sharding.Mesh | None = None,
  *,
  kept: dict | None = None,
  say: Callable[[str], None] = print,
  measure: Callable[[Shape], dict[str, Tried]] = trial.measure,
) -> tuple[ModelConfig, dict | None]:
  """The model with a kernel that was tried in place of each `auto`, on GPUs.

  Elsewhere the model as it is: there the platform says what `auto` means.
  Every process of a run must call it; all take what process 0 finds.

  Args:
    mesh: that the model will run on; None = the default device.
    kept: what `resolve` gave beside the model when the run began: a run keeps
      its kernels where nothing has changed, so that a resume is exact.
    say: takes a line; called by process 0 alone.
    measure: `trial.measure`, or what stands in for it.
  Returns: the model, and what to keep of it, JSON-able; None = nothing.
  """
  if sharding.platform(mesh) != "gpu":
    return model, None
  wanted = shapes(model, 1 if mesh is None else mesh.shape["tensor"])
  if not wanted:
    return model, None
  names = {i: ATTENTIONS.index("xla") for i in wanted}
  devices = jax.local_devices()[:1] if mesh is None else mesh.devices.flat
  if len({device.device_kind for device in devices}) > 1:
    if jax.process_index() == 0:
      say("attention: the devices are not all of one kind; auto is xla")
  elif jax.process_index() == 0:
    key = _hash([setting(), list(wanted.items())])
    if kept is not None and kept.get("key") == key:
      found = dict(zip(wanted, kept["kernels"], strict=True))
    else:
      found = _decide(wanted, say, measure)
    names = {i: ATTENTIONS.index(name) for i, name in found.items()}
  agreed = np.array(list(names.values()), np.int32)
  if jax.process_count() > 1:
    agreed = multihost_utils.broadcast_one_to_all(agreed)
  kernels = [ATTENTIONS[number] for number in agreed]
  stages = list(model.stages)
  for i, kernel in zip(wanted, kernels, strict=True):
    stages[i] = dataclasses.replace(stages[i], attention=kernel)
  model = dataclasses.replace(model, stages=tuple(stages))
  key = _hash([setting(), list(wanted.items())])
  return model, {"key": key, "kernels": kernels}
