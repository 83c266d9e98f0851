"""Reads the settings of a run from a file and the command line.

An experiment file in `configs/` returns a `ml_collections.ConfigDict` made by
`default()` and edited; here it is checked and becomes the frozen dataclasses of
`settings`. No other module reads a ConfigDict.
"""

import dataclasses
import difflib
import functools
import importlib.util
import os
import re
import traceback
import types
import typing
from collections.abc import Iterable, Sequence

import ml_collections

from aunet_jax import files
from aunet_jax.settings import (
  ATTENTIONS,
  BOS,
  DTYPES,
  EOS,
  FIRST_MARK,
  FORMATS,
  LARGEST,
  MOST_HEADS,
  OPTIMIZERS,
  REMATS,
  SCHEDULES,
  UPSAMPLINGS,
  VOCAB_SIZE,
  CheckpointConfig,
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  StageConfig,
  TrainConfig,
  hint,
  runs_code,
  shown,
  swiglu_dim,
)

__all__ = [
  "ATTENTIONS",
  "BOS",
  "DTYPES",
  "EOS",
  "FIRST_MARK",
  "FORMATS",
  "LARGEST",
  "MOST_HEADS",
  "OPTIMIZERS",
  "REMATS",
  "SCHEDULES",
  "UPSAMPLINGS",
  "VOCAB_SIZE",
  "CheckpointConfig",
  "Config",
  "DataConfig",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "StageConfig",
  "TrainConfig",
  "runs_code",
  "swiglu_dim",
  "around_model",
  "as_config",
  "default",
  "from_config_dict",
  "from_json",
  "override",
  "parse_flags",
  "stage",
]

# ----- in from a file and the command line ----------------------------------

# A config under way is nested dicts of plain values, {"seed": 0, "model":
# {"stages": [{"dim": …}, …], …}, …}. It is edited as such and built once, since
# two settings may be right together and wrong one at a time.


def _kind(annotation) -> tuple[type, bool]:
  """The plain type of a field and whether None is allowed."""
  if isinstance(annotation, types.UnionType):
    (kind,) = [a for a in annotation.__args__ if a is not types.NoneType]
    return kind, True
  return annotation, annotation is typing.Any


def _defaults(cls) -> dict:
  """Values of the fields that have one."""
  values = {}
  for field in dataclasses.fields(cls):
    value = field.default
    if dataclasses.is_dataclass(value):
      value = dataclasses.asdict(value)
    if value is not dataclasses.MISSING:
      values[field.name] = value
  return values


def stage(**fields) -> ml_collections.ConfigDict:
  """One entry of `model.stages` for a config file; see `StageConfig`."""
  _reject_unknown(StageConfig, fields, "stage")
  values = _defaults(StageConfig) | fields
  return ml_collections.ConfigDict(values, type_safe=False)


def default(
  stages: Sequence[ml_collections.ConfigDict],
) -> ml_collections.ConfigDict:
  """A full ConfigDict with every default; config files edit and return it."""
  values = _defaults(Config) | {"model": _defaults(ModelConfig)}
  config = ml_collections.ConfigDict(values, type_safe=False)
  config.model.stages = tuple(stages)
  return config


def around_model(path: str) -> ml_collections.ConfigDict:
  """A full ConfigDict with every default but the model of another config.

  With its tokenizer, where that model reads tokens.

  Args: path: a config file, or the config.json of a run.
  Raises: ValueError where it is none, or names code as a splitting rule.
  """
  values = _read_file(path, trusted=False)
  built = _build(Config, values, f"--config={path}")
  model = built.model
  config = default([stage(**dataclasses.asdict(s)) for s in model.stages])
  for field in dataclasses.fields(model):
    if field.name != "stages":
      config.model[field.name] = getattr(model, field.name)
  config.data.tokenizer = built.data.tokenizer
  return config


def fine_tuning(
  model: str, name: str, *, num_steps: int, learning_rate: float
) -> ml_collections.ConfigDict:
  """What the recipes in configs/ share: prompts and completions of data/NAME.

  The model begins with runs/quickstart; without weight decay, which would pull
  it away from there. Args: model: see `around_model`.
  """
  c = around_model(model)
  c.data.format = "completion"
  c.data.train = f"data/{name}/train.jsonl"
  c.data.heldout = f"data/{name}/heldout.jsonl"
  c.train.init_from = "runs/quickstart"
  c.train.num_steps = num_steps
  c.train.batch_size = 4
  c.train.eval_every_steps = num_steps // 2
  c.train.sample_bytes = 0
  c.optimizer.learning_rate = learning_rate
  c.optimizer.warmup_steps = 20
  c.optimizer.weight_decay = 0.0
  c.optimizer.clip_norm = 1.0
  c.checkpoint.every_steps = 100
  return c


def _plain(value):
  """Nested ConfigDicts, dicts and tuples as dicts and lists."""
  if isinstance(value, ml_collections.ConfigDict | dict):
    return {key: _plain(value[key]) for key in value.keys()}
  return [*map(_plain, value)] if isinstance(value, list | tuple) else value


