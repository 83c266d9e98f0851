"""Answers in the manner of a play.

  python -m aunet_jax.finetune_data dialogue --input=tinyshakespeare.txt \\
      --output=data/dialogue
  python -m aunet_jax.train --config=configs/dialogue.py --workdir=runs/dialogue
  python -m aunet_jax.answers --workdir=runs/dialogue \\
      --data=data/dialogue/heldout.jsonl

Begins with runs/quickstart. For another model, name its config and workdir:
--config=configs/dialogue.py:runs/mine/config.json \\
    --config.train.init_from=runs/mine
Reached: docs/finetuning.md, from the model of configs/base.py.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  c = config.fine_tuning(model, "dialogue", num_steps=400, learning_rate=1e-3)
  c.data.format = "chat"
  return c
