"""Rows of texts to read at once: every stage is counted."""

import numpy as np

from aunet_jax.data.rows import make_rows
from aunet_jax.splitting.splitter import Splitter


def test_rows_count_every_stage():
  splitter = Splitter(["word@1", "word@2"])
  rows = make_rows([b"one two three", b""], splitter, 3)
  levels = splitter.levels(b"one two three")
  assert rows.levels_BL[0, 1:14].tolist() == levels.tolist()
  assert rows.counts_BN[0].tolist() == [
    14,
    1 + int((levels >= 1).sum()),
    1 + int((levels >= 2).sum()),
  ]
  assert rows.counts_BN[1].tolist() == [1, 1, 1]
  assert rows.offset_BN[1].tolist() == [0, 0]
  assert rows.offset_BN[0, 0] == 13 - (1 + int(np.flatnonzero(levels)[-1]))
