"""Arguments of the official code as our configuration, both ways.

The official AU-Net (facebookresearch/lingua, `apps/aunet`) saves its training
arguments as `params.json` beside a checkpoint: `model` holds the network,
`data.regex.strategy` the splitting functions.
"""

from collections.abc import Mapping, Sequence

from aunet_jax.config import ModelConfig, StageConfig

# The official `max_pos`, not an argument there.
NUM_OFFSETS = 16


LARGEST = 10**9  # widths, layers, positions: no model has more of any


_KINDS = {int: "a whole number", float: "a number"}


# Tried in this order to say a feed-forward width in the official terms.
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


_MULTIPLIERS = (None, *(round(0.05 * i, 2) for i in range(1, 161)))


def _argument(arguments: Mapping, name: str, where: str = "model"):
  if name not in arguments:
    raise ValueError(
      f"the official arguments have no {where}.{name}; pass the `model` part "
      f"of the params.json that lies beside the checkpoint."
    )
  return arguments[name]


def _number(value, name: str, kind: type = int):
  """`value`, if it is a number as JSON has them.

  Raises: ValueError for one that is none, negative, or beyond any model.
  """
  numeric = isinstance(value, int | kind) and not isinstance(value, bool)
  if not (numeric and 0 <= value <= LARGEST):
    raise ValueError(
      f"{name}={str(value)[:40]} must be {_KINDS[kind]} from 0 to {LARGEST:,}."
    )
  return value


def _numbers(arguments: Mapping, name: str, count: int, default=None) -> list:
  """A list of integers, one a stage; `default` where there is none.

  null and -1, "no limit" in the official code, become None.
  """
  if arguments.get(name) is None and default is not None:
    return default
  return [
    None if value is None or value == -1 else _number(value, f"model.{name}")
    for value in _per_stage(arguments, name, count)
  ]


def _per_stage(arguments: Mapping, name: str, count: int) -> list:
  values = _argument(arguments, name)
  if not isinstance(values, list | tuple) or len(values) != count:
    raise ValueError(
      f"model.{name}={values!r} must be a list of {count} values, one per "
      f"{'transition' if name == 'residuals' else 'stage'}."
    )
  return list(values)


