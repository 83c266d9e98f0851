"""Drafts change how many bytes a turn gives, and never which."""

import functools

import numpy as np
import pytest

from aunet_jax.generate.generator import Generator
from aunet_jax.generate.sampling import Sampling
from tests.generate import test_decode as decoding

# Short ones, of one shape: each other shape is compiled again.
PROMPTS = [b"The cat sat", "déjà vé".encode()[:-1], b"", b"aaaaaaaaaaaaa"]
SAMPLINGS = [
  Sampling(),
  Sampling(temperature=0),
  Sampling(temperature=0.7, top_p=0.9, top_k=40),
]
SLOW = pytest.mark.slow  # two programs each


def make(num_stages, **changes):
  config, params = decoding.make_model(num_stages, heads=3, **changes)
  return Generator(config, params, decoding.make_splitter(config.rules))


@functools.cache
def two_stages():
  return make(2, ngram_rows=16, ngram_longest=4)


def check_same(generator, samplings=SAMPLINGS):
  """Returns: bytes, and the turns that they took with drafts."""
  num_bytes = num_turns = 0
  for number, prompt in enumerate(PROMPTS):
    for sampling in samplings:
      # More than a call of the loop gives, and an end anywhere in a turn.
      asked = {
        "max_bytes": 200 + number, "settings": sampling, "seed": number,
        "stop": [b"zq"], "top_logprobs": 2,
      }  # fmt: skip
      (plain,) = generator.generate([prompt], **asked)
      stats, streamed = [], []
      (drafted,) = generator.generate(
        [prompt],
        drafts=True,
        on_stats=stats.append,
        on_text=lambda row, text, to=streamed: to.append(text),
        **asked,
      )
      assert drafted.data == plain.data, (prompt, sampling)
      assert drafted.reason == plain.reason
      assert "".join(streamed) == drafted.text
      np.testing.assert_array_equal(drafted.levels, plain.levels)
      np.testing.assert_allclose(
        drafted.logprobs, plain.logprobs, atol=decoding.TOLERANCE
      )
      found, expected = drafted.top_logprobs, plain.top_logprobs
      assert [list(top) for top in found] == [list(top) for top in expected]
      # Of the byte stage, those positions that a byte was chosen at.
      assert stats[0].needed[0] == stats[0].num_bytes
      num_bytes += stats[0].num_bytes
      num_turns += stats[0].slots[0] / generator.config.heads
  return num_bytes, num_turns


def test_the_text_is_that_of_plain_decoding():
  num_bytes, num_turns = check_same(two_stages())
  assert num_bytes > 600
  assert num_turns < 0.95 * num_bytes  # or no draft was ever right


@SLOW
def test_what_choosing_remembers_is_that_of_the_chosen_bytes():
  check_same(two_stages(), [Sampling(no_repeat=4, utf8=True, min_p=0.001)])


@pytest.mark.parametrize(
  ("num_stages", "changes"),
  [
    pytest.param(1, {}, marks=SLOW),
    pytest.param(2, {"rules": ("stride@3",)}, marks=SLOW),
    pytest.param(2, {"rules": ("bytes",)}, marks=SLOW),  # boundaries alone
    pytest.param(2, {"upsampling": "repeat", "skip": False}, marks=SLOW),
    pytest.param(2, {"upsampling": "simple", "num_kv_heads": 2}, marks=SLOW),
    pytest.param(3, {}, marks=SLOW),
    pytest.param(4, {"rules": ("pretok", "word@2", "word@4")}, marks=SLOW),
  ],
)
def test_the_text_is_that_of_plain_decoding_in_other_models(
  num_stages, changes
):
  check_same(make(num_stages, **changes))


@pytest.mark.parametrize(
  ("asked", "says"),
  [
    ({"num_samples": 2}, "one prompt and one sample, not 2 rows"),
    ({"prompts": [b"a", b"b"]}, "one prompt and one sample"),
  ],
)
def test_what_drafts_cannot_do_is_refused(asked, says):
  asked = {"prompts": [b"a"], "max_bytes": 5, "drafts": True} | asked
  with pytest.raises(ValueError, match=f"drafts need {says}"):
    two_stages().generate(**asked)


def test_a_model_of_one_head_has_no_drafts():
  config, params = decoding.make_model(2)
  generator = Generator(config, params, decoding.make_splitter(config.rules))
  with pytest.raises(ValueError, match="a model trained with model.heads of 2"):
    generator.generate([b"a"], drafts=True)
