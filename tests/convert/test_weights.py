"""Official weights as files: every bit kept, and what is refused."""

import json
import zipfile

import numpy as np
import pytest
from official_case import official, suffixes

from aunet_jax.convert.weights import (
  read_shapes,
  read_weights,
  write_weights,
)


@pytest.mark.parametrize("suffix", suffixes())
def test_files_keep_every_bit(tmp_path, suffix):
  weights, _ = official()
  weights["transitions.0.expand_idx"] = np.arange(5)  # an integer buffer
  path = tmp_path / f"weights{suffix}"
  write_weights(path, weights)
  back = read_weights(path)
  assert back.keys() == weights.keys()
  for key, value in weights.items():
    assert back[key].dtype == value.dtype
    np.testing.assert_array_equal(back[key], value)
  assert read_shapes(path) == {k: v.shape for k, v in weights.items()}


def test_a_pth_entry_that_is_no_tensor_is_named(tmp_path):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  torch.save({"model": {"vocab.weight": 3}}, tmp_path / "odd.pth")
  with pytest.raises(ValueError, match="'vocab.weight' is a int"):
    read_weights(tmp_path / "odd.pth")


def test_a_pth_without_torch_says_what_to_install(tmp_path):
  try:
    import torch  # noqa: F401
  except ImportError:
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="needs torch"):
      read_weights(tmp_path / "weights.pth")
  else:
    pytest.skip("torch is installed")


def test_an_npz_member_that_is_no_array_is_named(tmp_path):
  np.savez(tmp_path / "odd.npz", a=np.zeros(3))
  with zipfile.ZipFile(tmp_path / "odd.npz", "a") as file:
    file.writestr("vocab.bias", "text")
  with pytest.raises(ValueError, match="'vocab.bias' is not an array"):
    read_weights(tmp_path / "odd.npz")


@pytest.mark.parametrize(
  "content", [b"", b"PK\x03\x04 cut short", b"\x80" * 99]
)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_broken_file_is_named(tmp_path, suffix, content):
  if suffix == ".safetensors":
    pytest.importorskip("safetensors", reason="safetensors is not installed")
  path = tmp_path / f"broken{suffix}"
  path.write_bytes(content)
  for read in (read_weights, read_shapes):
    with pytest.raises(ValueError, match=f"broken{suffix}"):
      read(path)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"\.npz.*'\.bin'"):
    read_weights(tmp_path / "weights.bin")


@pytest.mark.parametrize(
  "header",
  [
    {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**15]}},
    {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}},
    {"a": 5},
  ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
  pytest.importorskip("safetensors", reason="safetensors is not installed")
  path, content = tmp_path / "lie.safetensors", json.dumps(header).encode()
  for size in (len(content), 2**62, 10**9):
    path.write_bytes(size.to_bytes(8, "little") + content + bytes(8))
    for read in (read_weights, read_shapes):
      with pytest.raises(ValueError, match="lie.safetensors"):
        read(path)


def test_an_absurd_shape_in_an_npz_is_refused(tmp_path):
  path = tmp_path / "lie.npz"
  np.savez(path, a=np.zeros(3))
  raw = path.read_bytes()
  assert raw.count(b"(3,), }            ") == 1
  path.write_bytes(raw.replace(b"(3,), }            ", b"(3000000000000,), }"))
  for read in (read_weights, read_shapes):
    with pytest.raises(ValueError, match="lie.npz: entry 'a' was refused"):
      read(path)


def test_a_pth_view_of_a_few_numbers_is_refused(tmp_path):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "view.pth")
  for read in (read_weights, read_shapes):
    with pytest.raises(ValueError, match="'a' of shape .* has only 4 bytes"):
      read(tmp_path / "view.pth")
