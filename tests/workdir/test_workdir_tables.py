"""What a workdir may name as a rule: nothing runs, nothing outside is read."""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

import aunet_jax
from aunet_jax import config as config_lib
from aunet_jax.aunet import sharding
from aunet_jax.aunet.network import abstract_params
from aunet_jax.evaluate import __main__ as evaluate_main
from aunet_jax.generate import __main__ as generate_main
from aunet_jax.splitting import Splitter
from aunet_jax.train import changes
from aunet_jax.workdir import layout, load, tables

HERE = pathlib.Path(__file__).parents[1]
TOKENS = HERE / "golden" / "vocabulary.json"
ENTROPY = HERE / "golden" / "entropy_rise.npz"

EVIL = """
import pathlib
pathlib.Path("sprung").write_text("imported")

def rule():
  from aunet_jax.splitting import Rule
  return Rule(0, lambda state, character: (state, True))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A current folder from which Python imports, with evil.py in it."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "evil.py").write_text(EVIL)
  yield tmp_path
  sys.modules.pop("evil", None)


def make_config(*rules):
  stages = [
    config_lib.StageConfig(
      dim=16, num_layers=1, head_dim=8, window=8, capacity=32, rule=rule
    )
    for rule in (None, *rules)
  ]
  return config_lib.Config(
    model=config_lib.ModelConfig(stages=tuple(stages), dtype="float32")
  )


def save(workdir, *rules):
  """What a run with these rules leaves, but for its checkpoints."""
  layout.write_config(workdir, make_config(*rules))
  tables.keep(workdir, rules)


def open_rules(workdir, trust_rules=False):
  """The splitter that `load` makes of a workdir."""
  model = layout.read_config(workdir).model
  return Splitter(tables.with_trusted_rules(workdir, model, trust_rules).rules)


def rename_rule(workdir, rule):
  """What somebody else may have written into config.json."""
  path = workdir / layout.CONFIG_FILE
  values = json.loads(path.read_text())
  values["model"]["stages"][1]["rule"] = rule
  path.write_text(json.dumps(values))


# ----- code -----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["evil:rule", "evil:rule@2", "evil.sub:rule"])
def test_code_that_a_workdir_names_does_not_run(here, rule, capsys):
  save(here / "run", "word@1")
  rename_rule(here / "run", rule)
  with pytest.raises(layout.CheckpointError, match="trust_rules") as caught:
    aunet_jax.load(here / "run")
  assert str(here / "evil.py") in str(caught.value)
  (here / "text.txt").write_text("some text")
  for main, flag in (
    (generate_main.main, "--prompt=x"),
    (evaluate_main.main, "--data=text.txt"),
  ):
    assert main([f"--workdir={here / 'run'}", flag]) == 2
    assert "--trust_rules" in capsys.readouterr().err
  assert not (here / "sprung").exists()


def test_trusted_code_runs_and_is_named(here, capsys):
  save(here / "run", "evil:rule")
  splitter = open_rules(here / "run", trust_rules=True)
  assert (here / "sprung").exists()
  assert splitter.levels(b"ab").tolist() == [1, 1]
  said = capsys.readouterr().err
  assert "'evil:rule'" in said and str(here / "evil.py") in said


def test_code_that_is_not_here_is_said_to_be_missing(here):
  save(here / "run", "word@1")
  rename_rule(here / "run", "not_here:rule")
  with pytest.raises(layout.CheckpointError, match="'not_here'.*not found"):
    open_rules(here / "run")


# ----- tables ---------------------------------------------------------------


def test_a_workdir_keeps_the_tables_of_its_rules(here, capsys):
  shutil.copy(TOKENS, here / "tokens.json")
  shutil.copy(ENTROPY, here / "entropy.npz")
  rules = ("entropy@entropy.npz", "tokens@tokens.json")
  config = make_config(*rules)
  shapes = abstract_params(config.model)
  zeros = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), sharding.unbox(shapes)
  )
  load.save_params(here / "run", config, zeros)
  expected = Splitter(rules)
  (here / "tokens.json").unlink()
  (here / "entropy.npz").unlink()
  shutil.move(here / "run", here / "moved")
  loaded = aunet_jax.load(here / "moved")
  assert loaded.splitter.hash == expected.hash
  assert loaded.splitter.rules == loaded.config.model.rules
  assert not capsys.readouterr().err
  # A model that was loaded can be saved again.
  save(here / "again", *loaded.config.model.rules)
  shutil.rmtree(here / "moved")
  assert open_rules(here / "again").hash == expected.hash


@pytest.fixture
def outside(here):
  """A workdir whose table is only where its config says, outside it."""
  shutil.copy(TOKENS, here / "tokens.json")
  save(here / "run", f"tokens@{here / 'tokens.json'}")
  shutil.rmtree(here / "run" / tables.TABLES)
  return here / "run"


def test_a_table_outside_is_read_only_when_trusted(outside, capsys):
  with pytest.raises(layout.CheckpointError, match="stage2.tokens is missing"):
    open_rules(outside)
  loaded = open_rules(outside, trust_rules=True)
  assert loaded.hash == Splitter([f"tokens@{TOKENS}"]).hash
  assert "reading splitting rule 'tokens@" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["kept", "absolute", "relative"])
def test_a_table_inside_is_read(outside, where):
  if where == "kept":
    rename_rule(outside, "tokens@/no/such/file")
    (outside / tables.TABLES).mkdir()
    shutil.move(outside.parent / "tokens.json",
                outside / tables.TABLES / "stage2.tokens")  # fmt: skip
  else:
    shutil.move(outside.parent / "tokens.json", outside / "mine.json")
    name = outside / "mine.json" if where == "absolute" else "mine.json"
    rename_rule(outside, f"tokens@{name}")
  assert open_rules(outside).levels(b"one two").any()


@pytest.mark.parametrize("name", ["tables/stage2.tokens", "mine.json"])
def test_a_link_out_of_the_workdir_is_outside(outside, name):
  rename_rule(outside, f"tokens@{name}")
  (outside / tables.TABLES).mkdir()
  (outside / name).symlink_to(outside.parent / "tokens.json")
  with pytest.raises(layout.CheckpointError, match="not part of it"):
    open_rules(outside)
  rename_rule(outside, "tokens@../tokens.json")
  with pytest.raises(layout.CheckpointError, match="not part of it"):
    open_rules(outside)


@pytest.mark.parametrize(
  "name", ["", "/dev/zero", "..", ".", "a\0b", "x" * 5000, "~/.ssh/id_rsa"]
)
def test_what_is_no_file_of_the_workdir_is_no_table(outside, name):
  rename_rule(outside, f"tokens@{name}")
  with pytest.raises(layout.CheckpointError, match="not part of it"):
    open_rules(outside)


def test_a_run_may_go_on_with_its_table_moved():
  one, two = make_config("tokens@a.json"), make_config("tokens@b.json")
  assert changes.changed_fields(one, two)[0] == []
  for other in ("entropy@a.json", "word@1", "tokens"):
    assert changes.changed_fields(one, make_config(other))[0]
  forbidden, _ = changes.changed_fields(one, dataclasses.replace(one, seed=1))
  assert forbidden == ["seed: 0 -> 1"]
