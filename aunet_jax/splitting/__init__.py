"""Bytes to the level of every byte, on the host and inside jit.

Read `splitter.py` first, then `rules.py`.
"""

from aunet_jax.splitting.rules import Rule
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.splitting.unicode_table import (
  LETTER,
  NEWLINE,
  NUMBER,
  OTHER,
  WHITESPACE,
)

__all__ = [
  "LETTER",
  "NEWLINE",
  "NUMBER",
  "OTHER",
  "WHITESPACE",
  "Rule",
  "Splitter",
]
