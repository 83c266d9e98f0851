"""Scores of text after a prefix."""

import math

import jax
import numpy as np
import pytest

from aunet_jax.evaluate import bits_per_byte, score
from aunet_jax.workdir import load
from tests import toy_tokens
from tests.toy_workdir import TEXTS, write_texts, write_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return write_workdir(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  return write_texts(tmp_path_factory.mktemp("texts"))


def test_bits_without_eos_are_the_scores_of_the_bytes(workdir, texts):
  """As `score` gives them without the end of the document."""
  loaded = load.load(workdir)
  only = texts.parent / "one"
  only.mkdir(exist_ok=True)
  (only / "0.txt").write_bytes(TEXTS[0])
  result = bits_per_byte.evaluate_workdir(
    str(workdir), str(only), log=lambda _: 0
  )
  for name, with_eos in (
    ("bits_per_byte", True), ("bits_per_byte_without_eos", False),
  ):  # fmt: skip
    (found,) = score.score(
      loaded.model.config, loaded.params, loaded.splitter,
      [(b"", TEXTS[0])], with_eos=with_eos,
    )  # fmt: skip
    bits = -found.nats / math.log(2) / len(TEXTS[0])
    assert result[name] == pytest.approx(bits, rel=1e-5)


def test_a_model_of_tokens_scores_those_that_hold_a_byte_of_what_follows():
  loaded = toy_tokens.loaded()
  tokenizer, model = loaded.tokenizer, loaded.model
  pairs = [
    (b"", b"the cat"), (b"the cat sat", b" on the mat"),
    (b"the c", b"at sat"),  # a token across the cut counts
    (b"the cat ", "ätsch".encode()[:2]), (b"a", b""),
  ]  # fmt: skip
  plain, ended = (
    score.score(
      model.config, loaded.params, loaded.splitter, pairs, batch_size=3,
      with_eos=with_eos, tokenizer=tokenizer,
    )
    for with_eos in (False, True)
  )  # fmt: skip
  for n, (context, continuation) in enumerate(pairs):
    ids = tokenizer.encode(context + continuation).astype(np.int32)
    ends = tokenizer.num_bytes[ids].cumsum()
    units_L = np.concatenate([[tokenizer.bos], ids])
    targets_L = np.concatenate([ids, [tokenizer.eos]])
    zeros_BL = np.zeros((1, len(units_L)), np.int32)
    config = model.config.with_capacities((len(units_L),))
    logits_BLV = type(model)(config).apply(
      {"params": loaded.params}, units_L[None], zeros_BL, zeros_BL + 1
    )
    logprob_LV = np.asarray(jax.nn.log_softmax(logits_BLV[0]))
    picked_L = logprob_LV[np.arange(len(targets_L)), targets_L]
    greedy_L = logprob_LV.argmax(-1) == targets_L
    for with_eos, one in ((False, plain[n]), (True, ended[n])):
      counted_L = np.append(ends > len(context), with_eos)
      assert one.nats == pytest.approx(picked_L[counted_L].sum(), abs=1e-4)
      assert one.num_bytes == len(continuation) + with_eos
      assert one.is_greedy == greedy_L[counted_L].all()