def _official_ffn(dim: int, multiplier: float | None, multiple_of: int) -> int:
  """Width of the official SwiGLU: 2/3 of 4 dim, scaled, then rounded up."""
  width = int(2 * 4 * dim / 3)
  if multiplier is not None:
    width = int(multiplier * width)
  return -(-width // multiple_of) * multiple_of


def _capacities(max_seqlens: list, row_length: int) -> list[int]:
  """Official `max_seqlens`, where -1 means no limit of its own."""
  known = [n for n in max_seqlens if n is not None and n > 0]
  capacities = []
  for i, n in enumerate(max_seqlens):
    if i == 0:
      n = n if n and n > 0 else row_length
      n = max([n, *known])  # rows are at least as long as any stage
    elif n is None or n <= 0:
      n = capacities[-1]
    capacities.append(min([n, *capacities[-1:]]))
  return capacities


def _upsampling(pooling_type: str) -> tuple[str, bool]:
  """(upsampling, parametric) of an official `pooling_type`."""
  text = str(pooling_type).lower()
  if "simple" not in text:
    raise ValueError(
      f"model.pooling_type={pooling_type!r} is not known; the official code's "
      f"start with 'simple': simple, simple_repeat, simple_indexed_matmul, "
      f"simple_non_param and combinations."
    )
  parametric = "non_param" not in text
  if "indexed_matmul" in text:
    return "multi_linear", parametric
  return ("repeat" if "repeat" in text else "simple"), parametric


def from_arguments(model_args: Mapping, vocab_rows: int) -> ModelConfig:
  """The float32 ModelConfig of official arguments.

  Args: model_args: the `model` part of the official params.json. vocab_rows:
    of the embedding, where the official argument is -1.
  Raises: ValueError naming the argument.
  """
  dims = _argument(model_args, "dimensions")
  if not isinstance(dims, list | tuple) or len(dims) < 1:
    raise ValueError(f"model.dimensions={dims!r} must be a list of widths.")
  P = len(dims)
  block = _argument(model_args, "block")
  if not isinstance(block, Mapping):
    raise ValueError(f"model.block={block!r} must be an object of arguments.")

  def of_block(name, kind=int, default=None):
    value = block.get(name)
    return (
      default if value is None else _number(value, f"model.block.{name}", kind)
    )

  dims = [_number(dim, "model.dimensions") for dim in dims]
  head_dims = [
    _number(dim, "model.head_dims")
    for dim in _per_stage(model_args, "head_dims", P)
  ]
  layers = [
    _number(number, "model.layers")
    for number in _per_stage(model_args, "layers", P)
  ]
  windows = _numbers(model_args, "sliding_windows", P, [None] * P)
  skips = [True] * (P - 1)
  if model_args.get("residuals") is not None:
    skips = _per_stage(model_args, "residuals", P - 1)
  capacities = _capacities(
    _numbers(model_args, "max_seqlens", P), of_block("max_seqlen", default=1)
  )
  _argument(block, "norm_eps", "model.block")
  _argument(block, "rope_theta", "model.block")
  norm_eps = float(of_block("norm_eps", float, 0))
  head_norm_eps = norm_eps
  if model_args.get("norm_eps") is not None:
    head_norm_eps = float(
      _number(model_args["norm_eps"], "model.norm_eps", float)
    )
  vocab_size = model_args.get("vocab_size")
  if vocab_size in (None, -1, 0):
    vocab_size = vocab_rows
  level_loss_weight = model_args.get("lambda_level") or 0.0
  upsampling, parametric = _upsampling(_argument(model_args, "pooling_type"))
  stages = tuple(
    StageConfig(
      dim=dims[i],
      num_layers=layers[i],
      head_dim=head_dims[i],
      window=windows[i] or None,
      capacity=capacities[i],
      num_kv_heads=of_block("n_kv_heads"),
      ffn_dim=_official_ffn(
        dims[i],
        of_block("ffn_dim_multiplier", float),
        of_block("multiple_of", default=256) or 256,
      ),
      skip=bool([*skips, True][i]),
    )
    for i in range(P)
  )
  return ModelConfig(
    stages=stages,
    vocab_size=_number(vocab_size, "model.vocab_size"),
    upsampling=upsampling,
    num_offsets=NUM_OFFSETS,
    parametric=parametric,
    rope_theta=float(of_block("rope_theta", float, 0)),
    norm_eps=norm_eps,
    head_norm_eps=None if head_norm_eps == norm_eps else head_norm_eps,
    document_mask=False,
    level_loss_weight=float(
      _number(level_loss_weight, "model.lambda_level", float)
    ),
    dtype="float32",
    param_dtype="float32",
  )


def check_official(config: ModelConfig) -> None:
  """Raises: ValueError where a model has a part the official code has not."""
  extra = {
    "conv": any(stage.conv for stage in config.stages),
    "qk_norm": any(stage.qk_norm for stage in config.stages),
    "logit_cap": config.logit_cap is not None,
    "ngram_rows": config.ngram_rows > 0,
    "tie_embeddings": config.tie_embeddings,
    "heads": config.heads > 1,
  }
  used = [name for name, is_used in extra.items() if is_used]
  if used:
    raise ValueError(
      f"the official code has no {', '.join(used)}: this model cannot be "
      f"written for it."
    )


def to_arguments(config: ModelConfig) -> dict:
  """Official arguments of a config: the `model` part of a params.json.

  Raises: ValueError where the official code has no such model.
  """
  check_official(config)
  stages = config.stages
  kv_heads = {stage.num_kv_heads for stage in stages}
  if len(kv_heads) > 1:
    raise ValueError(
      f"the official code has one n_kv_heads for all stages, not "
      f"{[stage.num_kv_heads for stage in stages]}."
    )
  if config.upsampling != "simple" and config.num_offsets != NUM_OFFSETS:
    raise ValueError(
      f"num_offsets={config.num_offsets}: the official code has {NUM_OFFSETS}."
    )
  multiplier, multiple_of = _ffn_arguments(stages)
  pooling_type = "simple" + ("" if config.parametric else "_non_param")
  pooling_type += {
    "multi_linear": "_indexed_matmul",
    "repeat": "_repeat",
    "simple": "",
  }[config.upsampling]
  windows = [stage.window for stage in stages]
  return {
    "dimensions": [stage.dim for stage in stages],
    "head_dims": [stage.head_dim for stage in stages],
    "layers": [stage.num_layers for stage in stages],
    "sliding_windows": None if set(windows) == {None} else windows,
    "max_seqlens": list(config.capacities),
    "residuals": [stage.skip for stage in stages[:-1]],
    "block": {
      "n_kv_heads": stages[0].num_kv_heads,
      "ffn_dim_multiplier": multiplier,
      "multiple_of": multiple_of,
      "norm_eps": config.norm_eps,
      "rope_theta": config.rope_theta,
      "max_seqlen": stages[0].capacity,
    },
    "pooling_type": pooling_type,
    "vocab_size": config.vocab_size,
    "lambda_level": config.level_loss_weight,
    "norm_eps": config.head_eps,
  }


def _ffn_arguments(stages) -> tuple[float | None, int]:
  """ffn_dim_multiplier and multiple_of that give every stage its width."""
  for multiple_of in _MULTIPLES:
    for multiplier in _MULTIPLIERS:
      if all(
        _official_ffn(stage.dim, multiplier, multiple_of) == stage.ffn
        for stage in stages
      ):
        return multiplier, multiple_of
  raise ValueError(
    f"feed-forward widths {[stage.ffn for stage in stages]} follow no official "
    f"ffn_dim_multiplier and multiple_of for dims "
    f"{[stage.dim for stage in stages]}."
  )


# ----- splitting ------------------------------------------------------------


def rules_from_strategy(strategy: Mapping[str, str]) -> tuple[str, ...]:
  """Our rules for `data.regex.strategy`, such as {"word1": "1@1"}.

  The official code reads what follows "@" only for a strategy named exactly
  `word`, and so does this; there, only "@1" has a counterpart here.
  """
  rules = []
  for name, value in strategy.items():
    words, _, modulo = str(value).partition("@")
    known = name.startswith("word") and words.isdigit()
    if name in ("pretok", "punct"):
      rules.append(name)
    elif known and (name != "word" or modulo == "1"):
      rules.append(f"word@{int(words)}")
    else:
      raise ValueError(
        f"splitting strategy {name!r}: {value!r} has no counterpart here; name "
        f"the rules yourself, one per stage after the first."
      )
  return tuple(rules)


def strategy_from_rules(rules: Sequence[str]) -> dict[str, str]:
  """Inverse of `rules_from_strategy`.

  Raises: ValueError where the official code has no such rule.
  """
  strategy = {}
  for rule in rules:
    name, _, words = rule.partition("@")
    if rule in ("pretok", "punct"):
      strategy[rule] = "1"
    elif name == "word" and words.isdigit():
      strategy[f"word{words}"] = f"{words}@1"
    else:
      raise ValueError(
        f"splitting rule {rule!r} is not one of the official code's: pretok, "
        f"punct, word@1, word@2, …"
      )
  return strategy