def _reject_unknown(cls, values: Iterable[str], where: str) -> None:
  names = [field.name for field in dataclasses.fields(cls)]
  for key in values:
    if key not in names:
      raise ValueError(
        f"{where}.{key} is not a setting.{hint(key, names)} Known: "
        f"{', '.join(names)}."
      )


def _build(cls, values, where: str):
  """Dataclass `cls` of nested values.

  Raises: ValueError naming the field at fault, `where` in front.
  """
  if not isinstance(values, dict):
    raise ValueError(f"{where}={shown(values)} must be a group of settings.")
  _reject_unknown(cls, values, where)
  hints = typing.get_type_hints(cls)
  fields = {}
  for key, value in values.items():
    name, (kind, optional) = f"{where}.{key}", _kind(hints[key])
    if dataclasses.is_dataclass(kind):
      value = _build(kind, value, name)
    elif key == "stages":
      if not isinstance(value, list):
        raise ValueError(f"{name}={shown(value)} must be a list of stages.")
      value = tuple(
        _build(StageConfig, stage, f"{name}[{i}]")
        for i, stage in enumerate(value)
      )
    elif kind is float and type(value) is int and abs(value) < 1e300:
      value = float(value)
    elif kind is typing.Any or (value is None and optional):
      pass
    elif type(value) is not kind:
      raise ValueError(
        f"{name}={shown(value)} is of type {type(value).__name__}; it must be "
        f"{kind.__name__}{' or None' if optional else ''}."
      )
    fields[key] = value
  missing = [
    field.name
    for field in dataclasses.fields(cls)
    if field.default is dataclasses.MISSING and field.name not in fields
  ]
  if missing:
    raise ValueError(f"{where} lacks {', '.join(missing)}.")
  try:
    return cls(**fields)
  except ValueError as error:
    if cls is not StageConfig:  # the others name their fields in full
      raise
    raise ValueError(f"{where}: {error}") from None


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
  """Checks and freezes a ConfigDict.

  Raises: ValueError naming the field, its value and the rule it breaks.
  """
  return _build(Config, _plain(config), "config")


def as_config(value, where: str) -> Config:
  """What a user's function gave: a ConfigDict or a Config.

  Raises: ValueError for anything else, naming `where` it came from.
  """
  return _build(Config, _values_of(value, where), "config")


def from_json(text: str) -> Config:
  """Inverse of `Config.to_json`. Raises: ValueError, whatever is wrong."""
  return _build(Config, files.parse_json(text), "config")


# ----- overrides ------------------------------------------------------------


@functools.cache
def _settings(cls=None, prefix: str = "") -> dict[str, typing.Any]:
  """Every setting: its full name, "[]" for a stage's number -> its type."""
  found = {}
  for name, annotation in typing.get_type_hints(cls or Config).items():
    if name == "stages":
      found |= _settings(StageConfig, f"{prefix}{name}[].")
    elif dataclasses.is_dataclass(annotation):
      found |= _settings(annotation, f"{prefix}{name}.")
    else:
      found[prefix + name] = _kind(annotation)[0]
  return found


def _unknown(given: str) -> ValueError:
  """Names the setting that somebody may have meant."""
  settings = _settings()
  number = re.search(r"\[\d+\]", given)
  name = re.sub(r"\[\d+\]", "[]", given)
  if any(setting.startswith((f"{name}.", f"{name}[]")) for setting in settings):
    return ValueError(f"--config.{given} is a group of settings: name one.")
  # One misspelt, then one that is in another group.
  close = difflib.get_close_matches(name, settings, n=1, cutoff=0.8)
  last = name.rpartition(".")[2]
  ends = {setting: setting.rpartition(".")[2] for setting in settings}
  for spelling in (last, *difflib.get_close_matches(last, ends.values())):
    close += [setting for setting, end in ends.items() if end == spelling]
  hint = ""
  if close:
    near = close[0].replace("[]", number[0] if number else "[1]")
    hint = f" Did you mean --config.{near}?"
  return ValueError(f"--config.{given} is not a setting.{hint}")


_BOOLEANS = {"true": True, "t": True, "1": True}
_BOOLEANS |= {"false": False, "f": False, "0": False}


def _parse(kind, text: str):
  """A value of a field's type. Raises: ValueError for text that is none."""
  if text == "None":
    return None
  if kind is bool:
    if text.lower() not in _BOOLEANS:
      raise ValueError("it is a boolean, True or False.")
    return _BOOLEANS[text.lower()]
  if kind is int and text[:2].lower() in ("0x", "0o"):
    return int(text, 0)
  return text if kind is typing.Any else kind(text)


