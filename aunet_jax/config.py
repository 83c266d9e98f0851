"""Every setting of a run as frozen dataclasses, and the way in from a file.

An experiment file in `configs/` returns a `ml_collections.ConfigDict` made by
`default()` and edited; `from_config_dict` checks it and freezes it. No other
module reads a ConfigDict. Validation lives in the dataclasses, so a config
built in Python is checked exactly like one from the command line.
"""

import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import re
import traceback
import types
import typing
from collections.abc import Iterable, Sequence

import ml_collections

from aunet_jax import files

BOS = 256  # first input of every document; never a target
EOS = 257  # last target of every document; never an input
VOCAB_SIZE = 258  # as the official code (facebookresearch/lingua, apps/aunet)
UPSAMPLINGS = ("multi_linear", "repeat", "simple")
REMATS = ("none", "dots", "full")
ATTENTIONS = ("auto", "xla", "splash", "triton")
SCHEDULES = ("cosine", "wsd", "constant")
OPTIMIZERS = ("adamw", "muon")
DTYPES = ("float32", "bfloat16")
LARGEST = 2**62  # no setting is above; past it numbers overflow


def swiglu_dim(dim: int, multiple_of: int = 256) -> int:
  """Feed-forward width of the paper's models (Table 9, column FFN).

  Two thirds of 4 * dim, rounded up to a multiple of `multiple_of`.
  """
  return -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise ValueError(
      f"{name}={value!r} must be one of {', '.join(choices)}."
      f"{_hint(value, choices)}"
    )


def _check_positive(name: str, value: int | float) -> None:
  if not 0 < value <= LARGEST:
    raise ValueError(f"{name}={_shown(value)} must be a positive number.")


