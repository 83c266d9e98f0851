"""AU-Net 2 of English, for fine-tuning: about an hour of two CPU cores.

  python -m aunet_jax.train --config=configs/base.py:data/lm \\
      --workdir=runs/base

The folder after the colon holds novels (eltec_eng.jsonl.xz, field `text`),
technical English (peps.jsonl.xz) and encyclopaedic text (enwik8_prefix.xml.xz);
any others are named with --config.data.train. The quickstart's recipe, a third
wider and a layer deeper. Reached: 1.772 held-out bits per byte (439,089 bytes;
gzip -9 2.571, xz -9 2.254) after 24 MB of text, in 1 h 25 min on two CPU cores
that other work shared. What it is after fine-tuning: docs/finetuning.md.
"""

from aunet_jax import config


def get_config(folder="data/lm"):
  c = config.default(
    stages=[
      config.stage(
        dim=128, num_layers=1, head_dim=32, window=64, capacity=1024
      ),
      config.stage(
        dim=256,
        num_layers=4,
        head_dim=32,
        window=None,
        capacity=224,
        rule="word@1",
      ),
    ]
  )
  c.model.dtype = "float32"  # bfloat16 is slow on CPUs
  c.model.ngram_rows = 8192
  c.data.train = [
    {"path": f"{folder}/eltec_eng.jsonl.xz", "weight": 2},
    {"path": f"{folder}/peps.jsonl.xz", "weight": 1},
    {"path": f"{folder}/enwik8_prefix.xml.xz", "weight": 1},
  ]
  c.data.separator = "</page>"  # of encyclopaedic articles
  c.data.heldout_fraction = 0.02
  c.train.num_steps = 6000
  c.train.batch_size = 4
  c.train.log_every_steps = 20
  c.train.eval_every_steps = 1000
  c.train.sample_prompt = "The "
  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 5e-3
  c.optimizer.warmup_steps = 100
  c.optimizer.clip_norm = 1.0
  c.checkpoint.every_steps = 200
  return c
