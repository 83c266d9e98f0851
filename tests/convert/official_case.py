"""A recorded official model, and the kinds of file this machine can write."""

import json
from pathlib import Path

import numpy as np
import pytest

CASE = Path(__file__).parents[1] / "golden" / "official" / "g01_2st_indexed"


def official():
  """(weights, content of a params.json) of a recorded model."""
  arrays = np.load(CASE.with_suffix(".npz"))
  weights = {k[2:]: arrays[k] for k in arrays.files if k.startswith("w.")}
  arguments = json.loads(CASE.with_suffix(".json").read_text())["model"]
  strategy = {"word1": "1@1"}
  params = {"model": arguments, "data": {"regex": {"strategy": strategy}}}
  return weights, params


def suffixes():
  def mark(module):
    try:
      __import__(module)
    except ImportError:
      return pytest.mark.skip(reason=f"{module} is not installed")
    return ()

  return [
    ".npz",
    pytest.param(".safetensors", marks=mark("safetensors")),
    pytest.param(".pth", marks=mark("torch")),
  ]
