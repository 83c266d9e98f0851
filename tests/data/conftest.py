"""Sources that make an index of several parts."""

import numpy as np
import pytest
from toy_corpora import write

from aunet_jax.data import parts

WORDS = [f"word{number}" for number in range(400)]


@pytest.fixture
def directory(tmp_path, monkeypatch):
  """Files of texts, near copies and faults among them, two to a part."""
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(120)]
  texts[12::15] = texts[3::15]  # copies, in the same file and in others
  texts[52::15] = [f"{text} more" for text in texts[7:82:15]]
  for number in range(8):
    path = tmp_path / "texts" / f"{number}.jsonl"
    write(path, texts[15 * number : 15 * number + 15])
    with open(path, "a") as file:
      file.write("\n\nno JSON\n" if number % 3 == 0 else "\n")
  sizes = [path.stat().st_size for path in (tmp_path / "texts").iterdir()]
  monkeypatch.setattr(parts, "PART_BYTES", max(sizes) + 1)
  return tmp_path
