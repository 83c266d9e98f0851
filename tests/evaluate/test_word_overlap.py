"""Words of answers are compared as SQuAD's evaluation does."""

import pytest

from aunet_jax.evaluate.word_overlap import word_f1, words


@pytest.mark.parametrize(
  ("said", "expected", "f1"),
  [
    ("The cat.", "a cat", 1.0),
    ("a big cat", "cat", 2 / 3),
    ("dog", "cat", 0.0),
    ("", "cat", 0.0),
    ("the", "a", 1.0),
    ("cat cat", "cat", 2 / 3),
  ],
)
def test_words_overlap_as_squad_counts_them(said, expected, f1):
  assert word_f1(said, expected) == pytest.approx(f1)


def test_words_of_other_scripts_are_what_white_space_parts():
  assert words("Das ist, ja, «ein» Theater!") == ["das", "ist", "ja", "«ein»",
                                                  "theater"]  # fmt: skip
  assert words("東京 です") == ["東京", "です"]
