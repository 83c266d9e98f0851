"""Plans a scaling study: models x budgets x sizes x seeds, as whole configs.

A study is a directory:

  study.json            the command, versions, data and its fingerprint
  cells/ID/cell.json    what one run is for, and what it was planned to cost
  cells/ID/plan.json    its config, complete; cells/ID is also its workdir

Budgets are training FLOPs without the output head, as in the laws (`laws.py`).
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aunet_jax import config as config_lib
from aunet_jax import terminal
from aunet_jax.aunet import counts
from aunet_jax.config import Config, ModelConfig
from aunet_jax.data import packing, planner, shards, sources
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.scaling import laws
from aunet_jax.splitting.splitter import Splitter

STUDY_FILE, CELL_FILE, PLAN_FILE = "study.json", "cell.json", "plan.json"


# Compute of the smallest run behind the paper's laws, about (Section 2.3).
LEAST_COMPUTE_OF_LAWS = 1e18


SAMPLE_ROWS = 400  # of text, to measure how full rows get


MODELS = "byte, bpe, aunet2, aunet3, aunet4, stride@N or FILE.py:FUNCTION"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One run of a study."""

  id: str
  model: str
  budget_flops: float
  size: float  # FLOPs per byte over what the ratio asks for, wanted
  seed: int
  config: Config
  fill: tuple[float, ...]  # share of each stage's slots expected to be real
  tokenizer: str | None = None  # hash; None = the model reads bytes
  bytes_per_unit: float = 1.0  # of a token

  def to_json(self) -> dict:
    """Everything `cell.json` holds; FLOPs and bytes are of the whole run."""
    model, train = self.config.model, self.config.train
    rows = train.num_steps * train.batch_size
    positions = [
      rows * s.capacity * fill
      for s, fill in zip(model.stages, self.fill, strict=True)
    ]
    units, flops = positions[0], counts.paper_flops_per_byte(model, head=False)
    with_head = counts.paper_flops_per_byte(model)
    return {
      "id": self.id,
      "model": self.model,
      "budget_flops": self.budget_flops,
      "size": self.size,
      "seed": self.seed,
      "params": num_body_parameters(model),
      "flops_per_byte": flops / self.bytes_per_unit,
      "flops_per_byte_with_head": with_head / self.bytes_per_unit,
      "bytes": units * self.bytes_per_unit,
      "ratio": laws.data_to_model_ratio(units, flops, self.bytes_per_unit),
      "useful_flops": counts.useful_train_flops(model, positions),
      "padded_flops": rows * counts.train_flops_per_row(model),
      "learning_rate": self.config.optimizer.learning_rate,
      "batch_bytes": units * self.bytes_per_unit / train.num_steps,
      "tokenizer": self.tokenizer,
      "bytes_per_token": self.bytes_per_unit if self.tokenizer else None,
    }


def num_body_parameters(model: ModelConfig) -> int:
  """Parameters without embedding and output head."""
  return sum(
    sum(n for kind, n in kinds.items() if kind not in ("embedding", "head"))
    for kinds in counts.parameters(model)
  )


# ----- models ---------------------------------------------------------------


