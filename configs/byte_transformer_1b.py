"""The flat byte Transformer baseline, 1.286 B parameters.

  python -m aunet_jax.train --config=configs/byte_transformer_1b.py \\
      --workdir=runs/byte_transformer_1b \\
      --config.data.train=PATH --config.mesh.fsdp=NUM_DEVICES

Shape: Table 9. Optimizer: Tables 6 and 11. Table 10 leaves the number of GPUs
open; 256 rows of 4096 bytes are those of the BPE run beside it (4 rows on each
of 64 GPUs).

Not run yet.
"""

from aunet_jax import config


def get_config():
  c = config.default(
    stages=[
      config.stage(
        dim=2048,
        num_layers=25,
        head_dim=128,
        window=None,
        capacity=4096,
        remat="dots",
      ),
    ]
  )
  c.train.num_steps = 60000
  c.train.batch_size = 256
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 5000
  c.optimizer.weight_decay = 0.033
  c.train.eval_every_steps = 5000
  c.train.eval_bytes = 32_000_000  # a sample: minutes at most, not hours
  c.checkpoint.every_steps = 5000
  c.checkpoint.milestone_steps = 20_000
  return c
