"""AU-Net 2 8B (the paper's 7B row), 7.961 B parameters.

  python -m aunet_jax.train --config=configs/aunet2_8b.py \\
      --workdir=runs/aunet2_8b \\
      --config.data.train=PATH --config.mesh.fsdp=NUM_DEVICES

Shapes: Table 9. Batch and steps: Table 10. Optimizer: Tables 6 and 11.
The capacities below stage 1 are the ones that reproduce the paper's FLOPs per
byte in Table 10. Rows here are filled until a stage is full, so no boundary is
cut; `python -m aunet_jax.prepare` suggests capacities for other text.
Table 10 prints 128 rows a step beside 4.2e6 bytes; 512 rows agree with its
bytes per step and total FLOPs. The camera-ready text says 33 layers; the 32 of
Table 9 reproduce the model's size.

Not run yet.
"""

from aunet_jax import config


def get_config():
  c = config.default(
    stages=[
      config.stage(
        dim=1024,
        num_layers=3,
        head_dim=64,
        window=512,
        capacity=8192,
        ffn_dim=4096,
        remat="dots",
      ),
      config.stage(
        dim=4096,
        num_layers=32,
        head_dim=128,
        window=4096,
        capacity=1664,
        rule="word@1",
        ffn_dim=14336,
        remat="dots",
      ),
    ]
  )
  c.train.num_steps = 277834
  c.train.batch_size = 512
  c.optimizer.learning_rate = 8.18e-4
  c.optimizer.warmup_steps = 5000
  c.optimizer.weight_decay = 0.1
  c.train.eval_every_steps = 5000
  c.train.eval_bytes = 32_000_000  # a sample: minutes at most, not hours
  c.checkpoint.every_steps = 5000
  c.checkpoint.milestone_steps = 20_000
  return c
