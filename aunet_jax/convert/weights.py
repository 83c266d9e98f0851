"""Official weights as files: torch, NumPy and safetensors."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CONSOLIDATED = "consolidated.pth"  # names of the official consolidation script
FORMATS = (".pth", ".npz", ".safetensors")

# ----- files of weights -----------------------------------------------------


def _torch():
  try:
    import torch
  except ImportError:
    raise ValueError(
      "reading or writing .pth needs torch, which is not installed: "
      "pip install 'aunet_jax[torch]', or use .npz or .safetensors."
    ) from None
  return torch


def _safetensors():
  try:
    import safetensors.numpy
  except ImportError:
    raise ValueError(
      "reading or writing .safetensors needs safetensors, which is not "
      "installed: pip install 'aunet_jax[convert]', or use .npz."
    ) from None
  return safetensors


def format(path: Path) -> str:
  if path.suffix not in FORMATS:
    raise ValueError(
      f"{path} must end in one of {', '.join(FORMATS)}, not {path.suffix!r}."
    )
  return path.suffix


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
  """Weights of a file under the names they have there; runs none of it.

  Raises: ValueError naming the file, and the entry where one is at fault.
  """
  path = Path(path)
  kind = format(path)
  if not path.is_file():
    raise ValueError(f"no such checkpoint file: {path}")
  readers = {
    ".pth": _read_pth,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
  }
  return readers[kind](path)


def _read_pth(path: Path) -> dict[str, np.ndarray]:
  torch = _torch()
  try:
    content = torch.load(path, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
    found = re.search(r"Unsupported [^\n]*? was not", str(error))
    raise ValueError(
      f"{path} was refused: it is not a file of plain tensors"
      + (f" ({found[0]} allowed)." if found else ".")
    ) from None
  if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
    content = content["model"]
  if not isinstance(content, Mapping):
    raise ValueError(
      f"{path} holds a {type(content).__name__}, not weights by name."
    )
  weights = {}
  for key, value in content.items():
    if not isinstance(value, torch.Tensor):
      raise ValueError(
        f"{path}: entry {key!r} is a {type(value).__name__}, not a tensor."
      )
    # NumPy has no bfloat16; float32 holds it exactly.
    half = value.dtype == torch.bfloat16
    weights[key] = (value.float() if half else value).numpy()
  return weights


def _read_npz(path: Path) -> dict[str, np.ndarray]:
  if not zipfile.is_zipfile(path):
    raise ValueError(f"{path} is not an .npz file.")
  weights = {}
  with np.load(path, allow_pickle=False) as file:
    for key in file.files:
      try:
        weights[key] = file[key]
      except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
          f"{path}: entry {key!r} was refused: {error}"
        ) from None
      if not isinstance(weights[key], np.ndarray):
        raise ValueError(f"{path}: entry {key!r} is not an array.")
  return weights


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  safetensors = _safetensors()
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is not a .safetensors file: {error}") from None


def write_weights(path: str | Path, weights: dict[str, np.ndarray]) -> None:
  """Writes a file `read_weights` reads; `.pth` as the official code does."""
  path = Path(path)
  kind = format(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if kind == ".pth":
    torch = _torch()
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    torch.save({"model": tensors}, path)
  elif kind == ".npz":
    np.savez(path, **weights)
  else:
    _safetensors().numpy.save_file(weights, path)
