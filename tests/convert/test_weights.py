"""Official checkpoints on disk: formats, refusals, and the way to a workdir."""

import dataclasses
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aunet_jax
from aunet_jax import config as config_lib
from aunet_jax.convert import __main__ as convert_main
from aunet_jax.convert import lingua
from aunet_jax.convert.weights import FORMATS, read_weights, write_weights
from aunet_jax.evaluate import bits_per_byte
from aunet_jax.generate import __main__ as generate_main

CASE = Path(__file__).parents[1] / "golden" / "official" / "g01_2st_indexed"


def official():
  """(weights, content of a params.json) of a recorded model."""
  arrays = np.load(CASE.with_suffix(".npz"))
  weights = {k[2:]: arrays[k] for k in arrays.files if k.startswith("w.")}
  arguments = json.loads(CASE.with_suffix(".json").read_text())["model"]
  strategy = {"word1": "1@1"}
  params = {"model": arguments, "data": {"regex": {"strategy": strategy}}}
  return weights, params


@pytest.fixture
def directory(tmp_path):
  """A directory with weights.npz and params.json as an exporter leaves it."""
  weights, params = official()
  write_weights(tmp_path / "weights.npz", weights)
  (tmp_path / "params.json").write_text(json.dumps(params))
  return tmp_path


def suffixes():
  def mark(module):
    try:
      __import__(module)
    except ImportError:
      return pytest.mark.skip(reason=f"{module} is not installed")
    return ()

  return [
    ".npz",
    pytest.param(".safetensors", marks=mark("safetensors")),
    pytest.param(".pth", marks=mark("torch")),
  ]


@pytest.mark.parametrize("suffix", suffixes())
def test_files_keep_every_bit(tmp_path, suffix):
  weights, _ = official()
  weights["transitions.0.expand_idx"] = np.arange(5)  # an integer buffer
  path = tmp_path / f"weights{suffix}"
  write_weights(path, weights)
  back = read_weights(path)
  assert back.keys() == weights.keys()
  for key, value in weights.items():
    assert back[key].dtype == value.dtype
    np.testing.assert_array_equal(back[key], value)


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
  back = read_weights(target)
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
  convert_main.from_lingua(directory / "weights.npz", workdir)
  loaded = aunet_jax.load(workdir)
  assert loaded.splitter.levels(b"a b").tolist() == [0, 1, 0]
  weights, params = official()
  config, tree = lingua.from_lingua(weights, params["model"])
  config = convert_main.with_rules(config, ["word@1"])
  # Documents are isolated, as in the official evaluation.
  expected = dataclasses.replace(config, document_mask=True)
  assert loaded.config.model == loaded.model.config == expected
  jax.tree.map(np.testing.assert_array_equal, loaded.params, tree)


def test_the_workdir_has_a_config_file_to_train_on(directory):
  for rules in (("word@1",), ("pretok",)):
    workdir = directory / rules[0]
    convert_main.from_lingua(directory / "weights.npz", workdir, rules=rules)
    parsed = config_lib.parse_flags([f"--config={workdir / 'config.py'}"])
    assert parsed == aunet_jax.load(workdir).config


@pytest.mark.slow
def test_a_converted_workdir_evaluates_and_generates(directory, capsys):
  workdir, text = directory / "run", directory / "text.txt"
  convert_main.from_lingua(directory / "weights.npz", workdir)
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
  convert_main.from_lingua(directory, directory / "run")
  head = aunet_jax.load(directory / "run").params["head"]
  rounded = jnp.asarray(weights["vocab.weight"].T, jnp.bfloat16)
  np.testing.assert_array_equal(head, rounded.astype(jnp.float32))


def test_official_rows_are_explicit(directory):
  config = convert_main.from_lingua(
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
    convert_main.from_lingua(source, directory / "run", params=alone)
  config = convert_main.from_lingua(
    source, directory / "run", params=alone, rules=("word@2",)
  )
  assert config.model.rules == ("word@2",)
  with pytest.raises(ValueError, match="needs 1 splitting rules"):
    convert_main.from_lingua(
      source, directory / "other", params=alone, rules=("word@1", "word@2")
    )


def test_a_workdir_is_never_overwritten(directory):
  convert_main.from_lingua(directory / "weights.npz", directory / "run")
  with pytest.raises(ValueError, match="holds a model already"):
    convert_main.from_lingua(directory / "weights.npz", directory / "run")


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


def test_a_pth_entry_that_is_no_tensor_is_named(directory):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  torch.save({"model": {"vocab.weight": 3}}, directory / "odd.pth")
  with pytest.raises(ValueError, match="'vocab.weight' is a int"):
    read_weights(directory / "odd.pth")


def test_a_pth_without_torch_says_what_to_install(directory):
  try:
    import torch  # noqa: F401
  except ImportError:
    (directory / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="needs torch"):
      read_weights(directory / "weights.pth")
  else:
    pytest.skip("torch is installed")


def test_an_npz_member_that_is_no_array_is_named(directory):
  shutil.copy(directory / "weights.npz", directory / "odd.npz")
  with zipfile.ZipFile(directory / "odd.npz", "a") as file:
    file.writestr("vocab.bias", "text")
  with pytest.raises(ValueError, match="'vocab.bias' is not an array"):
    read_weights(directory / "odd.npz")


@pytest.mark.parametrize(
  "content", [b"", b"PK\x03\x04 cut short", b"\x80" * 99]
)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_broken_file_is_named(directory, suffix, content):
  if suffix == ".safetensors":
    pytest.importorskip("safetensors", reason="safetensors is not installed")
  path = directory / f"broken{suffix}"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"broken{suffix}"):
    read_weights(path)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"\.npz.*'\.bin'"):
    read_weights(tmp_path / "weights.bin")


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_broken_arguments_are_named(directory, content):
  (directory / "params.json").write_text(content)
  with pytest.raises(ValueError, match="params.json"):
    convert_main.from_lingua(directory / "weights.npz", directory / "run")


def test_missing_files_are_named(directory, capsys):
  assert convert_main.main(["--from-lingua=no.npz", "--workdir=run"]) == 2
  assert "no.npz" in capsys.readouterr().err
  (directory / "params.json").unlink()
  with pytest.raises(ValueError, match="--params"):
    convert_main.from_lingua(directory / "weights.npz", directory / "run")
