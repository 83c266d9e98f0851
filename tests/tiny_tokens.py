"""The smallest model of tokens that trains, for tests of the trainer.

  python -m aunet_jax.train --config=tests/tiny_tokens.py --workdir=/tmp/tiny \
      --config.data.tokenizer=tokenizer.json --config.model.vocab_size=282

Reached: nothing worth quoting; it exists to run in seconds.
"""

from aunet_jax import config
from tests import tiny


def get_config():
  c = tiny.get_config()
  c.model.stages = (
    config.stage(dim=32, num_layers=1, head_dim=16, window=None, capacity=64),
  )
  return c
