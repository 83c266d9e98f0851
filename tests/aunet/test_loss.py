"""Nats and counted targets, against their formulas.

Letters: B batch, L positions, V vocabulary.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import loss
from aunet_jax.config import EOS


def test_cross_entropy_is_its_formula_in_float32():
  rng = np.random.default_rng(0)
  logits_BLV = 3 * rng.normal(size=(2, 3, 5))
  targets_BL = rng.integers(0, 5, (2, 3))
  nats_BL = loss.cross_entropy(jnp.asarray(logits_BLV), jnp.asarray(targets_BL))
  assert nats_BL.dtype == jnp.float32
  for b, t in np.ndindex(2, 3):
    total = np.exp(logits_BLV[b, t]).sum()
    expected = -np.log(np.exp(logits_BLV[b, t, targets_BL[b, t]]) / total)
    np.testing.assert_allclose(nats_BL[b, t], expected, rtol=1e-5)


def test_targets_and_bytes_are_counted_where_they_weigh():
  batch = {
    "weights": jnp.array([[1.0, 1.0, 0.0, 1.0]]),
    "targets": jnp.array([[97, EOS, 98, 99]]),
  }
  targets, num_bytes = loss.count_targets(batch)
  assert targets == 3 and num_bytes == 2
  batch["target_bytes"] = jnp.array([[4, 0, 5, 6]])  # tokens
  targets, num_bytes = loss.count_targets(batch)
  assert targets == 3 and num_bytes == 10


def test_a_target_has_the_level_of_the_next_input_of_its_piece():
  documents_BL = jnp.array([[1, 1, 1, 2, 2, 0]])
  levels_BL = jnp.array([[2, 0, 1, 2, 1, 0]])
  targets_BL = jnp.array([[97, 98, EOS, 99, 100, 0]])
  level_BL, known_BL = loss.target_levels(levels_BL, documents_BL, targets_BL)
  # EOS is no boundary; what follows a cut piece is in another row.
  assert level_BL[0, :4].tolist() == [0, 1, 0, 1]
  assert known_BL.tolist() == [[1, 1, 1, 1, 0, 0]]
  assert known_BL.dtype == jnp.float32
  assert level_BL.shape == known_BL.shape == levels_BL.shape


def test_bits_per_byte_needs_a_byte():
  assert loss.bits_per_byte(2 * math.log(2), 4) == pytest.approx(0.5)
  assert loss.bits_per_byte(math.log(2), 1) == pytest.approx(1.0)
  with pytest.raises(ValueError, match="at least one byte"):
    loss.bits_per_byte(1.0, 0)


def test_level_targets_are_the_levels_of_the_next_bytes():
  levels_BL = jnp.array([[2, 0, 1, 2, 0, 0]])
  documents_BL = jnp.array([[1, 1, 1, 2, 2, 0]])
  targets_BL = jnp.array([[65, 66, config_lib.EOS, 65, 66, 0]])
  level_BL, known_BL = loss.target_levels(levels_BL, documents_BL, targets_BL)
  # The cut piece's last target (66, document 2) lies in another row.
  np.testing.assert_array_equal(known_BL, [[1, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(level_BL[0, :4], [0, 1, 0, 0])
