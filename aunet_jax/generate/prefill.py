"""Prompts in one parallel pass: rows of texts in, caches for decoding out.

Letters: B rows, L positions, S positions of a stage, D width, V vocabulary, N
stages, O offsets.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aunet_jax.aunet import network
from aunet_jax.aunet.block import Stack, mixer_of
from aunet_jax.aunet.cache import HISTORY
from aunet_jax.aunet.network import AUNet
from aunet_jax.aunet.ngrams import NGrams
from aunet_jax.config import ModelConfig
from aunet_jax.data.rows import bucket


def cache_sizes(
  config: ModelConfig, capacities: tuple[int, ...], max_bytes: int
) -> tuple[int, ...]:
  """Slots of each stage's caches, for prompts of these capacities.

  Every new byte may end a segment, so any stage may get `max_bytes` more. Few
  sizes, since the loop takes longer to compile than a prompt's pass.
  """
  return tuple(
    mixer_of(stage).cache_slots(stage, bucket(capacity + max_bytes, parts=2))
    for stage, capacity in zip(config.stages, capacities, strict=True)
  )


class Prefilled(NamedTuple):
  """The part of a `State` that the prompts determine."""

  caches: dict
  encoded_BD: tuple
  up_BOD: tuple
  recent_BM: jax.Array  # int32: the newest bytes, as n-grams need them


def prefill(
  params: dict,
  weights: dict,
  bytes_BL: jax.Array,
  levels_BL: jax.Array,
  documents_BL: jax.Array,
  counts_BN: jax.Array,
  *,
  config: ModelConfig,
  slots: tuple[int, ...],
  again: bool = False,
) -> tuple[Prefilled, jax.Array]:
  """One parallel pass over prompts of different lengths.

  Args: config: with capacities that drop nothing (`Rows.capacities`). slots: of
    each stage's caches (`cache_sizes`). again: whether the loop begins with
    reading the newest byte, which the byte stage's caches then lack.
  Returns: what decoding continues from, and logits_BLV of the prompts.
  """
  logits_BLV, variables = AUNet(config).apply(
    {"params": params},
    bytes_BL,
    levels_BL,
    documents_BL,
    mutable=[HISTORY],
  )
  history = variables[HISTORY]
  B, N = counts_BN.shape

  def last(name, i):  # the newest vector of stage i + 1
    (x_BSD,) = history[name]
    index_B11 = counts_BN[:, i][:, None, None] - 1
    return jnp.take_along_axis(x_BSD, index_B11, axis=1)[:, 0]

  caches = {}
  for name, i in network.stack_names(config).items():
    count_B = counts_BN[:, i]
    # The loop begins with the newest position of these.
    if name == "expand_1" or (again and i == 0):
      count_B -= 1
    stage = config.stages[i]
    caches[name] = Stack.fill(history[name], stage, count_B, slots[i])
  up_BOD = tuple(
    network.upsample(weights, config, i, last(f"coarse_{i + 1}", i))
    for i in range(1, N)
  )
  # Middle stages' encodings are rewritten before they are read.
  encoded_BD = [last("encoded_1", 0)]
  for stage in config.stages[1:-1]:
    encoded_BD.append(jnp.zeros((B, stage.dim), jnp.dtype(config.dtype)))
  recent_BM = NGrams.fill(bytes_BL, counts_BN[:, 0] - again, config)
  return (
    Prefilled(caches, tuple(encoded_BD), up_BOD, recent_BM),
    logits_BLV,
  )
