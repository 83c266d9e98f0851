"""Characters of a completion, from its bytes and their numbers."""

import numpy as np
import pytest

from aunet_jax.generate.generator import Completion
from aunet_jax.generate.protocol import characters, to_bytes


def completion(prompt, data):
  size = len(prompt) + len(data)
  logprobs = -np.log(2) * np.ones(size, np.float32)
  levels = np.arange(size, dtype=np.int8)
  return Completion(
    prompt=prompt,
    data=data,
    logprobs=logprobs[len(prompt) :],
    levels=levels[len(prompt) :],
    prompt_logprobs=logprobs[: len(prompt)],
    prompt_levels=levels[: len(prompt)],
    reason="length",
    top_logprobs=[],
    prompt_top_logprobs=[],
  )


def test_characters_keep_every_byte():
  data = "aé".encode() + b"\xff" + "中".encode()[:2] + "\ufffd".encode() + b"z"
  for cut in range(len(data) + 1):
    result = characters(completion(data[:cut], data[cut:]))
    assert [c["text"] for c in result] == [*"aé", *["\ufffd"] * 4, "z"]
    assert sum(c["bits"] for c in result) == pytest.approx(len(data))
    assert [c["level"] for c in result] == [0, 2, 3, 4, 5, 8, 9]
    # A character belongs to where it begins.
    assert [c["given"] for c in result] == [
      start < cut for start in (0, 1, 3, 4, 5, 6, 9)
    ]


def test_text_comes_as_its_bytes():
  assert to_bytes("prompt", "é\udcff中") == b"\xc3\xa9\xff\xe4\xb8\xad"
  with pytest.raises(ValueError, match="prompt holds half"):
    to_bytes("prompt", "\ud83d")
  with pytest.raises(ValueError, match="stop must be text, not of type int"):
    to_bytes("stop", 3)
