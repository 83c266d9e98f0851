"""Log-likelihoods of given texts, in batches, by the model's own forward pass.

What evaluation harnesses ask for: how likely is this continuation after that
context. Splitting never looks ahead, so nothing of the continuation leaks into
the levels of what comes before it.

Letters: B rows, L positions, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet.network import AUNet
from aunet_jax.config import EOS, ModelConfig
from aunet_jax.data.rows import make_rows


class Score(NamedTuple):
  """Of one continuation."""

  nats: float  # log-probability, <= 0, summed over its bytes
  num_bytes: int  # targets summed over, EOS included if asked for
  is_greedy: bool  # every byte was the most likely one


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, bytes_BL, levels_BL, documents_BL, targets_BL, config):
  logits_BLV = AUNet(config).apply(
    {"params": params}, bytes_BL, levels_BL, documents_BL
  )
  logprob_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
  logprob_BL = jnp.take_along_axis(logprob_BLV, targets_BL[:, :, None], axis=2)[
    :, :, 0
  ]
  return logprob_BL, logits_BLV.argmax(axis=-1) == targets_BL


def score(
  config: ModelConfig,
  params: dict,
  splitter,
  pairs: Sequence[tuple[bytes, bytes]],
  *,
  batch_size: int = 16,
  with_eos: bool = False,
) -> list[Score]:
  """Scores every (context, continuation); the context may be b"".

  Args: with_eos: also count that the document ends after the continuation.
  Returns: in the order of `pairs`. Pairs of similar length share a batch.
  Raises: ValueError for a pair longer than the model's positions.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1.")
  limit = config.position_limit
  for context, continuation in pairs:
    size = len(context) + len(continuation)
    if limit is not None and size + 1 > limit:
      raise ValueError(
        f"a context of {len(context)} and a continuation of "
        f"{len(continuation)} bytes are longer than the {limit - 1} bytes "
        f"this model has positions for; cut the context from the left."
      )
  order = sorted(
    range(len(pairs)), key=lambda n: len(pairs[n][0] + pairs[n][1])
  )
  scores: dict[int, Score] = {}
  for first in range(0, len(order), batch_size):
    numbers = order[first : first + batch_size]
    texts = [pairs[n][0] + pairs[n][1] for n in numbers]
    # A short last batch is filled up, so that it needs no program of its own.
    texts += [b""] * (batch_size - len(texts))
    rows = make_rows(texts, splitter, config.num_stages)
    targets_BL = np.full_like(rows.bytes_BL, EOS)
    targets_BL[:, :-1] = np.where(
      rows.documents_BL[:, 1:] > 0, rows.bytes_BL[:, 1:], EOS
    )
    logprob_BL, greedy_BL = jax.device_get(
      _forward(
        params,
        *rows[:3],
        targets_BL,
        config=config.with_capacities(rows.capacities),
      )
    )
    for b, n in enumerate(numbers):
      context, continuation = pairs[n]
      begin = len(context)
      end = begin + len(continuation) + int(with_eos)
      scores[n] = Score(
        nats=float(logprob_BL[b, begin:end].sum(dtype=np.float64)),
        num_bytes=end - begin,
        is_greedy=bool(greedy_BL[b, begin:end].all()),
      )
  return [scores[n] for n in range(len(pairs))]
