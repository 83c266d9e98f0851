"""SST-2: is a sentence of a film review positive or negative?

  python -m aunet_jax.finetune_data sst2 --input=sst2_val.jsonl \\
      --output=data/sst2
  python -m aunet_jax.train --config=configs/sst2.py --workdir=runs/sst2
  python -m aunet_jax.answers --workdir=runs/sst2 \\
      --data=data/sst2/heldout.jsonl --labels=positive,negative

Begins with runs/quickstart. For another model, name its config and workdir:
--config=configs/sst2.py:runs/mine/config.json \\
    --config.train.init_from=runs/mine
Reached, from the quickstart in one minute on two CPU cores: 0.60 of 90 held-out
sentences right, where always "negative" is right for 0.58: no better than
guessing, after a model of Python code.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  return config.fine_tuning(model, "sst2", num_steps=200, learning_rate=5e-4)
