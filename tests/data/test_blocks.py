"""Files of checked blocks: what is read is what was written, or an error."""

import numpy as np
import pytest

from aunet_jax.data import blocks


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200])
def test_a_file_of_blocks_is_what_was_written(tmp_path, monkeypatch, size):
  monkeypatch.setattr(blocks, "BLOCK", 64)
  monkeypatch.setattr(blocks, "_MOST", 50)  # reads in parts, as above 1 GiB
  data = np.random.default_rng(size).bytes(size)
  writer = blocks.Writer(tmp_path / "file")
  for part in (data[:1], data[1:70], data[70:]):
    writer.write(part)
  sums = writer.finish()
  writer.close()
  assert writer.size == size
  assert (tmp_path / "file").read_bytes() == data
  reader = blocks.Reader(tmp_path / "file", size, sums)
  for start, stop in ((0, size), (size // 3, size), (size // 2, size // 2)):
    assert reader.read(start, stop).tobytes() == data[start:stop]
  with pytest.raises(blocks.DamagedError, match="has no bytes"):
    reader.read(0, size + 1)
  with pytest.raises(blocks.DamagedError, match="has no bytes"):
    reader.read(-1, 0)


def test_a_block_is_checked_when_it_is_first_read(tmp_path, monkeypatch):
  monkeypatch.setattr(blocks, "BLOCK", 64)
  writer = blocks.Writer(tmp_path / "file")
  writer.write(bytes(200))
  sums = writer.finish()
  writer.close()
  reader = blocks.Reader(tmp_path / "file", 200, sums)
  (tmp_path / "file").write_bytes(bytes(130) + b"x" + bytes(69))
  assert reader.read(0, 128).tobytes() == bytes(128)
  for _ in range(2):
    with pytest.raises(blocks.DamagedError, match="near byte 128"):
      reader.read(100, 129)
  assert reader.read(192, 200).tobytes() == bytes(8)
