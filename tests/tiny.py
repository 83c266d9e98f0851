"""The smallest AU-Net 2 that trains, for tests of the trainer.

  python -m aunet_jax.train --config=tests/tiny.py --workdir=/tmp/tiny

Reached: nothing worth quoting; it exists to run in seconds.
"""

from aunet_jax import config


def get_config():
  c = config.default(
    stages=[
      config.stage(dim=32, num_layers=1, head_dim=16, window=16, capacity=128),
      config.stage(
        dim=64,
        num_layers=1,
        head_dim=16,
        window=None,
        capacity=32,
        rule="word@1",
      ),
    ]
  )
  c.model.dtype = "float32"
  c.train.num_steps = 12
  c.train.batch_size = 8
  c.train.log_every_steps = 2
  c.train.sample_bytes = 0
  c.train.tensorboard = False
  c.optimizer.warmup_steps = 2
  c.checkpoint.every_steps = 3
  return c


def for_budget(budget):
  """The same for a scaling study, whatever the budget."""
  c = get_config()
  c.train.num_steps = 6
  return c
