"""Log-likelihoods of given texts, in batches, by the model's own forward pass.

What evaluation harnesses ask for: how likely is this continuation after that
context. Splitting never looks ahead, so nothing of the continuation leaks into
the levels of what comes before it. A model of tokens reads context and
continuation as the tokens of both in one; the continuation's are those that
hold a byte of it.

Letters: B rows, L positions, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet.network import AUNet
from aunet_jax.config import BOS, EOS, ModelConfig
from aunet_jax.data.rows import make_rows
from aunet_jax.data.tokenizer import Tokenizer


class Score(NamedTuple):
  """Of one continuation."""

  nats: float  # log-probability, <= 0, summed over its bytes or tokens
  num_bytes: int  # of it, and one for EOS if asked for
  is_greedy: bool  # every byte or token was the most likely one


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


def units(
  context: bytes, continuation: bytes, tokenizer: Tokenizer | None
) -> tuple[bytes | np.ndarray, int]:
  """What a model reads of both, and where the continuation begins in it."""
  text = context + continuation
  if tokenizer is None:
    return text, len(context)
  ids = tokenizer.encode(text)
  ends = np.cumsum(tokenizer.num_bytes[ids])
  return ids, int(np.searchsorted(ends, len(context), side="right"))


def score(
  config: ModelConfig,
  params: dict,
  splitter,
  pairs: Sequence[tuple[bytes, bytes]],
  *,
  batch_size: int = 16,
  with_eos: bool = False,
  tokenizer: Tokenizer | None = None,
) -> list[Score]:
  """Scores every (context, continuation); the context may be b"".

  Args:
    with_eos: also count that the document ends after the continuation.
    tokenizer: of a model of tokens.
  Returns: in the order of `pairs`. Pairs of similar length share a batch.
  Raises: ValueError for a pair longer than the model's positions.
  """
  limit, unit = (
    config.position_limit,
    "bytes" if tokenizer is None else "tokens",
  )
  texts = [units(*pair, tokenizer) for pair in pairs]
  for text, begin in texts:
    if limit is not None and len(text) + 1 > limit:
      raise ValueError(
        f"a context of {begin} and a continuation of {len(text) - begin} "
        f"{unit} are longer than the {limit - 1} {unit} this model has "
        f"positions for; cut the context from the left."
      )
  scores = score_units(
    config, params, splitter, texts, batch_size=batch_size, with_eos=with_eos,
    tokenizer=tokenizer,
  )  # fmt: skip
  return [
    Score(nats, len(continuation) + int(with_eos), is_greedy)
    for (_, continuation), (nats, is_greedy) in zip(pairs, scores, strict=True)
  ]


def score_units(
  config: ModelConfig,
  params: dict,
  splitter,
  texts: Sequence[tuple[bytes | np.ndarray, int]],
  *,
  batch_size: int = 16,
  with_eos: bool = False,
  tokenizer: Tokenizer | None = None,
) -> list[tuple[float, bool]]:
  """(nats, whether greedy) of texts as `units` gives them; see `score`."""
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1.")
  bos, eos = BOS, EOS
  if tokenizer is not None:
    bos, eos = tokenizer.bos, tokenizer.eos
  order = sorted(range(len(texts)), key=lambda n: len(texts[n][0]))
  scores: dict[int, tuple[float, bool]] = {}
  for first in range(0, len(order), batch_size):
    numbers = order[first : first + batch_size]
    some = [texts[n][0] for n in numbers]
    # A short last batch is filled up, so that it needs no program of its own.
    some += [b""] * (batch_size - len(some))
    rows = make_rows(some, splitter, config.num_stages, bos)
    targets_BL = np.full_like(rows.bytes_BL, eos)
    targets_BL[:, :-1] = np.where(
      rows.documents_BL[:, 1:] > 0, rows.bytes_BL[:, 1:], eos
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
      text, begin = texts[n]
      end = len(text) + int(with_eos)
      scores[n] = (
        float(logprob_BL[b, begin:end].sum(dtype=np.float64)),
        bool(greedy_BL[b, begin:end].all()),
      )
  return [scores[n] for n in range(len(texts))]