def _check_range(name: str, value: int | float, low, high=None) -> None:
  if not low <= value <= (LARGEST if high is None else high):
    above = f"at least {low}" if high is None else f"{low} to {high}"
    raise ValueError(f"{name}={_shown(value)} must be {above}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of the U-Net. `stages[0]` is the byte stage.

  A stage with a coarser one below it has `num_layers` blocks on its
  contracting and as many on its expanding path; the deepest has one path.
  """

  dim: int  # width of the residual stream
  num_layers: int  # Transformer blocks on each path
  head_dim: int  # width of one attention head; even, for RoPE
  window: int | None  # keys a query sees, itself included; None = all
  capacity: int  # positions of this stage in a row; stage 1: the row length
  rule: str | None = None  # splitting rule that feeds this stage; stage 1: None
  num_kv_heads: int | None = None  # None = one per query head (no GQA)
  ffn_dim: int | None = None  # None = swiglu_dim(dim), as the paper's Table 9
  skip: bool = True  # add this stage's encoding to its upsampled input
  remat: str = "none"  # what the backward pass recomputes: none, dots, full
  attention: str = "auto"  # kernel (`attention.py`); auto: by platform

  def __post_init__(self):
    for name in ("dim", "num_layers", "head_dim", "capacity"):
      _check_positive(f"stage {name}", getattr(self, name))
    for name in ("window", "num_kv_heads", "ffn_dim"):
      if getattr(self, name) is not None:
        _check_positive(f"stage {name}", getattr(self, name))
    if self.dim % self.head_dim:
      raise ValueError(
        f"dim={self.dim} must be a multiple of head_dim={self.head_dim}; "
        f"try dim={-(-self.dim // self.head_dim) * self.head_dim}."
      )
    if self.head_dim % 2:
      raise ValueError(
        f"head_dim={self.head_dim} must be even: RoPE rotates pairs."
      )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f"num_kv_heads={self.num_kv_heads} must divide the "
        f"{self.num_heads} query heads (dim={self.dim} / "
        f"head_dim={self.head_dim})."
      )
    _check_choice("stage remat", self.remat, REMATS)
    _check_choice("stage attention", self.attention, ATTENTIONS)

  @property
  def num_heads(self) -> int:
    return self.dim // self.head_dim

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def ffn(self) -> int:
    return swiglu_dim(self.dim) if self.ffn_dim is None else self.ffn_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The network. One stage is the flat byte Transformer."""

  stages: tuple[StageConfig, ...]
  vocab_size: int = VOCAB_SIZE
  upsampling: str = "multi_linear"  # paper Section 2.1; multi_linear is its own
  num_offsets: int = 16  # matrices of multi-linear upsampling; offsets wrap
  parametric: bool = True  # False: pool and upsample without projections
  rope_theta: float = 500_000.0
  norm_eps: float = 1e-5
  head_norm_eps: float | None = None  # before the heads; None = norm_eps
  document_mask: bool = True  # False: rows are one document (official code)
  final_norm: bool = True  # False: logits as the official evaluation's
  level_loss_weight: float = 0.0  # > 0 adds the level head and its loss
  dtype: str = "bfloat16"  # compute; norms, softmax, logits, loss: float32
  param_dtype: str = "float32"
  unroll_layers: bool = False  # True: no loop over layers in the program

  def __post_init__(self):
    if not self.stages:
      raise ValueError("model.stages is empty; a model has at least one stage.")
    if self.stages[0].rule is not None:
      raise ValueError(
        f"stage 1 is the byte stage: its rule must be None, "
        f"not {self.stages[0].rule!r}."
      )
    _check_choice("model.upsampling", self.upsampling, UPSAMPLINGS)
    _check_choice("model.dtype", self.dtype, DTYPES)
    _check_choice("model.param_dtype", self.param_dtype, DTYPES)
    _check_positive("model.num_offsets", self.num_offsets)
    for fine, coarse in zip(self.stages, self.stages[1:], strict=False):
      if coarse.capacity > fine.capacity:
        raise ValueError(
          f"a stage of capacity {coarse.capacity} lies below one of "
          f"{fine.capacity}; capacities cannot grow with depth."
        )
      if not self.parametric and coarse.dim % fine.dim:
        raise ValueError(
          f"parametric=False needs each dim to divide the next: "
          f"{fine.dim} does not divide {coarse.dim}."
        )
    _check_range("model.level_loss_weight", self.level_loss_weight, 0)
    _check_range("model.vocab_size", self.vocab_size, VOCAB_SIZE)
    _check_positive("model.rope_theta", self.rope_theta)
    _check_positive("model.norm_eps", self.norm_eps)
    _check_positive("model.head_norm_eps", self.head_eps)

  @property
  def head_eps(self) -> float:
    eps = self.head_norm_eps
    return self.norm_eps if eps is None else eps

  @property
  def num_stages(self) -> int:
    return len(self.stages)

  @property
  def capacities(self) -> tuple[int, ...]:
    """Positions of every stage in a row, stage 1 first."""
    return tuple(stage.capacity for stage in self.stages)

  @property
  def rules(self) -> tuple[str, ...]:
    """The splitting rules of stages 2, 3, …; input of `Splitter`."""
    rules = tuple(stage.rule for stage in self.stages[1:])
    for number, rule in enumerate(rules, start=2):
      if rule is None:
        raise ValueError(
          f"stage {number} has no splitting rule; set "
          f"model.stages[{number - 1}].rule, for example 'word@1'."
        )
    return rules

  @property
  def position_limit(self) -> int | None:
    """Positions a text may have before the model leaves what it was trained on.

    With every window inside the training row there is none: attention never
    sees a distance it was not trained on. A stage that sees further back than
    the row was long is held to the row's length.
    """
    for stage in self.stages:
      if stage.window is None or stage.window > stage.capacity:
        return self.stages[0].capacity
    return None

  def with_attention(self, choice: str) -> "ModelConfig":
    """The model with one attention kernel at every stage; nothing it learns."""
    stages = [dataclasses.replace(s, attention=choice) for s in self.stages]
    return dataclasses.replace(self, stages=tuple(stages))

  def with_capacities(self, capacities: Sequence[int]) -> "ModelConfig":
    """The same network for rows of another shape; parameters do not change."""
    stages = [
      dataclasses.replace(stage, capacity=capacity)
      for stage, capacity in zip(self.stages, capacities, strict=True)
    ]
    return dataclasses.replace(self, stages=tuple(stages))


def _check_sources(name: str, value) -> None:
  """What `data.train` may be; the data itself is looked at where it is read."""
  items = value if isinstance(value, list | tuple) else [value]
  for item in items:
    path = item
    if isinstance(item, dict) and item.keys() == {"path", "weight"}:
      path = item["path"]
      if type(item["weight"]) not in (int, float):
        raise ValueError(
          f"{name}: weight={_shown(item['weight'])} must be a number."
        )
    if not (
      isinstance(path, str)
      or (
        isinstance(path, list | tuple) and all(isinstance(p, str) for p in path)
      )
    ):
      raise ValueError(
        f"{name}={_shown(value)} must be a path, or a list of which each item "
        'is a path or {"path": ..., "weight": ...}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where bytes come from. See docs/data.md."""

  # "python" = the text that ships with this Python; else a file, directory or
  # glob, several joined by ","; a config file may also give a list, each item
  # a path or {"path": ..., "weight": ...} with weights in bytes.
  train: typing.Any = "python"
  heldout: typing.Any = None  # as train; None: a share of train's documents
  heldout_fraction: float = 0.02  # of documents, by a stable hash of the text
  text_field: str = "text"  # of JSONL objects and table rows; "a.b" goes inside
  # Between the documents of a text file: "line", "blank_line" or any string;
  # None = a file is one document.
  separator: str | None = None
  tokenizer: str | None = None  # a tokenizer.json; None = read bytes
  cache_dir: str | None = None  # None = WORKDIR/data
  num_workers: int = 0  # Grain worker processes; 0 = in this process
  # Of records, and of bytes of text; more that is lost stops the run.
  max_skip_fraction: float = 0.01

  def __post_init__(self):
    _check_sources("data.train", self.train)
    if self.heldout is not None:
      _check_sources("data.heldout", self.heldout)
    if not 0 <= self.heldout_fraction < 1:
      raise ValueError(
        f"data.heldout_fraction={self.heldout_fraction} must be in [0, 1)."
      )
    if self.separator == "":
      raise ValueError(
        'data.separator="" cannot separate; give a string, or leave it out.'
      )
    _check_range("data.num_workers", self.num_workers, 0)
    _check_range("data.max_skip_fraction", self.max_skip_fraction, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  num_steps: int = 1000
  batch_size: int = 8  # rows of a step, over all devices
  grad_accumulation: int = 1  # microbatches a step is computed in
  log_every_steps: int = 10
  eval_every_steps: int = 0  # held-out evaluation; 0 = only at the end
  eval_bytes: int | None = None  # bytes of held-out text; None = all of it
  max_nonfinite_steps: int = 10  # skipped steps in a row before the run stops
  max_roll_backs: int = 0  # times it goes back to a checkpoint instead
  spike_sigmas: float = 6.0  # deviations above its mean that log a loss
  sample_prompt: str = ""  # text the final sample continues
  sample_bytes: int = 400  # length of the final sample; 0 = none
  tensorboard: bool = True

  def __post_init__(self):
    for name in (
      "num_steps",
      "batch_size",
      "grad_accumulation",
      "log_every_steps",
      "max_nonfinite_steps",
    ):
      _check_positive(f"train.{name}", getattr(self, name))
    for name in ("eval_every_steps", "sample_bytes", "max_roll_backs"):
      _check_range(f"train.{name}", getattr(self, name), 0)
    _check_positive("train.spike_sigmas", self.spike_sigmas)
    if self.eval_bytes is not None:
      _check_positive("train.eval_bytes", self.eval_bytes)
    if self.batch_size % self.grad_accumulation:
      raise ValueError(
        f"train.batch_size={self.batch_size} rows do not divide into "
        f"train.grad_accumulation={self.grad_accumulation} microbatches."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW as in the paper's Tables 6 and 11, or Muon."""

  name: str = "adamw"  # adamw, muon
  learning_rate: float = 1.65e-3
  schedule: str = "cosine"  # cosine, wsd (warmup-stable-decay), constant
  warmup_steps: int = 100
  decay_steps: int | None = None  # wsd only; None = a fifth of the run
  final_ratio: float = 0.01  # last learning rate over the peak (Table 6)
  weight_decay: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  momentum: float = 0.95  # Muon's, of matrices; beta1 and beta2 of the others
  clip_norm: float = 0.2  # global gradient norm (Table 6)

  def __post_init__(self):
    _check_choice("optimizer.name", self.name, OPTIMIZERS)
    _check_choice("optimizer.schedule", self.schedule, SCHEDULES)
    _check_positive("optimizer.learning_rate", self.learning_rate)
    _check_positive("optimizer.clip_norm", self.clip_norm)
    _check_positive("optimizer.eps", self.eps)
    for name in ("beta1", "beta2", "momentum", "final_ratio"):
      _check_range(f"optimizer.{name}", getattr(self, name), 0, 1)
    for name in ("warmup_steps", "weight_decay"):
      _check_range(f"optimizer.{name}", getattr(self, name), 0)
    if self.decay_steps is not None:
      _check_positive("optimizer.decay_steps", self.decay_steps)
    if self.decay_steps is not None and self.schedule != "wsd":
      raise ValueError(
        f"optimizer.decay_steps={self.decay_steps} has a meaning only with "
        f"optimizer.schedule='wsd', not {self.schedule!r}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; at most one None takes what is left."""

  data: int | None = None  # batch split, parameters copied
  fsdp: int | None = 1  # batch and parameters split
  tensor: int | None = 1  # heads and feed-forward split


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  every_steps: int = 500
  keep: int = 3  # newest checkpoints kept

  def __post_init__(self):
    _check_positive("checkpoint.every_steps", self.every_steps)
    _check_positive("checkpoint.keep", self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A whole run."""

  model: ModelConfig
  seed: int = 0
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()

  def __post_init__(self):
    _check_range("seed", self.seed, 0, 2**32 - 1)
    if self.data.tokenizer is not None:
      if self.model.num_stages > 1 or self.model.level_loss_weight > 0:
        raise ValueError(
          f"data.tokenizer={self.data.tokenizer!r} is for a model of one stage "
          f"without level head, not of {self.model.num_stages} stages: "
          f"splitting rules read bytes."
        )
    try:
      length = len(self.train.sample_prompt.encode())
    except UnicodeEncodeError:
      raise ValueError(
        f"train.sample_prompt={_shown(self.train.sample_prompt)} is not text."
      ) from None
    longest = self.model.capacities[0] - 2  # BOS is before it, a byte after it
    if length > longest:
      raise ValueError(
        f"train.sample_prompt has {length} bytes; this model's rows leave room "
        f"for {longest} and one byte to generate."
      )
    if self.optimizer.warmup_steps >= self.train.num_steps:
      raise ValueError(
        f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be less "
        f"than train.num_steps={self.train.num_steps}."
      )

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2)


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


def _plain(value):
  """Nested ConfigDicts, dicts and tuples as dicts and lists."""
  if isinstance(value, ml_collections.ConfigDict | dict):
    return {key: _plain(value[key]) for key in value.keys()}
  return [*map(_plain, value)] if isinstance(value, list | tuple) else value


def _shown(value) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}…"


def _hint(name: str, names: Iterable[str]) -> str:
  close = difflib.get_close_matches(str(name), names, n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def _reject_unknown(cls, values: Iterable[str], where: str) -> None:
  names = [field.name for field in dataclasses.fields(cls)]
  for key in values:
    if key not in names:
      raise ValueError(
        f"{where}.{key} is not a setting.{_hint(key, names)} Known: "
        f"{', '.join(names)}."
      )


def _build(cls, values, where: str):
  """Dataclass `cls` of nested values.

  Raises: ValueError naming the field at fault, `where` in front.
  """
  if not isinstance(values, dict):
    raise ValueError(f"{where}={_shown(values)} must be a group of settings.")
  _reject_unknown(cls, values, where)
  hints = typing.get_type_hints(cls)
  fields = {}
  for key, value in values.items():
    name, (kind, optional) = f"{where}.{key}", _kind(hints[key])
    if dataclasses.is_dataclass(kind):
      value = _build(kind, value, name)
    elif key == "stages":
      if not isinstance(value, list):
        raise ValueError(f"{name}={_shown(value)} must be a list of stages.")
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
        f"{name}={_shown(value)} is of type {type(value).__name__}; it must be "
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


def runs_code(rule: str) -> bool:
  """Whether a splitting rule is code to import: "my_module:my_rule"."""
  return ":" in rule.partition("@")[0]


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
      raise ValueError(f"{_shown(values)} is no config.")
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
