"""The command line: shards that hold the input once, shuffled; plans."""

import json

import numpy as np
import pytest

from aunet_jax import prepare
from aunet_jax.data import sources
from aunet_jax.splitting.splitter import Splitter

RULES = "word@1,word@2"


def _texts(count):
  rng = np.random.default_rng(0)
  words = ["the", "of", "tree", "planner", "42", "(x)", "größer", "\n"]
  return [
    f"{number} " + " ".join(rng.choice(words, rng.integers(1, 200)))
    for number in range(count)
  ]


def _write(tmp_path, texts):
  path = tmp_path / "in.jsonl"
  path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
  return str(path)


def _records(directory):
  files, _ = sources.list_sources(str(directory))
  return [r.text for f in files for r in sources.read_source(f, "text")]


def _run(*arguments):
  return prepare.main([f"--rules={RULES}", *arguments])


def test_shards_hold_every_document_once_and_the_index_tells(tmp_path):
  texts = _texts(200)
  source = _write(tmp_path, texts)
  output = tmp_path / "out"
  _run(
    f"--input={source}",
    f"--output={output}",
    "--heldout_fraction=0.2",
    "--shard_bytes=30000",
    "--row_bytes=512",
  )
  train = _records(output / "train")
  heldout = _records(output / "heldout")
  assert sorted(train + heldout) == sorted(text.encode() for text in texts)
  order = [int(text.split()[0]) for text in train]
  assert order != sorted(order)
  index = json.loads((output / "index.json").read_text())
  for name, records in (("train", train), ("heldout", heldout)):
    split = index["splits"][name]
    assert split["documents"] == len(records)
    assert split["bytes"] == sum(map(len, records))
    assert split["documents"] == sum(s["documents"] for s in split["shards"])
    assert split["bytes"] == sum(s["bytes"] for s in split["shards"])
    for shard in split["shards"]:
      assert len(_records(output / shard["file"])) == shard["documents"]
      assert shard["bytes"] < 32000
    levels = [Splitter(RULES.split(",")).levels(text) for text in records]
    for stage in split["stages"]:
      # A boundary at BOS and one at every byte of the stage or a deeper one.
      kept = sum(1 + (x >= stage["stage"] - 1).sum() for x in levels)
      assert stage["segments"] == kept
      positions = split["bytes"] + split["documents"]
      assert stage["mean_bytes"] == pytest.approx(positions / kept)
  assert len(index["splits"]["train"]["shards"]) > 1
  assert len(index["plan"]["capacities"]) == 3
  assert not list(tmp_path.glob("*.partial"))
  assert not list(output.glob("*.scratch"))


def test_the_shuffle_follows_the_seed(tmp_path):
  source = _write(tmp_path, _texts(50))
  orders = []
  for number, seed in enumerate((0, 0, 1)):
    output = tmp_path / f"out{number}"
    _run(f"--input={source}", f"--output={output}", f"--seed={seed}")
    orders.append(_records(output / "train"))
  assert orders[0] == orders[1]
  assert orders[0] != orders[2]


def test_no_shard_is_empty_where_documents_are_larger(tmp_path):
  texts = ["x" * 9000, "y", "z" * 50]
  path = _write(tmp_path, texts)
  flags = ["--heldout_fraction=0", "--shard_bytes=1000", "--row_bytes=1024"]
  assert _run(f"--input={path}", f"--output={tmp_path}/out", *flags) == 0
  index = json.loads((tmp_path / "out" / "index.json").read_text())
  shards = index["splits"]["train"]["shards"]
  names = sorted(p.name for p in (tmp_path / "out" / "train").iterdir())
  assert names == sorted(s["file"].removeprefix("train/") for s in shards)
  assert all(shard["documents"] for shard in shards)
  assert sorted(_records(tmp_path / "out" / "train")) == sorted(
    text.encode() for text in texts
  )


@pytest.mark.slow  # it writes 9 GB
def test_a_document_beyond_what_one_read_gives(tmp_path):
  line = (
    b"Once upon a time there was a little girl. She loved to play.\n" * 9999
  )
  with open(tmp_path / "large.txt", "wb") as file:
    while file.tell() < 2_200_000_000:
      file.write(line)
    file.write(b"THE END")
  output = tmp_path / "out"
  flags = ["--heldout_fraction=0", "--rules=word@1"]
  assert (
    _run(f"--input={tmp_path}/large.txt", f"--output={output}", *flags) == 0
  )
  (text,) = _records(output / "train")
  assert len(text) == (tmp_path / "large.txt").stat().st_size
  assert text.endswith(b"THE END")
