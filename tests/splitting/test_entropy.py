"""Tables of entropies: their files, and what a damaged one may not do."""

import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from aunet_jax.splitting import entropy
from aunet_jax.splitting.splitter import Splitter

HERE = pathlib.Path(__file__).parents[1]
GOLDEN = HERE / "golden" / "entropy_rise.npz"


def fields(**changed):
  """The arrays of a file, small, some of them replaced."""
  good = {
    "index": np.zeros(1 << 16, np.uint16),
    "blocks": np.zeros((3, 256), np.uint8),
    "mode": np.array("threshold"),
    "threshold": np.array(20),
  }
  return good | changed


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 text"])
def test_what_is_no_table_of_entropies_is_refused(tmp_path, content):
  if content is not None:
    (tmp_path / "file").write_bytes(content)
  with pytest.raises(ValueError, match="aunet_jax.fit_entropy"):
    Splitter([f"entropy@{tmp_path / 'file'}"])


def test_a_file_keeps_the_table(tmp_path):
  table = entropy.load(GOLDEN)
  table.save(tmp_path / "again.npz")
  assert entropy.load(tmp_path / "again.npz").hash == table.hash
  np.savez(tmp_path / "wide.npz", **fields(index=np.zeros(1 << 16, np.int64)))
  assert entropy.load(tmp_path / "wide.npz").index.dtype == np.uint16


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"index": np.full(1 << 16, 3, np.uint16)}, "blocks 3 to 3; there are 3"),
    ({"index": np.full(1 << 16, -1)}, "blocks -1 to -1"),
    ({"index": np.full(1 << 16, 1 << 16)}, "there are 3"),
    ({"index": np.zeros(10, np.uint16)}, "index has shape"),
    ({"index": np.zeros((1 << 16, 2), np.uint16)}, "index has shape"),
    ({"index": np.zeros(1 << 16)}, "index must hold integers"),
    ({"blocks": np.zeros((3, 255), np.uint8)}, "blocks has shape"),
    ({"blocks": np.zeros((0, 256), np.uint8)}, "there are 0"),
    ({"blocks": np.zeros(256, np.uint8)}, "blocks has shape"),
    ({"blocks": np.zeros((), np.uint8)}, "blocks has shape"),
    ({"blocks": np.full((3, 256), 256)}, "from 0 to 255"),
    ({"blocks": np.zeros((1 << 17, 256), np.uint8)}, "at most"),
    ({"mode": np.array("fall")}, "mode='fall'"),
    ({"mode": np.array(["rise"] * 2)}, "mode has shape"),
    ({"threshold": np.array(1 << 40)}, "threshold=1099511627776"),
    ({"threshold": np.array([1, 2])}, "threshold has shape"),
    ({"threshold": np.array(0.5)}, "threshold is float64"),
    ({"mode": np.array(print, dtype=object)}, "Python objects"),
  ],
)
def test_a_table_that_would_be_read_past_its_end_is_refused(
  tmp_path, changed, message
):
  path = tmp_path / "table.npz"
  np.savez_compressed(path, **fields(**changed))
  with pytest.raises(ValueError, match=f"entropy@.*{message}"):
    Splitter([f"entropy@{path}"])


def test_a_missing_array_is_named(tmp_path):
  content = fields()
  del content["blocks"]
  np.savez(tmp_path / "table.npz", **content)
  with pytest.raises(ValueError, match="no entry 'blocks'"):
    entropy.load(tmp_path / "table.npz")


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(data=st.data())
def test_random_arrays_are_refused_or_read_within_their_bounds(
  data, tmp_path_factory
):
  """As compiled, against the same arithmetic in Python with its checks."""
  num_blocks = data.draw(st.integers(0, 4))
  seed = data.draw(st.integers(0, 2**32 - 1))
  random = np.random.default_rng(seed)
  dtype = data.draw(st.sampled_from([np.uint16, np.int64, np.int8]))
  high = data.draw(st.integers(1, 6))
  content = fields(
    index=random.integers(0, high, 1 << 16).astype(dtype),
    blocks=random.integers(0, 256, (num_blocks, 256)).astype(np.uint8),
    mode=np.array(data.draw(st.sampled_from(entropy.MODES))),
    threshold=np.array(data.draw(st.integers(-300, 300))),
  )
  path = tmp_path_factory.getbasetemp() / "random.npz"
  np.savez(path, **content)
  text = data.draw(st.binary(max_size=30))
  try:
    table = entropy.load(path)
  except ValueError:
    assert (
      content["index"].max() >= num_blocks or abs(content["threshold"]) > 255
    )
    return
  cuts, _ = table.scan(np.frombuffer(text, np.uint8), table.start)
  before, expected = 255, []
  for end in range(1, len(text) + 1):
    a, b, c = (bytes(3) + text[:end])[-3:]
    found = int(content["blocks"][content["index"][a << 8 | b]][c])
    base = before if content["mode"] == "rise" else 0
    expected.append(found - base > content["threshold"])
    before = found
  assert cuts.tolist() == expected


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
  edits=st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=4
  ),
  keep=st.floats(0.5, 1),
)
def test_random_damage_is_an_error_or_nothing(edits, keep, tmp_path_factory):
  path = tmp_path_factory.getbasetemp() / "damaged.npz"
  raw = bytearray(GOLDEN.read_bytes())
  for place, content in edits:
    at = int(place * (len(raw) - 1))
    raw[at : at + len(content)] = content
  path.write_bytes(raw[: int(keep * len(raw)) if keep < 0.8 else len(raw)])
  try:
    found = entropy.load(path)
  except ValueError:
    return
  assert found.hash == entropy.load(GOLDEN).hash
