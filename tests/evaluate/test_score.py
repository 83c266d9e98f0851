"""Scores of text after a prefix."""

import math

import pytest

from aunet_jax.evaluate import bits_per_byte, score
from aunet_jax.workdir import load
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
