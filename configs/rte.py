"""RTE: does a sentence follow from a text?

  python -m aunet_jax.finetune_data rte --input=rte_val.jsonl --output=data/rte
  python -m aunet_jax.train --config=configs/rte.py --workdir=runs/rte
  python -m aunet_jax.answers --workdir=runs/rte \\
      --data=data/rte/heldout.jsonl --labels=yes,no

Begins with runs/quickstart. For another model, name its config and workdir:
--config=configs/rte.py:runs/mine/config.json --config.train.init_from=runs/mine
Reached: docs/finetuning.md, from the model of configs/base.py.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  return config.fine_tuning(model, "rte", num_steps=200, learning_rate=5e-4)
