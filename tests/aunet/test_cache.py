"""Rows of a block taken and put back, row B being none."""

import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax.aunet import cache


def test_a_block_takes_its_rows_and_the_batch_itself():
  x_B = jnp.array([10, 11, 12])
  assert cache.take(x_B, jnp.array([2, 0])).tolist() == [12, 10]
  rows_C = jnp.array([0, 3, 2])  # a block as large as the batch keeps places
  assert cache.take(x_B, rows_C).tolist() == [10, 11, 12]


@pytest.mark.parametrize(
  ("rows", "expected"),
  [([2, 3], [[0, 0], [0, 0], [7, 7]]), ([0, 3, 2], [[7, 7], [0, 0], [9, 9]])],
)
def test_put_writes_rows_that_are_there(rows, expected):
  value_CD = jnp.array([[7.0, 7.0], [8.0, 8.0], [9.0, 9.0]])[: len(rows)]
  put = cache.put(jnp.zeros((3, 2), jnp.int32), jnp.array(rows), value_CD)
  assert put.dtype == jnp.int32 and put.tolist() == expected


@pytest.mark.parametrize("rows", [[2, 3], [0, 3, 2]])
def test_put_slot_writes_one_slot_of_a_ring(rows):
  ring_BGWK = jnp.zeros((3, 1, 2, 1))
  slot_C = jnp.array([1, 0, 0])[: len(rows)]
  value_CGK = jnp.arange(1.0, 1 + len(rows))[:, None, None]
  ring_BGWK = cache.put_slot(ring_BGWK, jnp.array(rows), slot_C, value_CGK)
  expected = np.zeros((3, 2))
  for row, slot, value in zip(rows, slot_C, value_CGK, strict=True):
    if row < 3:
      expected[row, slot] = value[0, 0]
  np.testing.assert_array_equal(ring_BGWK[:, 0, :, 0], expected)
