"""Official checkpoints to a workdir and back, and what is refused."""

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_case import official, suffixes

import aunet_jax
from aunet_jax import config as config_lib
from aunet_jax.convert import __main__ as convert_main
from aunet_jax.convert import checkpoint, lingua
from aunet_jax.convert import weights as weights_lib
from aunet_jax.convert.weights import FORMATS, write_weights
from aunet_jax.evaluate import bits_per_byte
from aunet_jax.generate import __main__ as generate_main


@pytest.fixture
def directory(tmp_path):
  """A directory with weights.npz and params.json as an exporter leaves it."""
  weights, params = official()
  write_weights(tmp_path / "weights.npz", weights)
  (tmp_path / "params.json").write_text(json.dumps(params))
  return tmp_path


@pytest.mark.parametrize("suffix", suffixes())
def test_there_and_back_through_a_workdir(directory, suffix, capsys):
  source, workdir = directory / "weights.npz", directory / "run"
  args = [f"--from-lingua={source}", f"--workdir={workdir}"]
  assert convert_main.main(args) == 0
  assert "word@1" in capsys.readouterr().out
  target = directory / "out" / f"weights{suffix}"
  args = [f"--to-lingua={target}", f"--workdir={workdir}"]
  assert convert_main.main(args) == 0

  weights, params = official()
  back = weights_lib.read_weights(target)
  assert back.keys() == weights.keys()
  for key, value in weights.items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)
  written = json.loads((target.parent / "params.json").read_text())
  assert written["data"] == params["data"]
  # The arguments say the same as the original's.
  assert (
    lingua.from_lingua(back, written["model"])[0]
    == (lingua.from_lingua(weights, params["model"])[0])
  )


def test_a_converted_workdir_holds_the_official_function(directory):
  workdir = directory / "run"
  checkpoint.from_lingua(directory / "weights.npz", workdir)
  loaded = aunet_jax.load(workdir)
  assert loaded.splitter.levels(b"a b").tolist() == [0, 1, 0]
  weights, params = official()
  config, tree = lingua.from_lingua(weights, params["model"])
  config = checkpoint.with_rules(config, ["word@1"])
  # Documents are isolated, as in the official evaluation.
  expected = dataclasses.replace(config, document_mask=True)
  assert loaded.config.model == loaded.model.config == expected
  jax.tree.map(np.testing.assert_array_equal, loaded.params, tree)


def test_the_workdir_has_a_config_to_train_on(directory):
  for rules in (("word@1",), ("pretok",)):
    workdir = directory / rules[0]
    checkpoint.from_lingua(directory / "weights.npz", workdir, rules=rules)
    parsed = config_lib.parse_flags([f"--config={workdir / 'config.json'}"])
    assert parsed == aunet_jax.load(workdir).config


def test_a_files_name_is_never_code(directory):
  """It was written into a config.py, inside quotes that it could end."""
  name = 'x""";open("sprung","w").close();"""y.npz'
  shutil.copy(directory / "weights.npz", directory / name)
  workdir = directory / "run"
  checkpoint.from_lingua(directory / name, workdir)
  assert not list(workdir.rglob("*.py"))
  assert "sprung" not in (workdir / "config.json").read_text()


@pytest.mark.slow
def test_a_converted_workdir_evaluates_and_generates(directory, capsys):
  workdir, text = directory / "run", directory / "text.txt"
  checkpoint.from_lingua(directory / "weights.npz", workdir)
  text.write_text("Whatever it is, it has words in it.\n" * 3)
  scores = [
    bits_per_byte.evaluate_workdir(
      workdir, str(text), official_scoring=official
    )
    for official in (False, True)
  ]
  for score in scores:
    assert score["bytes"] == len(text.read_bytes())
    assert np.isfinite(score["bits_per_byte"])
  # The official evaluation leaves out the final norm.
  assert abs(scores[0]["nats"] - scores[1]["nats"]) > 1
  capsys.readouterr()
  args = [f"--workdir={workdir}", "--prompt=to be ", "--max_bytes=4"]
  assert generate_main.main([*args, "--temperature=0"]) == 0
  assert capsys.readouterr().out


def test_a_consolidated_directory_is_enough(directory):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  weights, _ = official()
  tensors = {
    key: torch.from_numpy(value).to(torch.bfloat16)
    for key, value in weights.items()
  }
  torch.save({"model": tensors}, directory / "consolidated.pth")
  checkpoint.from_lingua(directory, directory / "run")
  head = aunet_jax.load(directory / "run").params["head"]
  rounded = jnp.asarray(weights["vocab.weight"].T, jnp.bfloat16)
  np.testing.assert_array_equal(head, rounded.astype(jnp.float32))


def test_official_rows_are_explicit(directory):
  config = checkpoint.from_lingua(
    directory / "weights.npz", directory / "run", document_mask=False
  )
  assert not config.model.document_mask
  assert not aunet_jax.load(directory / "run").config.model.document_mask


def test_rules_may_be_given(directory):
  _, params = official()
  alone = directory / "model.json"
  alone.write_text(json.dumps(params["model"]))
  source = directory / "weights.npz"
  with pytest.raises(ValueError, match="--rules"):
    checkpoint.from_lingua(source, directory / "run", params=alone)
  config = checkpoint.from_lingua(
    source, directory / "run", params=alone, rules=("word@2",)
  )
  assert config.model.rules == ("word@2",)
  with pytest.raises(ValueError, match="needs 1 splitting rules"):
    checkpoint.from_lingua(
      source, directory / "other", params=alone, rules=("word@1", "word@2")
    )


