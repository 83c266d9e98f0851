"""Translation, of one pair of languages or of many into English.

  python -m aunet_jax.finetune_data translate --input=NTREX-128 \\
      --output=data/translate --pairs='*-eng'
  python -m aunet_jax.train --config=configs/translate.py \\
      --workdir=runs/translate
  python -m aunet_jax.answers --workdir=runs/translate \\
      --data=data/translate/heldout.jsonl

Begins with runs/quickstart. For another model, name its config and workdir:
--config=configs/translate.py:runs/mine/config.json \\
    --config.train.init_from=runs/mine
Reached: not run yet.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  c = config.around_model(model)
  c.data.format = "completion"
  c.data.train = "data/translate/train.jsonl"
  c.data.heldout = "data/translate/heldout.jsonl"
  c.train.init_from = "runs/quickstart"
  c.train.num_steps = 400
  c.train.batch_size = 4
  c.train.eval_every_steps = 200
  c.train.sample_bytes = 0
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 20
  c.optimizer.weight_decay = 0.0
  c.optimizer.clip_norm = 1.0
  c.checkpoint.every_steps = 100
  return c
