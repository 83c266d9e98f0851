"""Bars of a predicted time."""

import pytest

from aunet_jax.compile import picture


def time_of(parts):
  entries = [
    dict(zip(("stage", "part", "pass", "cycles"), part, strict=True))
    for part in parts
  ]
  return {
    "parts": entries,
    "total_cycles": sum(entry["cycles"] for entry in entries),
    "seconds": 0.25,
    "method": "compiler",
    "in_products": 0.5,
    "predicted_useful_mfu": 0.4,
  }


def test_bars_are_parts_by_pass_and_sum_to_the_whole():
  time = time_of(
    [
      (1, "norms", "forward", 1.0), (1, "norms", "backward", 2.0),
      (None, "optimizer", "update", 5.0), (2, "norms", "forward", 2.0),
    ]
  )  # fmt: skip
  assert picture.bars(time) == [
    ("optimizer", {"update": 0.5}),
    ("stage 1: norms", {"forward": 0.1, "backward": 0.2}),
    ("stage 2: norms", {"forward": 0.2}),
  ]
  many = time_of([(n, "norms", "forward", 1.0) for n in range(100)])
  found = picture.bars(many)
  assert len(found) == picture.MOST_BARS + 1
  assert sum(x["forward"] for _, x in found) == pytest.approx(1)


def test_a_picture_of_two_programs(tmp_path):
  time = time_of([(1, "norms", "forward", 1.0), (None, "head", "update", 1.0)])
  path = tmp_path / "time.svg"
  picture.draw({"train": time, "decode": time}, path)
  text = path.read_text()
  assert text.count("train: 250 ms, compiler, useful MFU 40%") == 1
  assert "decode: 250 ms" in text and "stage 1: norms" in text