def _set(values: dict, setting: str) -> None:
  """Carries out one "a.b[1].c=VALUE" on nested values."""
  name, equals, text = setting.partition("=")
  kind = _settings().get(re.sub(r"\[\d+\]", "[]", name))
  if kind is None:
    raise _unknown(name)
  if not equals:
    raise ValueError(f"--config.{name}: give a value, --config.{name}=VALUE.")
  try:
    value = _parse(kind, text)
  except ValueError as error:
    raise ValueError(f"--config.{setting}: {error}") from None
  group = values
  *path, last = re.findall(r"\w+", name)
  try:
    for part in path:
      if part.isdigit():
        group = group[int(part)]
      else:  # a group that a JSON file leaves out has its defaults
        group = group.setdefault(part, {})
    group[last] = value
  except IndexError:
    raise ValueError(
      f"--config.{setting}: no such stage; stages[0] is the byte stage, "
      f"stages[1] the one below it."
    ) from None
  except (AttributeError, KeyError, TypeError):  # the file has no group there
    raise ValueError(
      f"--config.{setting}: no {path[-1]} to set it in."
    ) from None


def override(config: Config, settings: Iterable[str]) -> Config:
  """The config with settings such as "model.stages[1].dim=256" changed.

  A value is read by its field's type; None clears a field that may be None.

  Raises: ValueError naming a setting that does not exist, with the nearest
    one, a value of another type, or a rule that the result breaks.
  """
  values = _plain(dataclasses.asdict(config))
  for setting in settings:
    _set(values, setting)
  return _build(Config, values, "config")


def _refuse_code(values: dict, path: str) -> None:
  """Raises: ValueError where values out of a JSON file name code as a rule."""
  model = values.get("model")
  stages = model.get("stages") if isinstance(model, dict) else None
  for stage in stages if isinstance(stages, list) else ():
    rule = stage.get("rule") if isinstance(stage, dict) else None
    if isinstance(rule, str) and runs_code(rule):
      raise ValueError(
        f"--config={path} names the splitting rule {rule!r}, code that is not "
        f"run because a file says so. If you trust it, give --trust_rules."
      )


def _values_of(value, where: str) -> dict:
  if isinstance(value, Config):
    value = dataclasses.asdict(value)
  elif not isinstance(value, ml_collections.ConfigDict):
    raise ValueError(
      f"{where} gave a {type(value).__name__}; it must return a config, as a "
      f"file of configs/ does."
    )
  return _plain(value)


def _read_python(path: str, argument: list[str]) -> dict:
  """What `get_config` of a file returns, as nested values."""
  where = f"--config={path}"
  spec = importlib.util.spec_from_file_location("experiment_config", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    return _values_of(module.get_config(*argument), f"{where}: get_config")
  except SyntaxError as error:
    raise ValueError(
      f"{where}: the config file does not parse: {error}"
    ) from None
  except ValueError:
    raise
  except Exception as error:  # the file's own mistake: where it is in the file
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == path
    ]
    reason = " ".join(str(error).replace("\\n", " ").split()).strip("\"'")
    at = f", line {lines[-1]}" if lines else ""
    raise ValueError(f"{where}{at}: {reason}") from error


def _read_file(named: str, trusted: bool) -> dict:
  """Nested values of FILE.json, FILE.py, or FILE.py:ARGUMENT."""
  path, colon, argument = named.partition(":")
  if not path.endswith((".py", ".json")) or not os.path.isfile(path):
    raise ValueError(
      f"--config={path}: no such config file (.py, or the config.json of a "
      f"run)."
    )
  if path.endswith(".py"):
    return _read_python(path, [argument] if colon else [])
  try:
    with open(path, encoding="utf-8") as file:
      values = files.parse_json(file.read())
    if not isinstance(values, dict):
      raise ValueError(f"{shown(values)} is no config.")
  except ValueError as error:
    raise ValueError(f"--config={path}: {error}") from None
  if not trusted:
    _refuse_code(values, path)
  return values


def parse_flags(args: Sequence[str]) -> Config:
  """Reads `--config=FILE` and `--config.a.b=VALUE` overrides.

  FILE is Python with a `get_config`, or the config.json of a run; such a file
  may name code as a splitting rule only with `--trust_rules`. A VALUE of None
  clears a setting that may be None.

  Raises: ValueError naming a misspelt or ill-typed override, with the nearest
    right key.
  """
  named, settings, rest, trusted = None, [], [], False
  waiting = iter(args)
  for arg in waiting:
    name, equals, value = arg.partition("=")
    name = name.removeprefix("-").removeprefix("-") if arg[:1] == "-" else ""
    if arg == "--trust_rules":
      trusted = True
    elif name == "config":
      named = value if equals else next(waiting, "")
    elif name.startswith("config."):
      setting = name.removeprefix("config.")
      if not equals:  # "--config.a.b VALUE"; a boolean needs none
        of_boolean = _settings().get(setting) is bool
        value = "True" if of_boolean else next(waiting, None)
      settings.append(setting if value is None else f"{setting}={value}")
    else:
      rest.append(arg)
  if rest:
    raise ValueError(f"unknown arguments: {' '.join(rest)}")
  if named is None:
    raise ValueError(
      "give a config, for example --config=configs/quickstart.py"
    )
  values = _read_file(named, trusted)
  for setting in settings:
    _set(values, setting)
  try:
    return _build(Config, values, "config")
  except ValueError as error:
    if named.endswith(".json") and not settings:
      raise ValueError(f"--config={named}: {error}") from None
    raise
