"""Official AU-Net checkpoints to a workdir, and back.

  python -m aunet_jax.convert --from-lingua=CKPT --workdir=DIR
  python -m aunet_jax.convert --to-lingua=OUT --workdir=DIR

CKPT is the official code's consolidated directory (`consolidated.pth` and
`params.json`) or one file of weights, with its `params.json` beside it or
given by --params: `.pth` (needs torch), `.npz` or `.safetensors` under the
official names. OUT is a file of one of these kinds; `params.json` is written
beside it. Generate, evaluate and train read the workdir; to train on, give the
`config.py` in it as --config.

Nothing in a checkpoint is ever executed: `.pth` is read by torch with
`weights_only=True`, `.npz` without pickle.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from aunet_jax.config import Config, ModelConfig
from aunet_jax.convert import lingua
from aunet_jax.convert.lingua_arguments import (
  rules_from_strategy,
  strategy_from_rules,
  to_arguments,
)
from aunet_jax.convert.weights import (
  CONSOLIDATED,
  format,
  read_weights,
  write_weights,
)
from aunet_jax.workdir import layout, load

PARAMS = "params.json"


CONFIG_PY = "config.py"  # in the workdir, for `train --config`


# ----- params.json ----------------------------------------------------------


def read_params(path: str | Path) -> tuple[dict, tuple[str, ...] | None]:
  """(model arguments, splitting rules or None) of an official params.json.

  A file that holds the model arguments alone will do.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(
      f"no such file: {path}; give the official arguments with --params."
    )
  try:
    content = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} must hold a JSON object of arguments.")
  model_args = content.get("model", content)
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


def config_file(model: ModelConfig, weights: str) -> str:
  """Source of a config file with this network, for `train --config`."""

  def changed(value):  # fields that are not at their default
    return [
      (field.name, getattr(value, field.name))
      for field in dataclasses.fields(value)
      if getattr(value, field.name) != field.default and field.name != "stages"
    ]

  lines = [
    f'"""The network of {weights}, converted."""',
    "",
    "from aunet_jax import config",
    "",
    "",
    "def get_config():",
    "  c = config.default(",
    "    stages=[",
  ]
  for stage in model.stages:
    fields = ", ".join(f"{name}={value!r}" for name, value in changed(stage))
    lines.append(f"      config.stage({fields}),")
  lines += ["    ]", "  )"]
  lines += [f"  c.model.{name} = {value!r}" for name, value in changed(model)]
  return "\n".join([*lines, "  return c", ""])


# ----- the command ----------------------------------------------------------


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

  Raises: ValueError naming what is wrong; a workdir is written whole or not.
  """
  source, workdir = Path(source), Path(workdir)
  if (workdir / layout.CONFIG_FILE).exists():
    raise ValueError(f"{workdir} holds a model already; choose another.")
  if source.is_dir():
    source = source / CONSOLIDATED
  weights = read_weights(source)
  model_args, saved_rules = read_params(params or source.parent / PARAMS)
  model, tree = lingua.from_lingua(weights, model_args)
  model = with_rules(model, saved_rules if rules is None else rules)
  model = dataclasses.replace(model, document_mask=document_mask)
  config = Config(model=model)
  load.save_params(workdir, config, tree)
  (workdir / CONFIG_PY).write_text(config_file(model, source.name))
  return config


def to_lingua(workdir: str | Path, target: str | Path) -> dict:
  """Writes the model of a workdir as an official file and its params.json.

  Returns: the content of params.json.
  Raises: ValueError where the official code has no such model.
  """
  target = Path(target)
  format(target)
  loaded = load.load(workdir)
  if loaded.tokenizer is not None:
    raise ValueError(
      f"{workdir} holds a model of tokens; the official code has none."
    )
  model = loaded.config.model
  content = {
    "model": to_arguments(model),
    "data": {"regex": {"strategy": strategy_from_rules(model.rules)}},
  }
  write_weights(target, lingua.to_lingua(model, loaded.params))
  (target.parent / PARAMS).write_text(json.dumps(content, indent=2) + "\n")
  return content


def main(args=None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  way = parser.add_mutually_exclusive_group(required=True)
  way.add_argument(
    "--from-lingua", metavar="CKPT", help="official weights, file or directory"
  )
  way.add_argument("--to-lingua", metavar="OUT", help="official file to write")
  parser.add_argument("--workdir", required=True)
  parser.add_argument(
    "--params", metavar="JSON", help="official params.json (default: beside)"
  )
  parser.add_argument(
    "--rules", help="splitting rules of stages 2, 3, …, joined by commas"
  )
  parser.add_argument(
    "--official_rows",
    action="store_true",
    help="no document masks: the documents of a row see each other",
  )
  flags = parser.parse_args(args)
  try:
    if flags.from_lingua:
      config = from_lingua(
        flags.from_lingua,
        flags.workdir,
        flags.params,
        tuple(flags.rules.split(",")) if flags.rules else None,
        not flags.official_rows,
      )
      print(f"wrote {flags.workdir}: rules {', '.join(config.model.rules)}")
    else:
      to_lingua(flags.workdir, flags.to_lingua)
      print(f"wrote {flags.to_lingua} and {PARAMS}")
  except (ValueError, OSError, layout.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
