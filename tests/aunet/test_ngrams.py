"""N-grams against a plain loop over bytes."""

import dataclasses

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import ngrams

STAGE = config_lib.StageConfig(
  dim=8, num_layers=1, head_dim=4, window=4, capacity=16
)
MODEL = config_lib.ModelConfig(
  stages=(STAGE,), dtype="float32", ngram_rows=8, ngram_longest=5
)


def row_of(gram: list[int], table: int) -> int:
  """The hash in Python's integers, newest byte first."""
  key = 0x811C9DC5
  for x in reversed(gram):
    key = (key ^ (x + 1)) * 0x01000193 % 2**32
  key = (key ^ (key >> 15)) * 0x2C1B3C6D % 2**32
  key = (key ^ (key >> 12)) * 0x297A2D39 % 2**32
  return (key ^ (key >> 15)) % MODEL.ngram_rows + table * MODEL.ngram_rows


def test_every_byte_is_averaged_with_the_ngrams_that_end_at_it():
  rng = np.random.default_rng(0)
  bytes_L = rng.integers(0, 258, 12)
  documents_L = np.array([1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
  x_LD = rng.normal(size=(12, 8)).astype(np.float32)
  table = rng.normal(size=(3 * 8, 8)).astype(np.float32)
  found = ngrams.NGrams(MODEL).apply(
    {"params": {"table": table}}, x_LD[None], bytes_L[None], documents_L[None]
  )
  for t in range(12):
    start = 0 if t < 7 else 7
    before = [258] * 5 + bytes_L[start : t + 1].tolist()
    rows = [row_of(before[-n:], i) for i, n in enumerate((3, 4, 5))]
    expected = (x_LD[t] + table[rows].sum(axis=0)) / 4
    np.testing.assert_allclose(found[0, t], expected, rtol=1e-5, atol=1e-6)


def test_a_step_goes_on_where_a_row_ended():
  rng = np.random.default_rng(1)
  bytes_BL = rng.integers(0, 256, (2, 9))
  table = rng.normal(size=(3 * 8, 8)).astype(np.float32)
  x_BLD = rng.normal(size=(2, 9, 8)).astype(np.float32)
  whole = ngrams.NGrams(MODEL).apply(
    {"params": {"table": table}}, x_BLD, bytes_BL, np.ones_like(bytes_BL)
  )
  for count in (1, 3, 8):
    recent = ngrams.NGrams.fill(bytes_BL, np.array([count, count]), MODEL)
    assert recent.shape == (2, ngrams.reach(MODEL))
    y_CD, recent = ngrams.NGrams.step(
      table, MODEL, x_BLD[:, count], bytes_BL[:, count], recent
    )
    np.testing.assert_allclose(y_CD, whole[:, count], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(recent[:, -1], bytes_BL[:, count])


def test_rows_spread_over_a_table():
  model = dataclasses.replace(MODEL, ngram_rows=64, ngram_longest=3)
  grams = np.stack(np.meshgrid(*[np.arange(97, 113)] * 3), axis=-1)
  rows = np.asarray(ngrams.rows(grams.reshape(-1, 3), model))[:, 0]
  counts = np.bincount(rows, minlength=64)  # 4096 n-grams: 64 a row
  assert len(counts) == 64
  assert counts.min() > 32 and counts.max() < 108


def test_none_means_no_parameters_and_no_reach():
  model = dataclasses.replace(MODEL, ngram_rows=0)
  assert ngrams.reach(model) == 0
  recent = jax.eval_shape(
    lambda: ngrams.NGrams.fill(
      np.zeros((2, 3), np.int32), np.array([3, 1]), model
    )
  )
  assert recent.shape == (2, 0)


@pytest.mark.parametrize(
  "field, value, says",
  [
    ("ngram_rows", 1000, "power of two; try 1024"),
    ("ngram_rows", -1, "ngram_rows"),
    ("ngram_longest", 2, "ngram_longest=2"),
  ],
)
def test_bad_sizes_are_refused(field, value, says):
  with pytest.raises(ValueError, match=says):
    dataclasses.replace(MODEL, **{field: value})
