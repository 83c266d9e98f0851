"""AU-Net 2 for a laptop CPU: from nothing to a sample in minutes.

  python -m aunet_jax.train --config=configs/quickstart.py \\
      --workdir=runs/quickstart

Trains on the text that ships with Python, with two options beside the paper's
recipe: Muon, and hash embeddings of byte n-grams (docs/recipe.md). Reached:
1.580 bits per byte over the held-out 198,838 bytes (gzip -9 1.936, xz -9
1.731); with Muon alone 1.695, with AdamW at a rate of 4e-3, 1.905.
"""

from aunet_jax import config


def get_config():
  c = config.default(
    stages=[
      config.stage(dim=96, num_layers=1, head_dim=32, window=64, capacity=1024),
      config.stage(
        dim=192,
        num_layers=3,
        head_dim=32,
        window=None,
        capacity=180,
        rule="word@1",
      ),
    ]
  )
  c.model.dtype = "float32"  # bfloat16 is slow on CPUs
  c.data.heldout_fraction = 0.03
  c.train.num_steps = 1500
  c.train.batch_size = 4
  c.train.log_every_steps = 20
  c.train.eval_every_steps = 250
  c.train.sample_prompt = "def "
  c.model.ngram_rows = 4096
  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 6e-3
  c.optimizer.warmup_steps = 60
  c.optimizer.clip_norm = 1.0
  c.checkpoint.every_steps = 100
  return c
