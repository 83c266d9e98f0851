"""AU-Net 2 1B, 1.324 B parameters, 60 B token equivalents.

  python -m aunet_jax.train --config=configs/aunet2_1b.py \\
      --workdir=runs/aunet2_1b \\
      --config.data.train=PATH --config.mesh.fsdp=NUM_DEVICES

Shapes: Table 9. Batch and steps: Table 10. Optimizer: Tables 6 and 11.
The capacities below stage 1 are the ones that reproduce the paper's FLOPs per
byte in Table 10. Rows here are filled until a stage is full, so no boundary is
cut; `python -m aunet_jax.prepare` suggests capacities for other text.

Not run yet.
"""

from aunet_jax import config


def get_config():
  c = config.default(
    stages=[
      config.stage(
        dim=512,
        num_layers=3,
        head_dim=64,
        window=512,
        capacity=8192,
        remat="dots",
      ),
      config.stage(
        dim=2048,
        num_layers=25,
        head_dim=128,
        window=4096,
        capacity=1664,
        rule="word@1",
        remat="dots",
      ),
    ]
  )
  c.train.num_steps = 180000
  c.train.batch_size = 192
  c.optimizer.learning_rate = 1.65e-3
  c.optimizer.warmup_steps = 10000
  c.optimizer.weight_decay = 0.1
  c.train.eval_every_steps = 5000
  c.train.eval_bytes = 32_000_000  # a sample: minutes at most, not hours
  c.checkpoint.every_steps = 5000
  c.checkpoint.milestone_steps = 20_000
  return c
