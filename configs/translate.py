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
Reached: docs/finetuning.md, from the model of configs/base.py.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  return config.fine_tuning(
    model, "translate", num_steps=400, learning_rate=1e-3
  )
