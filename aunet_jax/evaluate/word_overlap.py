"""How many words two answers share, as SQuAD's evaluation counts them.

Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of
Text", section 6.1: case, punctuation and articles do not count. Words are what
white space parts, in every language.
"""

import collections
import re
import string


def words(text: str) -> list[str]:
  """Without case, punctuation (of ASCII) and articles (of English)."""
  text = text.lower().translate(str.maketrans("", "", string.punctuation))
  return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(answer: str, expected: str) -> float:
  """Harmonic mean of precision and recall of words, in [0, 1]."""
  said, wanted = words(answer), words(expected)
  if not said or not wanted:
    return float(said == wanted)
  common = sum(
    (collections.Counter(said) & collections.Counter(wanted)).values()
  )
  return 2 * common / (len(said) + len(wanted))
