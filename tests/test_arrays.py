"""Files of arrays: what they say of themselves is compared with their bytes."""

import io
import struct
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from aunet_jax import arrays

GOOD = {
  "a": np.arange(6, dtype=np.int32).reshape(2, 3),
  "b.weight": np.ones((), np.float16),
  "empty": np.zeros((0, 4)),
  "text": np.array("threshold"),
}


def npy(array, shape=None) -> bytes:
  """An array as a member of an .npz file, with a shape it may not have."""
  stream = io.BytesIO()
  np.lib.format.write_array(stream, array)
  content = stream.getvalue()
  if shape is not None:
    old, new = str(array.shape).encode(), str(shape).encode()
    assert old in content
    padding = b" " * max(0, len(new) - len(old))
    assert padding in content
    content = content.replace(old, new).replace(padding, b"", 1)
  return content


def write(path, members: dict[str, bytes], kind=zipfile.ZIP_DEFLATED) -> None:
  with zipfile.ZipFile(path, "w", kind) as archive:
    for name, content in members.items():
      archive.writestr(name, content)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_comes_back(tmp_path, save):
  save(tmp_path / "a.npz", **GOOD, big=np.zeros(100_000, np.uint8))
  found = arrays.read(tmp_path / "a.npz")
  assert found.keys() == GOOD.keys() | {"big"}
  for name, value in GOOD.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value)
  headers = arrays.read_headers(tmp_path / "a.npz", ["a", "text"])
  assert headers == {n: (GOOD[n].shape, GOOD[n].dtype) for n in ("a", "text")}


def test_an_absurd_shape_is_refused_before_memory_is_asked_for(tmp_path):
  path = tmp_path / "a.npz"
  shapes = [(10**13,), (10**6, 10**6, 10**6), (2**63, 4), (5,), (-3,), (-1, -3)]
  for shape in shapes:
    write(path, {"a.npy": npy(np.zeros(3), shape)})
    for read in (arrays.read, arrays.read_headers):
      with pytest.raises(ValueError, match="entry 'a' was refused"):
        read(path)


def test_a_member_that_lies_about_its_own_size_is_refused(tmp_path):
  """Its header and the directory agree on 800 MB; the file has 250 bytes."""
  path, length = tmp_path / "a.npz", 10**8
  content = npy(np.zeros(3), (length,))
  write(path, {"a.npy": content})
  true = struct.pack("<I", len(content))
  lie = struct.pack("<I", len(content) - 3 * 8 + 8 * length)
  raw = path.read_bytes()
  assert raw.count(true) == 2  # beside the member, and in the directory
  path.write_bytes(raw.replace(true, lie))
  with pytest.raises(ValueError, match="larger than what it is packed into"):
    arrays.read(path)


def test_objects_and_foreign_members_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, a=np.array([print], dtype=object))
  with pytest.raises(ValueError, match="'a' was refused: it holds Python obj"):
    arrays.read(path)
  write(path, {"a.npy": npy(np.ones(2)), "b": b"text"})
  with pytest.raises(ValueError, match="'b' is not an array"):
    arrays.read(path)
  assert arrays.read(path, ["a"])["a"].tolist() == [1, 1]
  with pytest.raises(ValueError, match="no entry 'c'"):
    arrays.read(path, ["a", "c"])
  write(path, {"a.npy": npy(np.ones(2))}, zipfile.ZIP_BZIP2)
  with pytest.raises(ValueError, match="packed in a way"):
    arrays.read(path)
  with pytest.raises(ValueError, match="no such file"):
    arrays.read(tmp_path)


@hypothesis.settings(deadline=None, max_examples=120)
@hypothesis.given(
  kind=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
  edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8))),
  keep=st.floats(0.3, 1),
)
def test_random_damage_is_an_error_or_nothing(
  kind, edits, keep, tmp_path_factory
):
  path = tmp_path_factory.getbasetemp() / "damaged.npz"
  write(path, {f"{name}.npy": npy(a) for name, a in GOOD.items()}, kind)
  raw = bytearray(path.read_bytes())
  for place, content in edits:
    at = int(place * (len(raw) - 1))
    raw[at : at + len(content)] = content
  path.write_bytes(raw[: int(keep * len(raw)) if keep < 0.9 else len(raw)])
  try:
    found = arrays.read(path)
  except ValueError:
    return
  for name in GOOD.keys() & found.keys():
    np.testing.assert_array_equal(found[name], GOOD[name])
