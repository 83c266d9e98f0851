"""Titles of PEPs from the start of their bodies.

  python -m aunet_jax.finetune_data summarise --input=peps.jsonl.xz \\
      --output=data/summarise
  python -m aunet_jax.train --config=configs/summarise.py \\
      --workdir=runs/summarise
  python -m aunet_jax.answers --workdir=runs/summarise \\
      --data=data/summarise/heldout.jsonl

Begins with runs/quickstart. For another model, name its config and workdir:
--config=configs/summarise.py:runs/mine/config.json \\
    --config.train.init_from=runs/mine
Reached: docs/finetuning.md, from the model of configs/base.py.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  return config.fine_tuning(
    model, "summarise", num_steps=200, learning_rate=1e-3
  )