def test_a_workdir_is_never_overwritten(directory):
  checkpoint.from_lingua(directory / "weights.npz", directory / "run")
  with pytest.raises(ValueError, match="holds a model already"):
    checkpoint.from_lingua(directory / "weights.npz", directory / "run")


# ----- refusals -------------------------------------------------------------


@pytest.mark.parametrize("suffix", suffixes()[:2])
def test_a_missing_weight_is_named_and_nothing_is_written(
  directory, suffix, capsys
):
  weights, _ = official()
  del weights["trunk.layers.1.feed_forward.w3.weight"]
  source = directory / f"short{suffix}"
  write_weights(source, weights)
  workdir = directory / "run"
  args = [f"--from-lingua={source}", f"--workdir={workdir}"]
  assert convert_main.main(args) == 2
  assert "trunk.layers.1.feed_forward.w3.weight" in capsys.readouterr().err
  assert not workdir.exists()


class Trap:
  """Makes a file when unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


def test_pickled_code_in_an_npz_is_refused_and_not_run(directory, capsys):
  sprung = directory / "sprung"
  weights, _ = official()
  weights["vocab.weight"] = np.array([Trap(sprung)], dtype=object)
  source = directory / "trap.npz"
  np.savez(source, **weights)
  args = [f"--from-lingua={source}", f"--workdir={directory / 'run'}"]
  assert convert_main.main(args) == 2
  assert "'vocab.weight'" in capsys.readouterr().err
  assert not sprung.exists()


def test_a_plain_pickle_is_refused_and_not_run(directory, capsys):
  sprung = directory / "sprung"
  content = pickle.dumps({"vocab.weight": Trap(sprung)})
  for suffix in FORMATS:
    source = directory / f"trap{suffix}"
    source.write_bytes(content)
    args = [f"--from-lingua={source}", f"--workdir={directory / 'run'}"]
    assert convert_main.main(args) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not sprung.exists()
  pickle.loads(content)  # the trap is a real one
  assert sprung.exists()


def test_pickled_code_in_a_pth_is_refused_and_not_run(directory, capsys):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  sprung, source = directory / "sprung", directory / "trap.pth"
  torch.save({"model": {"vocab.weight": Trap(sprung)}}, source)
  args = [f"--from-lingua={source}", f"--workdir={directory / 'run'}"]
  assert convert_main.main(args) == 2
  assert "not a file of plain tensors" in capsys.readouterr().err
  assert not sprung.exists()


@pytest.mark.parametrize(
  "content",
  ["{", "[1]", '{"model": 5}', "[" * 100_000, "\xff", '{"data": {"regex": 1}}'],
)
def test_broken_arguments_are_named(directory, content):
  (directory / "params.json").write_text(content)
  with pytest.raises(ValueError, match="params.json"):
    checkpoint.from_lingua(directory / "weights.npz", directory / "run")


def test_missing_files_are_named(directory, capsys):
  assert convert_main.main(["--from-lingua=no.npz", "--workdir=run"]) == 2
  assert "no.npz" in capsys.readouterr().err
  (directory / "params.json").unlink()
  with pytest.raises(ValueError, match="--params"):
    checkpoint.from_lingua(directory / "weights.npz", directory / "run")


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("layers", [10**9, 10**9], "no weight 'encoders.0.layers"),
    ("layers", [10**30, 1], "from 0 to 1,000,000,000"),
    ("layers", ["many", 1], "model.layers=many must be a whole number"),
    ("layers", [1.5, 1], "model.layers=1.5 must be a whole number"),
    ("layers", [True, 1], "model.layers=True"),
    ("layers", {}, "must be a list of 2 values"),
    ("dimensions", [10**7, 10**8], "has shape .* give"),
    ("dimensions", [[], {}], "model.dimensions"),
    ("head_dims", [None, None], "model.head_dims=None"),
    ("head_dims", [0, 0], "head_dim=0 must be 1 to"),
    ("max_seqlens", ["long", 1], "model.max_seqlens=long"),
    ("sliding_windows", "all", "must be a list of 2 values"),
    ("block", None, "model.block=None must be an object"),
    ("block", {"norm_eps": "small", "rope_theta": 1}, "block.norm_eps=small"),
    ("block", {"norm_eps": float("nan"), "rope_theta": 1}, "norm_eps=nan"),
    ("block", {"norm_eps": 1, "rope_theta": float("inf")}, "rope_theta=inf"),
    ("norm_eps", [], "model.norm_eps"),
    ("vocab_size", 10**9, "tok_embeddings.weight"),
    ("vocab_size", "all", "model.vocab_size=all"),
    ("lambda_level", "some", "model.lambda_level=some"),
    ("pooling_type", 5, "model.pooling_type=5 is not known"),
  ],
)
def test_arguments_that_no_model_has_are_one_line(
  directory, capsys, name, value, message
):
  _, params = official()
  params["model"][name] = value
  (directory / "params.json").write_text(json.dumps(params))
  args = [f"--from-lingua={directory / 'weights.npz'}", "--workdir=never"]
  assert convert_main.main(args) == 2
  said = capsys.readouterr().err
  assert re.search(message, said) and said.count("\n") == 1
  assert not Path("never").exists()


def test_nothing_is_read_before_the_arguments_agree(directory, monkeypatch):
  _, params = official()
  params["model"]["layers"] = [10**9, 10**9]
  (directory / "params.json").write_text(json.dumps(params))
  monkeypatch.setattr(weights_lib, "read_weights", None)
  with pytest.raises(ValueError, match="no weight"):
    checkpoint.from_lingua(directory / "weights.npz", directory / "run")
