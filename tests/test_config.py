"""Settings out of files, the command line and Python: right, or one line."""

import dataclasses
import json

import pytest

from aunet_jax import config
from aunet_jax.counts import main as counts_main

QUICKSTART = "--config=configs/quickstart.py"


def plain():
  """The values of a config.json."""
  return json.loads(config.parse_flags(["--config=tests/tiny.py"]).to_json())


def change(values, path, value):
  *groups, last = path
  group = values
  for part in groups:
    group = group[part]
  group[last] = value
  return values


# ----- overrides ------------------------------------------------------------


@pytest.mark.parametrize(
  "setting, path, value",
  [
    ("train.sample_prompt=5", "train.sample_prompt", "5"),
    ("train.sample_prompt=a=b", "train.sample_prompt", "a=b"),
    ("train.sample_prompt=", "train.sample_prompt", ""),
    ("data.text_field=True", "data.text_field", "True"),
    ("data.train=7", "data.train", "7"),
    ("data.train=a,b", "data.train", "a,b"),
    ("data.heldout=None", "data.heldout", None),
    ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
    ("train.tensorboard=f", "train.tensorboard", False),
    ("train.tensorboard=TRUE", "train.tensorboard", True),
    ("train.eval_bytes=1000", "train.eval_bytes", 1000),
    ("mesh.fsdp=None", "mesh.fsdp", None),
    ("seed=0x10", "seed", 16),
  ],
)
def test_a_value_is_read_by_its_fields_type(setting, path, value):
  forms = [[f"--config.{setting}"], f"--config.{setting}".split("=", 1)]
  for given in forms[: 1 if type(value) is bool else 2]:
    found = config.parse_flags([QUICKSTART, *given])
    for name in path.split("."):
      found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_boolean_alone_is_true():
  base = "--config=tests/tiny.py"
  assert not config.parse_flags([base]).train.tensorboard
  assert config.parse_flags([base, "--config.train.tensorboard"]) == (
    config.parse_flags([base, "--config.train.tensorboard=True"])
  )


def test_settings_that_are_right_together_are_set_together():
  """One at a time, each of them breaks a rule."""
  before = config.parse_flags([QUICKSTART])
  settings = ["train.num_steps=30", "optimizer.warmup_steps=5"]
  for order in (settings, settings[::-1]):
    after = config.override(before, order)
    assert (after.train.num_steps, after.optimizer.warmup_steps) == (30, 5)
  with pytest.raises(ValueError, match="warmup_steps=60 must be less"):
    config.override(before, settings[:1])


def test_the_last_of_two_values_holds():
  settings = ["seed=1", "model.stages[1].dim=96", "seed=2"]
  changed = config.override(config.parse_flags([QUICKSTART]), settings)
  assert changed.seed == 2 and changed.model.stages[1].dim == 96
  assert changed.model.stages[1].rule == "word@1"


@pytest.mark.parametrize(
  "setting, message",
  [
    ("model.stages[1]=5", r"model.stages\[1\] is a group of settings"),
    ("train=5", "train is a group of settings"),
    ("model.stages[2].dim=64", "no such stage"),
    ("train.num_steps", "give a value"),
    ("train.tensorboard=maybe", "boolean"),
    ("seed=" + "9" * 400, "seed=9+… must be 0 to"),
    ("model.stages[1].dim=" + "9" * 400, "must be 1 to"),
    ("optimizer.weight_decay=1e400", "weight_decay=inf must be at least 0"),
    ("optimizer.learning_rate=nan", "learning_rate=nan must be a positive"),
    ("train.sample_prompt=\ud800", "sample_prompt=.* is not text"),
    ("data.train=None", "data.train=None must be a path"),
  ],
)
def test_a_wrong_setting_is_one_line(setting, message):
  with pytest.raises(ValueError, match=message) as caught:
    config.override(config.parse_flags([QUICKSTART]), [setting])
  assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


# ----- files ----------------------------------------------------------------


