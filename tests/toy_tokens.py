"""An untrained model of tokens, for tests of what scores text."""

import functools
import tempfile
from pathlib import Path

import jax

from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.data import tokenizer as tokenizer_lib
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.workdir import load

TEXT = b"the cat sat on the mat; the cat sat on that mat, that the cat sat on. "
LENGTH = 32  # tokens of a row, BOS among them


@functools.cache
def loaded() -> load.Loaded:
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "tokenizer.json"
    path.write_text(tokenizer_lib.train([TEXT * 9], 264))
    tokenizer = tokenizer_lib.Tokenizer(path)
  stage = config_lib.StageConfig(
    dim=16, num_layers=1, head_dim=8, window=None, capacity=LENGTH
  )
  config = config_lib.Config(
    model=config_lib.ModelConfig(
      stages=(stage,), vocab_size=tokenizer.vocab_size, dtype="float32"
    ),
    data=config_lib.DataConfig(tokenizer=tokenizer.path),
  )
  init = jax.jit(network.init_params, static_argnums=0)
  params = sharding.unbox(init(config.model, jax.random.key(0)))
  model = AUNet(config.model)
  return load.Loaded(model, params, Splitter(()), config, 0, tokenizer)