def _stride(models: list[ModelConfig], n: int) -> list[ModelConfig]:
  """Two-stage models whose words are n bytes each."""
  changed = []
  for model in models:
    first, second = model.stages
    capacity = -(-first.capacity // n) + 1
    second = dataclasses.replace(second, rule=f"stride@{n}", capacity=capacity)
    changed.append(dataclasses.replace(model, stages=(first, second)))
  return changed


def ladder(name: str) -> list[ModelConfig]:
  """Models of growing size of the family a plan calls `name`.

  Raises: ValueError for an unknown name.
  """
  kind, at, argument = name.partition("@")
  if kind == "stride" and argument.isascii() and argument.isdigit():
    if int(argument) >= 2:
      return _stride(laws.ladder(2), int(argument))
  if name == "byte":
    return laws.ladder(1)
  if name == "bpe":
    return [
      dataclasses.replace(model, vocab_size=laws.BPE_VOCAB_SIZE)
      for model in laws.ladder(1)
    ]
  if name in ("aunet2", "aunet3", "aunet4"):
    return laws.ladder(int(name[-1]))
  raise ValueError(f"--models: {name!r} is no model; use {MODELS}.")


def load_function(name: str) -> Callable[[float], Config]:
  """The user's own model: FILE.py:FUNCTION of a budget in FLOPs.

  It returns a config as a config file does, sizes, steps, batch and learning
  rate included.

  Raises: ValueError where it cannot be called.
  """
  path, _, attribute = name.rpartition(":")
  if not os.path.isfile(path):
    raise ValueError(f"--models: {name!r}: there is no file {path!r}.")
  spec = importlib.util.spec_from_file_location("scaling_model", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  function = getattr(module, attribute, None)
  if not callable(function):
    raise ValueError(f"--models: {path} has no function {attribute!r}.")

  return lambda budget: config_lib.as_config(
    function(budget), f"--models: {name}"
  )


# ----- laws of one's own ----------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnLaws:
  """Batch and learning rate of a model as (a, b) of a C^b; None = the paper's.

  budgets: lowest and highest C they were fitted to; None = not said.
  """

  batch_bytes: tuple[float, float] | None = None
  learning_rate: tuple[float, float] | None = None
  budgets: tuple[float, float] | None = None

  def at(self, name: str, compute: float) -> float | None:
    law = getattr(self, name)
    return None if law is None else law[0] * compute ** law[1]


def read_laws(path: str) -> dict[str, OwnLaws]:
  """Laws by model from a JSON file.

  {"byte": {"learning_rate": [3.1, -0.18], "batch_bytes": [2048, 0],
            "budgets": [1e14, 1e16]}}
  Raises: ValueError naming what is wrong with it.
  """
  names = [field.name for field in dataclasses.fields(OwnLaws)]
  try:
    with open(path) as file:
      values = json.load(file)
  except (OSError, ValueError) as error:
    raise ValueError(f"--laws={path} cannot be read: {error}") from None
  if not isinstance(values, dict):
    raise ValueError(f"--laws={path} must hold an object of models.")
  result = {}
  for model, laws_of in values.items():
    where = f"--laws={path}: {model}"
    if not isinstance(laws_of, dict) or set(laws_of) - set(names):
      raise ValueError(f"{where} must be an object of {', '.join(names)}.")
    for name, pair in laws_of.items():
      good = isinstance(pair, list) and len(pair) == 2
      good = good and all(type(v) in (int, float) for v in pair)
      if not good or not (pair[0] > 0 and all(map(math.isfinite, pair))):
        raise ValueError(
          f"{where}.{name}={pair} must be two numbers, the first above 0."
        )
    result[model] = OwnLaws(**{k: tuple(v) for k, v in laws_of.items()})
  return result


# ----- the data behind a plan -----------------------------------------------


class Sample:
  """Text of the corpus, to fit capacities to it. Without text, the paper's.

  Args: paths: as data.train. row_bytes: positions of a row. tokenizer: of the
    models that read tokens.
  Attributes: bytes_per_token: of this text; without text, the paper's.
  Raises: ValueError for paths without text, or too little of it.
  """

  def __init__(
    self,
    paths: str | None,
    row_bytes: int,
    tokenizer: Tokenizer | None = None,
  ):
    self.row_bytes, self.documents = row_bytes, None
    self.tokenizer, self.bytes_per_token = tokenizer, laws.BYTES_PER_TOKEN
    self.fingerprint = None
    self._known = {}
    if paths is not None:
      files, _ = sources.list_sources(paths)
      self.fingerprint = fingerprint(paths)
      self.documents = shards.sample(files, "text", SAMPLE_ROWS * row_bytes)
    if tokenizer is not None and self.documents is not None:
      self._tokens = [tokenizer.encode(text) for text in self.documents]
      self.bytes_per_token = sum(map(len, self.documents)) / sum(
        map(len, self._tokens)
      )

  def fit_tokens(
    self, model: ModelConfig
  ) -> tuple[ModelConfig, tuple[float, ...]]:
    """As `fit`, for rows of tokens that hold as many bytes as the others.

    Raises: ValueError where there is text, but no tokenizer for it.
    """
    length = max(2, round(self.row_bytes / self.bytes_per_token))
    fill, vocab_size = 1.0, model.vocab_size
    if self.documents is not None:
      if self.tokenizer is None:
        raise ValueError(
          "--models=bpe reads tokens of your text: name a --tokenizer; "
          "python -m aunet_jax.tokenizer makes one."
        )
      packer = packing.Packer(Splitter(()), [length])
      rows = [
        row
        for number, tokens in enumerate(self._tokens)
        for row in packer.add(number, tokens, None)
      ]
      rows += packer.finish()
      fill = float(packer.used_S[0] / (len(rows) * length))
      vocab_size = self.tokenizer.vocab_size
    (stage,) = model.stages
    stage = dataclasses.replace(stage, capacity=length)
    model = dataclasses.replace(model, stages=(stage,), vocab_size=vocab_size)
    return model, (fill,)

  def fit(self, model: ModelConfig) -> tuple[ModelConfig, tuple[float, ...]]:
    """The model for rows of this text, and the share of slots it fills."""
    if self.documents is None:
      share = self.row_bytes / model.capacities[0]
      capacities = tuple(math.ceil(c * share) for c in model.capacities)
      fill = (1.0,) * model.num_stages
    else:
      if model.rules not in self._known:
        self._known[model.rules] = planner.recommend(
          self.documents, Splitter(model.rules), self.row_bytes
        )
      plan = self._known[model.rules]
      capacities, fill = plan.capacities, plan.fill
    stages = tuple(
      dataclasses.replace(stage, capacity=capacity)
      for stage, capacity in zip(model.stages, capacities, strict=True)
    )
    return dataclasses.replace(model, stages=stages), tuple(fill)


def fingerprint(paths: str) -> str:
  """Names a set of files by their names and sizes.

  Training checks the text itself; this tells studies of other text apart.
  """
  files, _ = sources.list_sources(paths)
  names = []
  for file in files:
    local = os.path.isfile(file.path)
    size = os.path.getsize(file.path) if local else None
    names.append([os.path.basename(file.path), size])
  text = json.dumps(sorted(names, key=str))
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# ----- cells ----------------------------------------------------------------


def make_cells(
  models: Sequence[str],
  budgets: Sequence[float],
  *,
  sample: Sample,
  sizes: Sequence[float] = (1.0,),
  ratio: float = laws.SCALING_RATIO,
  seeds: Sequence[int] = (0,),
  single_seed_above: float = math.inf,
  batch_bytes: Sequence[float | None] = (None,),
  learning_rates: Sequence[float | None] = (None,),
  own_laws: Mapping[str, OwnLaws] | None = None,
  finish: Callable[[Config, str], Config] = lambda config, cell: config,
) -> list[Cell]:
  """Every run of a study, cheapest budget first.

  Args:
    sizes: of an IsoFLOP grid: FLOPs per byte over what the ratio asks for.
      Sizes for which the ladder has the same model make one cell.
    single_seed_above: budgets above it have the first seed alone.
    batch_bytes, learning_rates: None = the laws.
    own_laws: by model, where they are not to be the paper's.
    finish: sees every config with its cell's id last.
  Raises: ValueError naming what cannot be planned.
  """
  cells = []
  own_laws = own_laws or {}
  unknown = sorted(set(own_laws) - set(models))
  if unknown:
    raise ValueError(
      f"the laws are of {', '.join(unknown)}, not among --models="
      f"{','.join(models)}."
    )
  several = len(sizes) > 1
  sweeps = len(batch_bytes) * len(learning_rates) > 1
  for budget in sorted(budgets):
    for name in models:
      unit = sample.bytes_per_token if name == "bpe" else None
      own = own_laws.get(name, OwnLaws())
      for size, model, fill, base in _sized(name, budget, sizes, ratio, sample):
        for batch in batch_bytes:
          for rate in learning_rates:
            for seed in seeds if budget <= single_seed_above else seeds[:1]:
              cell = f"{_slug(name)}-{budget:.3g}".replace("+", "")
              cell += f"-x{size:g}" if several else ""
              config = base or laws.run_config(
                model,
                budget,
                batch_bytes=batch or own.at("batch_bytes", budget),
                learning_rate=rate or own.at("learning_rate", budget),
                byte_fill=fill[0],
                bytes_per_unit=unit,
              )
              tokenizer = sample.tokenizer if name == "bpe" else None
              if tokenizer is not None:
                source = config_lib.DataConfig(tokenizer=tokenizer.path)
                config = dataclasses.replace(config, data=source)
              if sweeps:
                rows = config.train.batch_size
                cell += f"-b{rows}-lr{config.optimizer.learning_rate:.3g}"
              cell += f"-s{seed}"
              config = dataclasses.replace(config, seed=seed)
              cells.append(
                Cell(
                  id=cell,
                  model=name,
                  budget_flops=budget,
                  size=size,
                  seed=seed,
                  config=finish(config, cell),
                  fill=fill,
                  tokenizer=None if tokenizer is None else tokenizer.hash,
                  bytes_per_unit=unit or 1.0,
                )
              )
  twice = [
    c.id for i, c in enumerate(cells) if c.id in {d.id for d in cells[:i]}
  ]
  if twice:
    raise ValueError(f"two runs would be called {twice[0]}; drop one of them.")
  short = [c.id for c in cells if c.config.train.eval_bytes is not None]
  if short and len({c.config.model for c in cells}) > 1:
    raise ValueError(
      f"{short[0]} sets train.eval_bytes, which takes other held-out text for "
      f"rows of another shape; leave it out, and give a --heldout as short as "
      f"you want it."
    )
  return cells


def _slug(name: str) -> str:
  name = name.rpartition(":")[2]
  return "".join(c for c in name if c.isalnum())


def _sized(name, budget, sizes, ratio, sample):
  """(size, model, fill, whole config or None) for one model and budget."""
  if ":" in name:
    base = load_function(name)(budget)
    return [(1.0, base.model, (1.0,) * base.model.num_stages, base)]
  tokens = name == "bpe"
  fit = sample.fit_tokens if tokens else sample.fit
  fitted = [fit(model) for model in ladder(name)]
  fills = {model: fill for model, fill in fitted}
  found = {}
  for size in sorted(sizes):
    wanted = size * laws.flops_per_byte_for(budget, ratio)
    wanted *= sample.bytes_per_token if tokens else 1.0
    try:
      model = laws.nearest_model([model for model, _ in fitted], wanted)
    except ValueError as error:
      raise ValueError(f"{name} at {budget:.3g} FLOPs: {error}") from None
    found.setdefault(model, size)
  return [(size, model, fills[model], None) for model, size in found.items()]


def warnings_of(
  cells: Sequence[Cell], own_laws: Mapping[str, OwnLaws]
) -> list[str]:
  """What a plan's batches and learning rates rest on that nobody has measured.

  Args: cells: those that follow laws. own_laws: as in `make_cells`.
  """
  lines = []
  papers, small, outside = set(), set(), {}
  for cell in cells:
    own = own_laws.get(cell.model, OwnLaws())
    if ":" in cell.model:  # the user's own function sets both
      continue
    if own.batch_bytes is None or own.learning_rate is None:
      papers.add(cell.model)
      if cell.budget_flops < LEAST_COMPUTE_OF_LAWS:
        small.add(cell.budget_flops)
    low, high = own.budgets or (0, math.inf)
    if not low <= cell.budget_flops <= high:
      outside.setdefault(cell.model, set()).add(cell.budget_flops)
  for model, budgets in outside.items():
    low, high = own_laws[model].budgets
    lines.append(
      f"the laws given for {model} were fitted to {low:.3g} to {high:.3g} "
      f"FLOPs; {', '.join(f'{b:.3g}' for b in sorted(budgets))} lie outside."
    )
  if small:
    lines.append(
      f"batch and learning rate extrapolate the paper's laws from about "
      f"{LEAST_COMPUTE_OF_LAWS:.0e} down to {min(small):.3g} FLOPs; sweep them "
      f"with `hp`, and give what you find as --laws, or --batch_bytes and "
      f"--learning_rates."
    )
  unlawful = sorted(papers - {"bpe", "aunet2", "aunet3"})
  if unlawful:
    lines.append(
      f"the paper has no laws for {', '.join(unlawful)}: AU-Net's are used, "
      f"which were fitted to two and three stages."
    )
  return lines


# ----- on disk --------------------------------------------------------------


def write(study: Path, cells: Sequence[Cell], about: dict) -> None:
  """Writes a study directory.

  Raises: ValueError where it holds a study already.
  """
  if (study / STUDY_FILE).exists():
    raise ValueError(
      f"{study} holds a study already; `run` continues it. Use another "
      f"directory for another plan."
    )
  for cell in cells:
    directory = study / "cells" / cell.id
    directory.mkdir(parents=True, exist_ok=True)
    values = cell.to_json() | {"data_fingerprint": about["data_fingerprint"]}
    (directory / CELL_FILE).write_text(json.dumps(values, indent=1) + "\n")
    (directory / PLAN_FILE).write_text(cell.config.to_json() + "\n")
  # Last: a plan that was cut short is no study.
  (study / STUDY_FILE).write_text(json.dumps(about, indent=1) + "\n")


def show_plan(cells, flops_per_second, price_per_hour) -> str:
  """One line a cell, then the sum of what it will take."""
  width = max(len(cell.id) for cell in cells)
  lines = [
    f"{'cell':{width}}  params  FLOPs/byte  bytes   ratio   batch  "
    f"learning rate  useful/padded FLOPs  time"
  ]
  total = 0.0
  for cell in cells:
    v = cell.to_json()
    total += v["padded_flops"]
    time = ""
    if flops_per_second:
      time = terminal.duration(v["padded_flops"] / flops_per_second)
    lines.append(
      f"{cell.id:{width}}  {terminal.si(v['params']):>6}  "
      f"{v['flops_per_byte']:10.3g}  {terminal.si(v['bytes']):>6}  "
      f"{v['ratio']:5.3g}  {terminal.si(v['batch_bytes']):>6}  "
      f"{v['learning_rate']:13.4g}  "
      f"{v['useful_flops']:.2e}/{v['padded_flops']:.2e}  {time}".rstrip()
    )
  line = f"{len(cells)} cells, {total:.3g} padded FLOPs"
  if flops_per_second:
    hours = total / flops_per_second / 3600
    line += f", {terminal.duration(3600 * hours)} at {flops_per_second:.3g}/s"
    if price_per_hour:
      line += f", costs {hours * price_per_hour:.2f}"
  return "\n".join([*lines, line])
