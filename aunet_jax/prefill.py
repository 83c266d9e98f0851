"""Prompts in one parallel pass: rows of texts in, caches for decoding out.

Letters: B rows, L positions, S positions of a stage, W slots of a ring, G
key/value heads, K head dim, V vocabulary, N stages, Z splitting automaton
states.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax import step
from aunet_jax.aunet import AUNet
from aunet_jax.config import BOS, ModelConfig
from aunet_jax.layers import DECODE_CACHE


def bucket(size: int, parts: int = 8) -> int:
  """`size` rounded up to 16, 24, 32, …, 128, 144, …: few shapes, few compiles.

  Args: parts: most sizes from one power of two to the next.
  """
  power = 1 << max(4, (size - 1).bit_length() - 1)
  step = max(8, power // parts)
  return max(16, -(-size // step) * step)


def with_capacities(
  config: ModelConfig, capacities: tuple[int, ...]
) -> ModelConfig:
  """The same network for rows of another shape; parameters do not change."""
  stages = tuple(
    dataclasses.replace(stage, capacity=capacity)
    for stage, capacity in zip(config.stages, capacities, strict=True)
  )
  return dataclasses.replace(config, stages=stages)


class Rows(NamedTuple):
  """Texts as rows of the model: BOS, the bytes, padding."""

  bytes_BL: np.ndarray  # int32
  levels_BL: np.ndarray  # int8; BOS at the deepest level
  documents_BL: np.ndarray  # int32; 1, and 0 for padding
  counts_BN: np.ndarray  # int32: positions of every stage
  offset_BN: np.ndarray  # int32 (B, N - 1): of the last position of each stage
  splitter_BZ: np.ndarray  # int32: the automaton after the last byte

  @property
  def capacities(self) -> tuple[int, ...]:
    """Row shape that drops nothing: a bucket per stage."""
    sizes = [bucket(int(size)) for size in self.counts_BN.max(axis=0)]
    return tuple(np.minimum.accumulate(sizes).tolist())


def make_rows(texts: list[bytes], splitter, num_stages: int) -> Rows:
  """Splits texts on the host, where nothing can be dropped unseen."""
  B = len(texts)
  L = bucket(max(len(text) for text in texts) + 1)
  bytes_BL = np.full((B, L), BOS, np.int32)
  levels_BL = np.zeros((B, L), np.int8)
  levels_BL[:, 0] = num_stages - 1
  documents_BL = np.zeros((B, L), np.int32)
  counts_BN = np.zeros((B, num_stages), np.int32)
  offset_BN = np.zeros((B, num_stages - 1), np.int32)
  states = []
  for b, text in enumerate(texts):
    size = len(text) + 1
    levels, end = splitter.scan(np.frombuffer(text, np.uint8), splitter.start)
    states.append(np.asarray(end, np.int32))
    bytes_BL[b, 1:size] = np.frombuffer(text, np.uint8)
    levels_BL[b, 1:size] = levels
    documents_BL[b, :size] = 1
    levels = levels_BL[b, :size]
    for i in range(num_stages):
      counts_BN[b, i] = (levels >= i).sum()
      if i:
        # Positions of the finer stage that lie after its last boundary.
        last = np.flatnonzero(levels >= i)[-1]
        offset_BN[b, i - 1] = (levels[last + 1 :] >= i - 1).sum()
  return Rows(
    bytes_BL, levels_BL, documents_BL, counts_BN, offset_BN, np.stack(states)
  )


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
  for name, i in step.stack_names(config).items():
    attention = cache[name]["blocks"]["attention"]
    for kind, rings_of in (("keys", keys), ("values", values)):
      (history,) = attention[kind]
      rings_of[name] = [
        _ring(layer_BSGK, counts_BN[:, i], rings[i]) for layer_BSGK in history
      ]
  up = tuple(
    step.upsample(weights, config, i, last(f"coarse_{i + 1}", i))
    for i in range(1, N)
  )
  # Middle stages' encodings are rewritten before they are read.
  encoded = [last("encoded_1", 0)]
  for stage in config.stages[1:-1]:
    encoded.append(jnp.zeros((B, stage.dim), jnp.dtype(config.dtype)))
  return Prefilled(keys, values, tuple(encoded), up), logits_BLV
