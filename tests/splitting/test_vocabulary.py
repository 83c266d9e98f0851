"""Vocabularies and tables of entropies: their trees and their files."""

import base64
import json
import pathlib

import numpy as np
import pytest

from aunet_jax.splitting import vocabulary
from aunet_jax.splitting.splitter import Splitter

HERE = pathlib.Path(__file__).parents[1]
TOKENS = f"tokens@{HERE / 'golden' / 'vocabulary.json'}"


def test_segments_are_the_longest_beginnings_of_tokens():
  text = b"the theone longer"
  starts = np.flatnonzero(Splitter([TOKENS]).levels(text))
  found = [text[a:b] for a, b in zip(starts, [*starts[1:], 99], strict=True)]
  # "long" is the beginning of a token, though no token itself.
  assert found == [b"the", b" the", b"one", b" ", b"longe", b"r"]


def test_the_three_kinds_of_file(tmp_path):
  byte_level = set(vocabulary.read_tokens(TOKENS.partition("@")[2]))
  assert {b" the", "é".encode(), b"\n\n", "👍".encode()} <= byte_level
  assert not any(b"end" in token for token in byte_level)
  lines = [base64.b64encode(token) + b" 7" for token in sorted(byte_level)]
  (tmp_path / "a.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
  assert set(vocabulary.read_tokens(tmp_path / "a.tiktoken")) == byte_level
  pieces = {"▁the": 0, "<0xFF>": 1, "é": 2}
  (tmp_path / "a.json").write_text(json.dumps({"model": {"vocab": pieces}}))
  assert vocabulary.read_tokens(tmp_path / "a.json") == [
    b" the", b"\xff", "é".encode(),
  ]  # fmt: skip
  assert vocabulary.Vocabulary(byte_level).hash in Splitter([TOKENS]).hash


@pytest.mark.parametrize(
  "content, message",
  [
    (None, "No such file"),
    (b"", "is empty"),
    (b"not base64 at all", "neither a tokenizer.json"),
    (b"{", "neither a tokenizer.json"),
    (b'{"model": {}}', "neither a tokenizer.json"),
    (b"\xff\xfe\n", "neither a tokenizer.json"),
  ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, content, message):
  if content is not None:
    (tmp_path / "file").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    Splitter([f"tokens@{tmp_path / 'file'}"])


def test_a_large_vocabulary_is_a_tree():
  """Every edge is found within the fixed number of probes."""
  random = np.random.default_rng(3)
  tokens = [
    random.integers(97, 107, random.integers(1, 9)).astype(np.uint8).tobytes()
    for _ in range(20_000)
  ]
  tree = vocabulary.Vocabulary(tokens)
  beginnings = {token[:end] for token in tokens for end in range(1, len(token))}
  assert tree.num_nodes == len(beginnings | set(tokens)) + 1
  for token in tokens[:500]:
    cuts, _ = tree.scan(np.frombuffer(token, np.uint8), tree.start)
    assert cuts[0] and not cuts[1:].any()


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 text"])
def test_what_is_no_table_of_entropies_is_refused(tmp_path, content):
  if content is not None:
    (tmp_path / "file").write_bytes(content)
  with pytest.raises(ValueError, match="aunet_jax.fit_entropy"):
    Splitter([f"entropy@{tmp_path / 'file'}"])
