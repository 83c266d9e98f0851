"""SQuAD: the words of a paragraph that answer a question.

  python -m aunet_jax.finetune_data squad --input=squad.json --output=data/squad
  python -m aunet_jax.train --config=configs/squad.py --workdir=runs/squad
  python -m aunet_jax.answers --workdir=runs/squad \\
      --data=data/squad/heldout.jsonl

Begins with runs/quickstart. For another model, name its config and workdir:
--config=configs/squad.py:runs/mine/config.json \\
    --config.train.init_from=runs/mine
Reached: docs/finetuning.md, from the model of configs/base.py.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  return config.fine_tuning(model, "squad", num_steps=400, learning_rate=1e-3)
