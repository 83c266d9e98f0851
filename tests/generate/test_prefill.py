"""Prompts in one pass: the caches' sizes, and the logits of the prompts."""

import jax
import numpy as np

from aunet_jax.aunet import network
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import ModelConfig, StageConfig
from aunet_jax.data.rows import make_rows
from aunet_jax.generate import prefill
from aunet_jax.splitting.splitter import Splitter
from tests.tiny_runs import new_params

CONFIG = ModelConfig(
  stages=(
    StageConfig(dim=16, num_layers=1, head_dim=8, window=8, capacity=64),
    StageConfig(
      dim=32, num_layers=1, head_dim=8, window=None, capacity=16, rule="word@1"
    ),
  ),
  dtype="float32",
)


def test_a_window_bounds_a_cache_and_a_stage_without_one_grows():
  short = prefill.cache_sizes(CONFIG, (32, 8), 16)
  long = prefill.cache_sizes(CONFIG, (32, 8), 512)
  assert short[0] == long[0] and short[0] >= 8
  assert short[1] >= 8 + 16 and long[1] >= 8 + 512


def test_prompts_have_the_logits_of_the_forward_pass():
  rows = make_rows([b"one two three", b"4"], Splitter(["word@1"]), 2)
  config = CONFIG.with_capacities(rows.capacities)
  params = new_params(config, jax.random.key(0))
  inputs = (rows.bytes_BL, rows.levels_BL, rows.documents_BL)
  slots = prefill.cache_sizes(config, config.capacities, 4)
  found, logits_BLV = prefill.prefill(
    params,
    network.make_weights(params, config),
    *inputs,
    rows.counts_BN,
    config=config,
    slots=slots,
  )
  expected_BLV = AUNet(config).apply({"params": params}, *inputs)
  np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=1e-4, atol=1e-5)
  assert set(found.caches) == set(network.stack_names(config))
