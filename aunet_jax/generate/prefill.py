"""Prompts in one parallel pass: rows of texts in, caches for decoding out.

Letters: B rows, L positions, S positions of a stage, W slots of a ring, G
key/value heads, K head dim, V vocabulary, N stages, Z splitting automaton
states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aunet_jax.aunet import network, transition
from aunet_jax.aunet.block import DECODE_CACHE
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import ModelConfig
from aunet_jax.data.rows import bucket


def _ring(history_BSGK, counts_B, ring_size):
  """The last positions of each row at their slots, (B, G, W, K)."""
  last_B1 = counts_B[:, None] - 1
  slot_1W = jnp.arange(ring_size)[None]
  position_BW = last_B1 - (last_B1 - slot_1W) % ring_size  # < 0: empty slot
  ring_BWGK = jnp.take_along_axis(
    history_BSGK, jnp.maximum(position_BW, 0)[:, :, None, None], axis=1
  )
  return ring_BWGK.transpose(0, 2, 1, 3)


def ring_sizes(
  config: ModelConfig, capacities: tuple[int, ...], max_bytes: int
) -> tuple[int, ...]:
  """Slots of each stage's ring: its window, or all positions if fewer.

  Every new byte may end a segment, so any stage may get `max_bytes` more. Few
  sizes, since the loop takes longer to compile than a prompt's pass.
  """
  sizes = [bucket(capacity + max_bytes, parts=2) for capacity in capacities]
  return tuple(
    size if stage.window is None else min(stage.window, size)
    for stage, size in zip(config.stages, sizes, strict=True)
  )


class Prefilled(NamedTuple):
  """The part of a `State` that the prompts determine."""

  keys: dict
  values: dict
  encoded: tuple
  up: tuple


def prefill(
  params: dict,
  weights: dict,
  bytes_BL: jax.Array,
  levels_BL: jax.Array,
  documents_BL: jax.Array,
  counts_BN: jax.Array,
  *,
  config: ModelConfig,
  rings: tuple[int, ...],
) -> tuple[Prefilled, jax.Array]:
  """One parallel pass over prompts of different lengths.

  Args: config: with capacities that drop nothing (`Rows.capacities`).
  Returns: what decoding continues from, and logits_BLV of the prompts.
  """
  logits_BLV, variables = AUNet(config).apply(
    {"params": params},
    bytes_BL,
    levels_BL,
    documents_BL,
    mutable=[DECODE_CACHE],
  )
  cache = variables[DECODE_CACHE]
  B, N = counts_BN.shape

  def last(name, i):  # the newest vector of stage i + 1
    (x_BSD,) = cache[name]
    index_B11 = counts_BN[:, i][:, None, None] - 1
    return jnp.take_along_axis(x_BSD, index_B11, axis=1)[:, 0]

  keys, values = {}, {}
  for name, i in network.stack_names(config).items():
    attention = cache[name]["blocks"]["attention"]
    for kind, rings_of in (("keys", keys), ("values", values)):
      (history,) = attention[kind]
      rings_of[name] = [
        _ring(layer_BSGK, counts_BN[:, i], rings[i]) for layer_BSGK in history
      ]
  up = tuple(
    transition.upsample(weights, config, i, last(f"coarse_{i + 1}", i))
    for i in range(1, N)
  )
  # Middle stages' encodings are rewritten before they are read.
  encoded = [last("encoded_1", 0)]
  for stage in config.stages[1:-1]:
    encoded.append(jnp.zeros((B, stage.dim), jnp.dtype(config.dtype)))
  return Prefilled(keys, values, tuple(encoded), up), logits_BLV
