"""MRPC: do two sentences mean the same?

  python -m aunet_jax.finetune_data mrpc --input=mrpc_val.jsonl \\
      --output=data/mrpc
  python -m aunet_jax.train --config=configs/mrpc.py --workdir=runs/mrpc
  python -m aunet_jax.answers --workdir=runs/mrpc \\
      --data=data/mrpc/heldout.jsonl --labels=yes,no

Begins with runs/quickstart. For another model, name its config and workdir:
--config=configs/mrpc.py:runs/mine/config.json \\
    --config.train.init_from=runs/mine
Reached: docs/finetuning.md, from the model of configs/base.py.
"""

import pathlib

from aunet_jax import config

QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")


def get_config(model=str(QUICKSTART)):
  return config.fine_tuning(model, "mrpc", num_steps=200, learning_rate=5e-4)
