"""Vocabularies: their trees and their files."""

import base64
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

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
    (b'{"model": 5}', "neither a tokenizer.json"),
    (b'{"model": {"vocab": 5}}', "neither a tokenizer.json"),
    (b'{"model": {"vocab": [[1, 2]]}}', "neither a tokenizer.json"),
    (b'{"model": {"vocab": {"\\ud800": 1}}}', "neither a tokenizer.json"),
    (b'{"model": {"vocab": {}}, "added_tokens": [5]}', "neither a token"),
    (b'{"model": {"vocab": {}}}', "is empty"),
    (b'{"model": ' + b"[" * 100_000, "nested too deeply"),
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


def test_more_beginnings_than_can_be_told_apart_are_refused(monkeypatch):
  monkeypatch.setattr(vocabulary, "MAX_NODES", 6)
  vocabulary.Vocabulary([b"abc", b"abd", b"x"])  # a, ab, abc, abd, x
  with pytest.raises(ValueError, match="more than 5 beginnings"):
    vocabulary.Vocabulary([b"abc", b"abd", b"x", b"y"])


@hypothesis.settings(deadline=None, max_examples=120)
@hypothesis.given(
  edits=st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=4
  ),
  keep=st.floats(0.5, 1),
)
def test_random_damage_is_an_error_or_a_vocabulary(
  edits, keep, tmp_path_factory
):
  path = tmp_path_factory.getbasetemp() / "damaged.json"
  raw = bytearray(pathlib.Path(TOKENS.partition("@")[2]).read_bytes())
  for place, content in edits:
    at = int(place * (len(raw) - 1))
    raw[at : at + len(content)] = content
  path.write_bytes(raw[: int(keep * len(raw)) if keep < 0.8 else len(raw)])
  try:
    tokens = vocabulary.read_tokens(path)
  except ValueError:
    return
  assert all(isinstance(token, bytes) for token in tokens)
  tree = vocabulary.Vocabulary(tokens)
  cuts, state = tree.scan(np.arange(256, dtype=np.uint8), tree.start)
  assert cuts[0] and 0 <= state[0] < tree.num_nodes
