"""What an index will take is near what it takes, and is checked first."""

import gzip
import json
import shutil

import numpy as np
import pytest
from toy_corpora import CAPACITIES, SPLITTER

from aunet_jax.data import estimate, indexes, sources


def sources_of(directory, compress):
  """Texts of ten sizes of files; (files, bytes of text, documents)."""
  rng = np.random.default_rng(0)
  directory.mkdir()
  num_bytes = num_documents = 0
  for number in range(10):
    lines = []
    for _ in range(40 + 20 * number):
      text = " ".join(map(str, rng.integers(1000, size=60)))
      num_bytes += len(text)
      num_documents += 1
      lines.append(json.dumps({"text": text, "other": "x" * 50}))
    data = "\n".join(lines).encode()
    name = directory / f"{number}.jsonl{'.gz' if compress else ''}"
    name.write_bytes(gzip.compress(data) if compress else data)
  return sources.list_sources(str(directory))[0], num_bytes, num_documents


@pytest.mark.parametrize(
  ("compress", "limit"), [(False, 1 << 24), (True, 1 << 24), (False, 2000)]
)
def test_a_sample_tells_of_all(tmp_path, monkeypatch, compress, limit):
  files, num_bytes, num_documents = sources_of(tmp_path / "in", compress)
  monkeypatch.setattr(estimate, "_BYTES", limit)
  recipe = indexes.Recipe(str(tmp_path / "in"), SPLITTER, CAPACITIES)
  found = estimate.estimate(files, recipe)
  near = 0.1 if limit == 2000 else 0.02
  assert found.of_text() == pytest.approx(num_bytes, rel=near)
  documents = found.documents * found.stored_bytes
  assert documents == pytest.approx(num_documents, rel=near)
  assert found.disk > found.text and found.seconds > 0
  more = indexes.Recipe(
    str(tmp_path / "in"), SPLITTER, CAPACITIES, heldout_fraction=0.5
  )
  other = estimate.estimate(files, more)
  assert other.disk == pytest.approx(
    found.disk + 0.5 * found.text + 112 * found.documents
  )


def test_files_that_cannot_be_read_are_no_sample(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
  files, _ = sources.list_sources(str(tmp_path / "a.jsonl"))
  (tmp_path / "a.jsonl").unlink()
  recipe = indexes.Recipe("a", SPLITTER, CAPACITIES)
  assert estimate.estimate(files, recipe) is None


def test_a_disk_without_room_is_refused(tmp_path):
  free = shutil.disk_usage(tmp_path).free
  estimate.check_disk(free / 2, tmp_path, "books")
  with pytest.raises(ValueError, match=r"books will take about .* GB free"):
    estimate.check_disk(2 * free, tmp_path, "books")
