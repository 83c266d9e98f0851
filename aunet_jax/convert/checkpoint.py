"""An official checkpoint to a workdir, and back: weights with their arguments.

What params.json claims is compared with the names and shapes in the file of
weights before any of it is read.
"""

import dataclasses
import json
from pathlib import Path

from aunet_jax import files
from aunet_jax.config import Config, ModelConfig
from aunet_jax.convert import lingua, weights
from aunet_jax.convert.lingua_arguments import (
  rules_from_strategy,
  strategy_from_rules,
  to_arguments,
)
from aunet_jax.workdir import layout, load

PARAMS = "params.json"  # lies beside the weights


def read_params(path: str | Path) -> tuple[dict, tuple[str, ...] | None]:
  """(model arguments, splitting rules or None) of an official params.json.

  A file that holds the model arguments alone will do.

  Raises: ValueError naming the file.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(
      f"no such file: {path}; give the official arguments with --params."
    )
  try:
    content = files.parse_json(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} must hold a JSON object of arguments.")
  model_args = content.get("model", content)
  if not isinstance(model_args, dict):
    raise ValueError(f"{path}: model must be an object of arguments.")
  strategy = content
  for name in ("data", "regex", "strategy"):
    strategy = strategy.get(name) if isinstance(strategy, dict) else None
  rules = rules_from_strategy(strategy) if isinstance(strategy, dict) else None
  return model_args, rules


def with_rules(config: ModelConfig, rules) -> ModelConfig:
  """The config with a splitting rule for each stage after the first."""
  needed = config.num_stages - 1
  rules = () if rules is None else tuple(rules)
  if len(rules) != needed:
    raise ValueError(
      f"the model has {config.num_stages} stages, so it needs {needed} "
      f"splitting rules, not {list(rules)}; give them with --rules, for "
      f"example --rules=word@1,word@2."
    )
  stages = [
    dataclasses.replace(stage, rule=rule)
    for stage, rule in zip(config.stages, (None, *rules), strict=True)
  ]
  return dataclasses.replace(config, stages=tuple(stages))


def from_lingua(
  source: str | Path,
  workdir: str | Path,
  params: str | Path | None = None,
  rules: tuple[str, ...] | None = None,
  document_mask: bool = True,
) -> Config:
  """Writes a workdir from an official checkpoint.

  Args:
    source: a consolidated directory or a file of weights.
    params: the official params.json; None = the one beside the weights.
    rules: splitting rules of stages 2, 3, …; None = those in params.json.
    document_mask: False = packed documents see each other, as the official
      training (not evaluation) has it.

  Raises: ValueError naming what is wrong, before anything is written.
  """
  source, workdir = Path(source), files.local(workdir, "--workdir")
  if (workdir / layout.CONFIG_FILE).exists():
    raise ValueError(f"{workdir} holds a model already; choose another.")
  if source.is_dir():
    source = source / weights.CONSOLIDATED
  shapes = weights.read_shapes(source)
  model_args, saved_rules = read_params(params or source.parent / PARAMS)
  model = lingua.model_of(shapes, model_args)
  model = with_rules(model, saved_rules if rules is None else rules)
  model = dataclasses.replace(model, document_mask=document_mask)
  config = Config(model=model)
  _, tree = lingua.from_lingua(weights.read_weights(source), model_args)
  load.save_params(workdir, config, tree)
  return config


def to_lingua(
  workdir: str | Path, target: str | Path, trust_rules: bool = False
) -> dict:
  """Writes the model of a workdir as an official file and its params.json.

  Args: trust_rules: see `aunet_jax.load`.
  Returns: the content of params.json.
  Raises: ValueError where the official code has no such model.
  """
  target = Path(target)
  weights.format_of(target)
  loaded = load.load(workdir, trust_rules=trust_rules)
  if loaded.tokenizer is not None:
    raise ValueError(
      f"{workdir} holds a model of tokens; the official code has none."
    )
  model = loaded.config.model
  content = {
    "model": to_arguments(model),
    "data": {"regex": {"strategy": strategy_from_rules(model.rules)}},
  }
  weights.write_weights(target, lingua.to_lingua(model, loaded.params))
  text = json.dumps(content, indent=2) + "\n"
  files.write_whole(target.parent / PARAMS, text)
  return content
