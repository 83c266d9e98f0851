"""The frozen table of character classes."""

import unicodedata

import numpy as np
import pytest

from aunet_jax.splitting import unicode_table


def test_character_classes_agree_with_this_pythons_unicode():
  """Characters this interpreter knows; it may know fewer than the table."""
  classes, version = unicode_table.load_classes()
  ours = tuple(int(part) for part in version.split("."))
  theirs = tuple(int(p) for p in unicodedata.unidata_version.split("."))
  if theirs > ours:
    pytest.skip(f"Unicode {theirs} here is newer than the frozen table's")
  groups = {
    "L": unicode_table.LETTERS,
    "N": unicode_table.NUMBERS,
    "M": {unicode_table.MARK},
    "P": {unicode_table.OTHER},
    "S": {unicode_table.OTHER},
    "Z": unicode_table.SPACES,
    "C": {unicode_table.OTHER, *unicode_table.SPACES},
  }
  differing = 0
  for code in range(unicode_table.NUM_CODE_POINTS):
    category = unicodedata.category(chr(code))
    if category != "Cn" and int(classes[code]) not in groups[category[0]]:
      differing += 1
  assert differing <= 20  # categories change a little between versions


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"starts": np.array([0, 5, 5], np.int32)}, "out of bounds"),
    ({"starts": np.array([1, 5, 9], np.int32)}, "out of bounds"),
    ({"starts": np.array([0, 5, 0x110000], np.int32)}, "out of bounds"),
    ({"classes": np.array([0, 1, 10], np.uint8)}, "out of bounds"),
    ({"classes": np.array([0, 1], np.uint8)}, "another shape"),
    ({"starts": np.array([0, 5, 9])}, "another type"),
    (None, "not an .npz file"),
  ],
)
def test_a_damaged_table_is_named(tmp_path, monkeypatch, changed, message):
  path = tmp_path / "classes.npz"
  good = {
    "starts": np.array([0, 5, 9], np.int32),
    "classes": np.array([0, 1, 2], np.uint8),
    "unicode_version": np.array("1.0"),
  }
  monkeypatch.setattr(unicode_table, "FILE", path)
  load = unicode_table.load_classes.__wrapped__
  np.savez(path, **good)
  classes, version = load()
  assert classes[[0, 5, 9, 0x10FFFF]].tolist() == [0, 1, 2, 2]
  assert version == "1.0"
  if changed is None:
    path.write_bytes(b"text")
  else:
    np.savez(path, **(good | changed))
  with pytest.raises(ValueError, match=f"damaged.*{message}"):
    load()
