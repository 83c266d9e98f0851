"""Loading refuses what a checkpoint was not trained with."""

import jax
import numpy as np
import pytest

from aunet_jax.splitting.splitter import Splitter
from aunet_jax.workdir import layout, load
from tests.tiny_runs import new_params, tiny


def test_a_changed_splitting_table_is_refused():
  host = {"splitter_hash": "0123"}
  with pytest.raises(layout.CheckpointError, match="split text differ"):
    load.check_splitter(host, Splitter(["word@1"]))


def test_a_tokenizer_where_there_was_none_is_refused():
  load.check_tokenizer({}, None)
  with pytest.raises(layout.CheckpointError, match="tokens of tokenizer 0123"):
    load.check_tokenizer({"tokenizer_hash": "0123"}, None)


def test_a_workdir_without_a_checkpoint_says_when_there_will_be_one(tmp_path):
  layout.write_config(tmp_path, tiny())
  with pytest.raises(layout.CheckpointError, match="has no checkpoint yet"):
    load.load(tmp_path)


def test_a_saved_model_comes_back_as_it_was(tmp_path):
  params = new_params(tiny().model, jax.random.key(0))
  load.save_params(tmp_path, tiny(), params)
  loaded = load.load(tmp_path)
  assert loaded.step == 0 and loaded.splitter.hash == Splitter(["word@1"]).hash
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
