"""Runs of the tiny model on a small corpus, for tests of training."""

import json
from pathlib import Path

import jax
import numpy as np

from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding
from aunet_jax.data import packing
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import __main__ as train_main

ROOT = Path(__file__).parents[1]
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"
TEXT = (
  "The byte is small. The word is longer, and a sentence of words is longer "
  "still; 1234 numbers count too.\n"
)


def write_corpus(folder: Path) -> Path:
  folder.mkdir()
  rng = np.random.default_rng(0)
  words = TEXT.split()
  for i in range(40):
    chosen = rng.choice(words, size=int(rng.integers(5, 200)))
    (folder / f"{i}.txt").write_text(" ".join(chosen) + f" {i}\n")
  return folder


def tiny(corpus=None, **overrides) -> config_lib.Config:
  flags = [f"--config.{k}={v}" for k, v in overrides.items()]
  if corpus is not None:
    flags += [
      f"--config.data.train={corpus}",
      "--config.data.heldout_fraction=0.1",
    ]
  return config_lib.parse_flags([TINY, *flags])


def run(corpus, workdir, *flags) -> int:
  return train_main.main(
    [
      TINY,
      f"--workdir={workdir}",
      f"--config.data.train={corpus}",
      "--config.data.heldout_fraction=0.1",
      *flags,
    ]
  )


def rows(workdir, *names) -> list[tuple]:
  """(step, loss_nats or held-out loss) of every logged row."""
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [
    (row["step"], row.get("loss_nats"), row.get("heldout_loss_nats"))
    for row in map(json.loads, lines)
  ]


def new_params(config: config_lib.ModelConfig, key: jax.Array) -> dict:
  init = jax.jit(network.init_params, static_argnums=0)
  return sharding.unbox(init(config, key))


def batch_of(corpus: Path) -> dict:
  """A batch of 8 rows of a corpus."""
  model = tiny().model
  documents = [p.read_bytes() for p in sorted(corpus.iterdir())]
  packed = packing.pack_documents(
    documents, Splitter(model.rules), model.capacities
  )
  return {
    name: np.stack([row[name] for row in packed[:8]]) for name in packed[0]
  }
