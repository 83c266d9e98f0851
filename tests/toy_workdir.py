"""A workdir with an untrained tiny model, and texts to score with it."""

import jax

from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding
from aunet_jax.workdir import load

TEXTS = [
  b"One short document.",
  "Ein zweites, mit Umlauten: äöü, und 123 Zahlen.\n".encode(),
  b"\xff\xfe not UTF-8 \x80",
  b"word " * 60,  # longer than a row: cut
]


def new_params(config: config_lib.ModelConfig, key: jax.Array) -> dict:
  init = jax.jit(network.init_params, static_argnums=0)
  return sharding.unbox(init(config, key))


def write_workdir(folder):
  config = config_lib.parse_flags(["--config=tests/tiny.py"])
  params = new_params(config.model, jax.random.key(3))
  load.save_params(folder, config, params)
  return folder


def write_texts(folder):
  for i, text in enumerate(TEXTS):
    (folder / f"{i}.txt").write_bytes(text)
  return folder
