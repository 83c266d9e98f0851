"""Official weights as files: torch, NumPy and safetensors."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aunet_jax import arrays

CONSOLIDATED = "consolidated.pth"  # names of the official consolidation script
FORMATS = (".pth", ".npz", ".safetensors")


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


def format_of(path: Path) -> str:
  """The kind of file a name is for. Raises: ValueError for another kind."""
  if path.suffix not in FORMATS:
    raise ValueError(
      f"{path} must end in one of {', '.join(FORMATS)}, not {path.suffix!r}."
    )
  return path.suffix


def _read(path: str | Path, readers: dict):
  path = Path(path)
  kind = format_of(path)
  if not path.is_file():
    raise ValueError(f"no such checkpoint file: {path}")
  return readers[kind](path)


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
  """Weights of a file under the names they have there; runs none of it.

  Raises: ValueError naming the file, and the entry where one is at fault.
  """
  readers = {
    ".pth": _read_pth,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
  }
  return _read(path, readers)


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the weights in a file, without reading them.

  Raises: as `read_weights`.
  """
  readers = {
    ".pth": _pth_shapes,
    ".npz": _npz_shapes,
    ".safetensors": _safetensors_shapes,
  }
  return _read(path, readers)


def _tensors(path: Path, device: str) -> dict:
  """The tensors of a .pth by name; on the device "meta", without values."""
  torch = _torch()
  try:
    content = torch.load(path, map_location=device, weights_only=True)
  except Exception as error:  # torch names no set of what a file makes it raise
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
  for key, value in content.items():
    if not isinstance(value, torch.Tensor):
      raise ValueError(
        f"{path}: entry {key!r} is a {type(value).__name__}, not a tensor."
      )
    # A view can claim any shape over a few numbers.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
      raise ValueError(
        f"{path}: entry {key!r} of shape {tuple(value.shape)} has only "
        f"{value.untyped_storage().nbytes()} bytes."
      )
  return dict(content)


def _pth_shapes(path: Path) -> dict[str, tuple[int, ...]]:
  return {key: tuple(t.shape) for key, t in _tensors(path, "meta").items()}


def _read_pth(path: Path) -> dict[str, np.ndarray]:
  torch = _torch()
  # NumPy has no bfloat16; float32 holds it exactly.
  return {
    key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    for key, value in _tensors(path, "cpu").items()
  }


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
  try:
    headers = arrays.read_headers(path)
  except ValueError as error:
    raise ValueError(f"{path}: {error}.") from None
  return {key: header.shape for key, header in headers.items()}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
  try:
    return arrays.read(path)
  except ValueError as error:
    raise ValueError(f"{path}: {error}.") from None


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
  safetensors = _safetensors()
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return {
        key: tuple(file.get_slice(key).get_shape()) for key in file.keys()
      }
  except Exception as error:  # as above
    raise ValueError(f"{path} is not a .safetensors file: {error}") from None


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  safetensors = _safetensors()
  try:
    return safetensors.numpy.load_file(path)
  except Exception as error:  # a dtype that NumPy lacks, among others
    raise ValueError(f"{path} is not a .safetensors file: {error}") from None


def write_weights(path: str | Path, weights: dict[str, np.ndarray]) -> None:
  """Writes a file `read_weights` reads; `.pth` as the official code does."""
  path = Path(path)
  kind = format_of(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if kind == ".pth":
    torch = _torch()
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    torch.save({"model": tensors}, path)
  elif kind == ".npz":
    np.savez(path, **weights)
  else:
    _safetensors().numpy.save_file(weights, path)