@pytest.mark.parametrize(
  "path, value, message",
  [
    (["data", "train"], 5, "data.train=5 must be a path"),
    (["data", "train"], None, "data.train=None must be a path"),
    (["data", "train"], [5], "data.train.* must be a path"),
    (["data", "train"], {"path": "a"}, "data.train=.* must be a path"),
    (["data", "train"], [{"path": "a", "weight": "b"}], "weight='b' must be a"),
    (["data", "train"], [{"path": 5, "weight": 1}], "must be a path"),
    (["data", "train"], [{"path": "a", "weight": True}], "weight=True"),
    (["data", "heldout"], 5, "data.heldout=5 must be a path"),
    (["data"], None, "config.data=None must be a group"),
    (["data"], [], r"config.data=\[\] must be a group"),
    (["model"], 5, "config.model=5 must be a group"),
    (["model", "stages"], 5, "stages=5 must be a list"),
    (["model", "stages"], {}, "stages={} must be a list"),
    (["model", "stages"], [], "model.stages is empty"),
    (["model", "stages", 0], 5, r"stages\[0\]=5 must be a group"),
    (["model", "stages", 0], {"dim": 8}, "lacks num_layers, head_dim, window"),
    (
      ["model", "stages", 1, "rule"],
      5,
      "rule=5 is of type int; it must be str",
    ),
    (["model", "stages", 1, "dim"], 32.0, "dim=32.0 is of type float"),
    (["model", "stages", 1, "dim"], True, "dim=True is of type bool"),
    (["model", "stages", 1, "dim"], 10**400, "must be 1 to"),
    (["model", "norm_eps"], 10**400, "is of type int; it must be float"),
    (["model", "norm_eps"], [1] * 10_000, "norm_eps=.1, 1.*… is of type list"),
    (["model", "dtype"], "float23", "Did you mean 'float32'"),
    (["sed"], 1, "config.sed is not a setting. Did you mean 'seed'"),
    (["train", "sample_prompt"], "\ud800", "is not text"),
  ],
)
def test_a_damaged_config_is_one_line(tmp_path, capsys, path, value, message):
  file = tmp_path / "config.json"
  file.write_text(json.dumps(change(plain(), path, value)))
  with pytest.raises(ValueError, match=message):
    config.parse_flags([f"--config={file}"])
  with pytest.raises(ValueError, match=message):
    config.from_json(file.read_text())
  assert counts_main([f"--config={file}"]) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "config.json" in said and len(said) < 1000


@pytest.mark.parametrize(
  "content",
  [b"", b"{", b"null", b"5", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}",
   b'{"model": ' * 50_000, b"1" * 5000, b'{"model": {}}'],
)  # fmt: skip
def test_what_is_no_config_is_one_line(tmp_path, content):
  file = tmp_path / "config.json"
  file.write_bytes(content)
  for more in ([], ["--config.seed=1"], ["--config.train.num_steps=9"]):
    with pytest.raises(ValueError) as caught:
      config.parse_flags([f"--config={file}", *more])
    assert len(str(caught.value)) < 300


def test_a_group_that_a_file_leaves_out_can_be_set(tmp_path):
  values = plain()
  del values["train"], values["optimizer"], values["checkpoint"]
  file = tmp_path / "config.json"
  file.write_text(json.dumps(values))
  found = config.parse_flags(
    [f"--config={file}", "--config.train.num_steps=900"]
  )
  assert found.train.num_steps == 900
  assert found.optimizer == config.OptimizerConfig()


@pytest.mark.parametrize(
  "body, message",
  [
    ("  return 5", "get_config gave a int; it must return a config"),
    ("  return 1 / 0", "mine.py, line 2: division by zero"),
    ("  return [][1]", "mine.py, line 2: list index"),
    ("  import no_such_module", "mine.py, line 2: No module named"),
  ],
)
def test_a_config_file_that_fails_says_where(tmp_path, body, message):
  path = tmp_path / "mine.py"
  path.write_text(f"def get_config():\n{body}\n")
  with pytest.raises(ValueError, match=message):
    config.parse_flags([f"--config={path}"])
  path.write_text("")
  with pytest.raises(ValueError, match="get_config"):
    config.parse_flags([f"--config={path}"])


def test_a_config_file_may_take_an_argument_or_give_a_config(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "import dataclasses\n"
    "from aunet_jax import config\n\n"
    "def get_config(seed='1'):\n"
    "  base = config.parse_flags(['--config=tests/tiny.py'])\n"
    "  return dataclasses.replace(base, seed=int(seed))\n"
  )
  assert config.parse_flags([f"--config={path}"]).seed == 1
  assert config.parse_flags([f"--config={path}:7"]).seed == 7
  assert config.parse_flags([f"--config={path}:7", "--config.seed=8"]).seed == 8


# ----- trust ----------------------------------------------------------------


def test_a_json_file_names_code_only_where_it_is_trusted(tmp_path):
  rule = ["model", "stages", 1, "rule"]
  file = tmp_path / "config.json"
  file.write_text(json.dumps(change(plain(), rule, "evil:rule")))
  for more in ([], ["--config.seed=1"]):
    with pytest.raises(ValueError, match="'evil:rule'.*--trust_rules"):
      config.parse_flags([f"--config={file}", *more])
  trusted = config.parse_flags([f"--config={file}", "--trust_rules"])
  assert trusted.model.rules == ("evil:rule",)
  # Python files run anyway, and what is typed is the user's own word.
  mine = config.parse_flags(
    [QUICKSTART, "--config.model.stages[1].rule=my:rule"]
  )
  assert mine.model.rules == ("my:rule",)
  file.write_text(json.dumps(change(plain(), rule, "tokens@a:b.json")))
  assert config.parse_flags([f"--config={file}"]).model.rules


def test_models_are_changed_by_their_methods():
  model = config.parse_flags([QUICKSTART]).model
  assert model.with_capacities((64, 32)).capacities == (64, 32)
  assert {s.attention for s in model.with_attention("xla").stages} == {"xla"}
  assert model.position_limit == 1024  # stage 2 sees without limit
  near = dataclasses.replace(model.stages[1], window=180)
  near = dataclasses.replace(model, stages=(model.stages[0], near))
  assert near.position_limit is None
