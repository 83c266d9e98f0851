"""Heads after the first: what they read, what they are taught, one position."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import loss, network
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import EOS
from aunet_jax.train.step import loss_sums
from tests.generate import test_decode as decoding

L = 24


@functools.cache
def model_and_params():
  return decoding.make_model(2, heads=3, heads_loss_weight=0.5, logit_cap=3.0)


def make_batch() -> dict[str, np.ndarray]:
  """A whole piece, one that is cut, one of EOS alone, and padding."""
  rng = np.random.default_rng(0)
  documents = [1] * 9 + [2] * 8 + [3] + [0] * 6
  targets = rng.integers(97, 123, L)
  targets[[8, 17]] = EOS
  weights = np.array([1] * 5 + [0] * 2 + [1] * 11 + [0] * 6)
  batch = {
    "bytes": np.roll(targets, 1), "targets": targets, "weights": weights,
    "levels": np.arange(L) % 3 == 0, "documents": documents,
  }  # fmt: skip
  return {k: np.asarray(v, np.int32)[None] for k, v in batch.items()}


@functools.partial(jax.jit, static_argnames="config")
def predict(params, batch, config):
  with jax.default_matmul_precision("highest"):
    return AUNet(config).apply(
      {"params": params},
      batch["bytes"],
      batch["levels"],
      batch["documents"],
      batch["targets"],
    )


def test_a_head_reads_the_bytes_before_its_own_and_no_other():
  config, params = model_and_params()
  batch = make_batch()
  before = predict(params, batch, config)
  assert [x.shape for x in before.ahead_BLV] == [(1, L, config.vocab_size)] * 2
  j = 12
  changed = batch["targets"].copy()
  changed[0, j] = 65
  after = predict(params, batch | {"targets": changed}, config)
  # The input bytes are as they were: a target is read by later heads alone.
  np.testing.assert_array_equal(before.logits_BLV, after.logits_BLV)
  for k, (x, y) in enumerate(
    zip(before.ahead_BLV, after.ahead_BLV, strict=True), start=2
  ):
    moved_L = np.abs(x - y).max(axis=-1)[0] > 0
    np.testing.assert_array_equal(
      np.flatnonzero(moved_L), np.arange(j - k + 2, j + 1)
    )


def test_one_position_is_that_of_a_row():
  config, params = model_and_params()
  batch = make_batch()
  expected = predict(params, batch, config).ahead_BLV
  weights = network.make_weights(params, config)
  # Through a head that is the identity comes the state before it.
  D, V = params["head"].shape
  bare = dataclasses.replace(config, logit_cap=None, final_norm=False)
  through = params | {"head": jnp.pad(jnp.eye(D), ((0, 0), (0, V - D)))}
  h_LD = predict(through, batch, bare).logits_BLV[0, :, :D]
  t = 3
  h_CD = h_LD[t][None]
  for k in (2, 3):
    byte_C = batch["targets"][0, t + k - 2][None]
    h_CD = network.ahead(weights, config, k, h_CD, byte_C)
    found_CV = network.logits(weights, config, h_CD)
    np.testing.assert_allclose(
      found_CV[0], expected[k - 2][0, t], atol=decoding.TOLERANCE
    )


def test_targets_end_with_their_piece():
  batch = make_batch()
  (documents,), (targets,) = batch["documents"], batch["targets"]
  for ahead in (1, 2):
    found, weights = loss.targets_ahead(batch, ahead)
    for t in range(L):
      known = t + ahead < L and documents[t] == documents[t + ahead] != 0
      expected = batch["weights"][0, t + ahead] if known else 0
      assert weights[0, t] == expected
      if expected:
        assert found[0, t] == targets[t + ahead]


def test_the_loss_is_the_first_heads_and_a_share_of_the_others():
  config, params = model_and_params()
  batch = make_batch()
  predicted = predict(params, batch, config)
  objective, (nats, level_nats, ahead_nats) = jax.jit(
    loss_sums, static_argnums=0
  )(AUNet(config), params, batch, jnp.float32(7))
  log_p = jax.nn.log_softmax(predicted.logits_BLV, axis=-1)[0]
  weights = batch["weights"][0]
  expected = -sum(
    log_p[t, batch["targets"][0, t]] * weights[t] for t in range(L)
  )
  assert float(nats) == pytest.approx(float(expected), rel=1e-4)
  for ahead, logits_BLV in enumerate(predicted.ahead_BLV, start=1):
    target_BL, weight_BL = loss.targets_ahead(batch, ahead)
    log_p = jax.nn.log_softmax(logits_BLV, axis=-1)[0]
    expected = -sum(
      log_p[t, target_BL[0, t]] * weight_BL[0, t] for t in range(L)
    )
    found = float(ahead_nats[ahead - 1])
    assert found == pytest.approx(float(expected), rel=1e-4)
  assert level_nats == 0
  weighted = float(nats + 0.5 * sum(ahead_nats)) / 7
  assert float(objective) == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize(
  ("setting", "says"),
  [("heads=0", "1 to 4"), ("heads=5", "1 to 4"),
   ("heads_loss_weight=-1", "at least 0")],
)  # fmt: skip
def test_bad_settings_are_refused(setting, says):
  with pytest.raises(
    ValueError, match=f"model.{setting.partition('=')[0]}=.*{says}"
  ):
    config_lib.parse_flags(
      ["--config=tests/tiny.py", f"--config.model.{setting}"]
    )
