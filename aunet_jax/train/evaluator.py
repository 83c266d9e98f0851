"""Held-out text, evaluated while a model trains."""

import functools
from collections.abc import Callable

import jax

from aunet_jax.aunet import sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import Config, ModelConfig
from aunet_jax.data import corpora, loader
from aunet_jax.evaluate import bits_per_byte


class _Stopped(Exception):
  """Carries a stop past the sums of the batches before it."""


@functools.cache  # the network is traced for it
def _eval_step(config: ModelConfig, mesh: jax.sharding.Mesh) -> Callable:
  return jax.jit(
    bits_per_byte.make_eval_step(AUNet(config)),
    out_shardings=sharding.replicated(mesh),
  )


class Evaluator:
  """Says when to evaluate, and does."""

  def __init__(
    self,
    config: Config,
    heldout: corpora.Corpus | None,
    mesh: jax.sharding.Mesh,
  ):
    self._config, self._heldout, self._mesh = config.train, heldout, mesh
    self._step = _eval_step(config.model, mesh)

  def due(self, step: int) -> bool:
    if self._heldout is None:
      return False
    every = self._config.eval_every_steps
    return step == self._config.num_steps or (every > 0 and step % every == 0)

  def evaluate(self, params, go_on: Callable[[], bool]) -> dict | None:
    """Corpus totals, as `bits_per_byte.evaluate_batches`.

    Args: go_on: asked before every batch.
    Returns: None where it was told to stop.
    """
    share_index, share_count = sharding.batch_share(self._mesh)
    batches = loader.evaluation_batches(
      self._heldout,
      batch_size=self._config.batch_size,
      share_index=share_index,
      share_count=share_count,
      max_bytes=self._config.eval_bytes,
    )

    def until_stopped():
      for batch in batches:
        if not go_on():
          raise _Stopped
        yield batch

    try:
      return bits_per_byte.evaluate_batches(
        self._step, params, until_stopped(), self._mesh
      )
    except _Stopped:
      return None
