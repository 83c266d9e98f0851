"""Computes the level of every byte, on the host and inside jit.

Read `splitter.py` first, then `rules.py`. Your own rule needs `Rule` and the
character classes named here (docs/splitting.md).
"""

from aunet_jax.splitting.rules import Rule
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.splitting.unicode_table import (
  DIGIT,
  IDEOGRAPH,
  LETTER,
  LETTERS,
  MALFORMED,
  MARK,
  NEWLINE,
  NUMBER,
  NUMBERS,
  OTHER,
  SPACE,
  SPACES,
  SYLLABIC,
  WHITESPACE,
)

__all__ = [
  "DIGIT",
  "IDEOGRAPH",
  "LETTER",
  "LETTERS",
  "MALFORMED",
  "MARK",
  "NEWLINE",
  "NUMBER",
  "NUMBERS",
  "OTHER",
  "SPACE",
  "SPACES",
  "SYLLABIC",
  "WHITESPACE",
  "Rule",
  "Splitter",
]
