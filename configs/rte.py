"""RTE: does a sentence follow from a text?

  python -m aunet_jax.finetune_data rte --input=rte_val.jsonl --output=data/rte
  python -m aunet_jax.train --config=configs/rte.py --workdir=runs/rte
  python -m aunet_jax.answers --workdir=runs/rte \\
      --data=data/rte/heldout.jsonl --labels=yes,no

Begins with runs/quickstart. For another model, name its config and workdir:
--config=configs/rte.py:runs/mine/config.json --config.train.init_from=runs/mine
Reached: not run yet.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  c = config.around_model(model)
  c.data.format = "completion"
  c.data.train = "data/rte/train.jsonl"
  c.data.heldout = "data/rte/heldout.jsonl"
  c.train.init_from = "runs/quickstart"
  c.train.num_steps = 200
  c.train.batch_size = 4
  c.train.eval_every_steps = 100
  c.train.sample_bytes = 0
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = 20
  c.optimizer.weight_decay = 0.0
  c.optimizer.clip_norm = 1.0
  c.checkpoint.every_steps = 100
  return c
