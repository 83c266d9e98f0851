"""Plans a scaling study: models x budgets x sizes x seeds, as complete configs.

Budgets are training FLOPs without the output head, as in the laws (`laws.py`);
`study.py` says what is written.
"""

import collections
import dataclasses
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aunet_jax import config as config_lib
from aunet_jax import terminal
from aunet_jax.aunet import counts
from aunet_jax.config import Config, ModelConfig
from aunet_jax.files import write_whole
from aunet_jax.scaling import laws, study
from aunet_jax.scaling.sample import Sample
from aunet_jax.scaling.study import About, Run

# Compute of the smallest run behind the paper's laws, about (Section 2.3).
LEAST_COMPUTE_OF_LAWS = 1e18
MODELS = "byte, bpe, aunet2, aunet3, aunet4, stride@N or FILE.py:FUNCTION"


class Planned(NamedTuple):
  """A run and the complete config that makes it."""

  run: Run
  config: Config


def expected(
  config: Config, fill: Sequence[float], bytes_per_unit: float
) -> dict:
  """Columns of a run: what its config is to read and to cost in all.

  Args: fill: of each stage's slots. bytes_per_unit: of a token, or 1.
  """
  model, train = config.model, config.train
  rows = train.num_steps * train.batch_size
  positions = [
    rows * stage.capacity * share
    for stage, share in zip(model.stages, fill, strict=True)
  ]
  units, num_bytes = positions[0], positions[0] * bytes_per_unit
  flops = counts.paper_flops_per_byte(model, head=False)
  with_head = counts.paper_flops_per_byte(model)
  return {
    "params": num_body_parameters(model),
    "flops_per_byte": flops / bytes_per_unit,
    "flops_per_byte_with_head": with_head / bytes_per_unit,
    "ratio": laws.data_to_model_ratio(units, flops, bytes_per_unit),
    "bytes": num_bytes,
    "batch_bytes": num_bytes / train.num_steps,
    "learning_rate": config.optimizer.learning_rate,
    "useful_flops": counts.useful_train_flops(model, positions),
    "padded_flops": rows * counts.train_flops_per_row(model),
    "fill": tuple(fill),
    "steps": train.num_steps,
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

  Raises: ValueError where it cannot be called; the function it returns, where
    the user's fails or gives no config.
  """
  path, _, attribute = name.rpartition(":")
  where = f"--models: {name}"
  if not os.path.isfile(path):
    raise ValueError(f"{where}: there is no file {path!r}.")
  spec = importlib.util.spec_from_file_location("scaling_model", path)
  if spec is None:
    raise ValueError(f"{where}: {path} is no .py file.")
  module = importlib.util.module_from_spec(spec)

  def attempt(what, function, *args):
    try:
      return function(*args)
    except Exception as error:  # whatever a user's file can raise
      kind = type(error).__name__
      raise ValueError(f"{where} {what}: {kind}: {error}") from error

  attempt("cannot be read", spec.loader.exec_module, module)
  function = getattr(module, attribute, None)
  if not callable(function):
    raise ValueError(f"{where}: {path} has no function {attribute!r}.")
  return lambda budget: config_lib.as_config(
    attempt(f"fails at {budget:.3g} FLOPs", function, budget), where
  )


# ----- laws of one's own ----------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnLaws:
  """Batch and learning rate of a model as (a, b) of a C^b; None = the paper's.

  budgets: lowest and highest C they were fitted to; None = not said.
  """

  batch_bytes: tuple[float, ...] | None = None
  learning_rate: tuple[float, ...] | None = None
  budgets: tuple[float, ...] | None = None

  def __post_init__(self):
    for name, pair in vars(self).items():
      if pair is not None and not (len(pair) == 2 and pair[0] > 0):
        raise ValueError(
          f"{name}={list(pair)} must be two numbers, the first above 0."
        )

  def at(self, name: str, compute: float) -> float | None:
    law = getattr(self, name)
    return None if law is None else law[0] * compute ** law[1]


def read_laws(path: str) -> dict[str, OwnLaws]:
  """Laws by model from a JSON file.

  {"byte": {"learning_rate": [3.1, -0.18], "batch_bytes": [2048, 0],
            "budgets": [1e14, 1e16]}}
  Raises: ValueError naming what is wrong with it.
  """
  values = study.parse_json(study.read_text(Path(path)), path)
  if not isinstance(values, dict):
    raise ValueError(f"--laws={path} must hold an object of models.")
  names = [field.name for field in dataclasses.fields(OwnLaws)]
  result = {}
  for model, laws_of in values.items():
    where = f"--laws={path}: {model}"
    if isinstance(laws_of, dict) and set(laws_of) - set(names):
      raise ValueError(f"{where} must be an object of {', '.join(names)}.")
    result[model] = study.parse(OwnLaws, laws_of, where)
  return result


# ----- settings of every run ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
  """What every config of a study gets beside its model and its laws.

  others: as "train.batch_size=8", of the command line.
  """

  data: str | None
  heldout: str | None
  others: Sequence[str] = ()

  def __post_init__(self):
    for item in self.others:
      if "=" not in item:
        raise ValueError(f"--set={item}: write --set=train.batch_size=8.")

  def apply(self, config: Config, name: str) -> Config:
    """Raises: ValueError naming run and setting."""
    steps = config.train.num_steps
    settings = [
      f"train.log_every_steps={max(1, steps // 100)}",
      f"checkpoint.every_steps={max(1, steps // 10)}",
      "checkpoint.keep=1",
      "train.sample_bytes=0",
      "train.tensorboard=False",
    ]
    if self.data is not None:
      settings.append(f"data.train={self.data}")
    if self.heldout is not None:
      settings.append(f"data.heldout={self.heldout}")
    try:
      return config_lib.override(config, [*settings, *self.others])
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from None


# ----- runs -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """What a study varies: a run for every combination.

  Raises: ValueError for laws of models that are not planned.
  """

  models: Sequence[str]
  budgets: Sequence[float]
  # Of an IsoFLOP grid: FLOPs per byte over what the ratio asks for. Sizes for
  # which the ladder has the same model make one run.
  sizes: Sequence[float] = (1.0,)
  ratio: float = laws.SCALING_RATIO
  seeds: Sequence[int] = (0,)
  single_seed_above: float = math.inf  # budgets above it: the first seed alone
  batch_bytes: Sequence[float | None] = (None,)  # None = the laws
  learning_rates: Sequence[float | None] = (None,)
  own_laws: Mapping[str, OwnLaws] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    unknown = sorted(set(self.own_laws) - set(self.models))
    if unknown:
      raise ValueError(
        f"the laws are of {', '.join(unknown)}, not among --models="
        f"{','.join(self.models)}."
      )


def make_runs(
  grid: Grid,
  sample: Sample,
  finish: Callable[[Config, str], Config] = lambda config, name: config,
) -> list[Planned]:
  """Every run of a study, cheapest budget first.

  Args: finish: sees every config with its run's id last.
  Raises: ValueError naming what cannot be planned.
  """
  planned = []
  for budget, name in itertools.product(sorted(grid.budgets), grid.models):
    bpe = sample.tokenizer if name == "bpe" else None
    unit = sample.bytes_per_token if name == "bpe" else None
    own = grid.own_laws.get(name, OwnLaws())
    one_seed = budget > grid.single_seed_above
    for sized, batch, rate, seed in itertools.product(
      _sized(grid, name, budget, sample),
      grid.batch_bytes,
      grid.learning_rates,
      grid.seeds[:1] if one_seed else grid.seeds,
    ):
      config = sized.config or laws.run_config(
        sized.model,
        budget,
        batch_bytes=batch or own.at("batch_bytes", budget),
        learning_rate=rate or own.at("learning_rate", budget),
        byte_fill=sized.fill[0],
        bytes_per_unit=unit,
      )
      if bpe is not None:
        source = config_lib.DataConfig(tokenizer=bpe.path)
        config = dataclasses.replace(config, data=source)
      config = dataclasses.replace(config, seed=seed)
      run_id = _name(grid, name, budget, sized.size, config)
      config = finish(config, run_id)
      run = Run(
        id=run_id,
        run=f"cells/{run_id}",
        model=name,
        budget_flops=budget,
        size=sized.size,
        seed=seed,
        loss=None,
        excluded=None,
        planned_data=sample.fingerprint,
        tokenizer=None if bpe is None else bpe.hash,
        bytes_per_token=None if bpe is None else unit,
        **expected(config, sized.fill, unit or 1.0),
      )
      planned.append(Planned(run, config))
  names = collections.Counter(run.id for run, _ in planned)
  twice = [name for name, number in names.items() if number > 1]
  if twice:
    raise ValueError(f"two runs would be called {twice[0]}; drop one of them.")
  short = [p.run.id for p in planned if p.config.train.eval_bytes is not None]
  if short and len({p.config.model for p in planned}) > 1:
    raise ValueError(
      f"{short[0]} sets train.eval_bytes, which takes other held-out text for "
      f"rows of another shape; leave it out, and give a --heldout as short as "
      f"you want it."
    )
  return planned


def _name(
  grid: Grid, model: str, budget: float, size: float, config: Config
) -> str:
  """An id that tells what differs between the runs of the grid."""
  name = f"{_slug(model)}-{budget:.3g}".replace("+", "")
  if len(grid.sizes) > 1:
    name += f"-x{size:g}"
  if len(grid.batch_bytes) * len(grid.learning_rates) > 1:
    rate = config.optimizer.learning_rate
    name += f"-b{config.train.batch_size}-lr{rate:.3g}"
  return f"{name}-s{config.seed}"


def _slug(name: str) -> str:
  name = name.rpartition(":")[2]
  return "".join(c for c in name if c.isalnum())


class _Sized(NamedTuple):
  """One model of a family at a budget."""

  size: float
  model: ModelConfig
  fill: tuple[float, ...]
  config: Config | None = None  # of the user's own function: complete


def _sized(
  grid: Grid, name: str, budget: float, sample: Sample
) -> list[_Sized]:
  if ":" in name:
    own = load_function(name)(budget)
    return [_Sized(1.0, own.model, (1.0,) * own.model.num_stages, own)]
  tokens = name == "bpe"
  fit = sample.fit_tokens if tokens else sample.fit
  fills = dict(fit(model) for model in ladder(name))
  found = {}
  for size in sorted(grid.sizes):
    wanted = size * laws.flops_per_byte_for(budget, grid.ratio)
    wanted *= sample.bytes_per_token if tokens else 1.0
    try:
      model = laws.nearest_model(list(fills), wanted)
    except ValueError as error:
      raise ValueError(f"{name} at {budget:.3g} FLOPs: {error}") from None
    found.setdefault(model, size)
  return [_Sized(size, model, fills[model]) for model, size in found.items()]


def warnings_of(grid: Grid) -> list[str]:
  """What batches and learning rates rest on that nobody has measured."""
  if None not in (*grid.batch_bytes, *grid.learning_rates):
    return []
  lines = []
  papers, small, outside = set(), set(), {}
  for budget, model in itertools.product(sorted(grid.budgets), grid.models):
    own = grid.own_laws.get(model, OwnLaws())
    if ":" in model:  # the user's own function sets both
      continue
    if own.batch_bytes is None or own.learning_rate is None:
      papers.add(model)
      if budget < LEAST_COMPUTE_OF_LAWS:
        small.add(budget)
    low, high = own.budgets or (0, math.inf)
    if not low <= budget <= high:
      outside.setdefault(model, set()).add(budget)
  for model, budgets in outside.items():
    low, high = grid.own_laws[model].budgets
    lines.append(
      f"the laws given for {model} were fitted to {low:.3g} to {high:.3g} "
      f"FLOPs; {', '.join(f'{b:.3g}' for b in sorted(budgets))} lie outside."
    )
  if small:
    lines.append(
      f"batch and learning rate extrapolate the paper's laws from about "
      f"{LEAST_COMPUTE_OF_LAWS:.0e} down to {min(small):.3g} FLOPs; sweep them "
      f"(several --batch_bytes and --learning_rates), and give what you find "
      f"as --laws, or one of each."
    )
  unlawful = sorted(papers - {"bpe", "aunet2", "aunet3"})
  if unlawful:
    lines.append(
      f"the paper has no laws for {', '.join(unlawful)}: AU-Net's are used, "
      f"which were fitted to two and three stages."
    )
  return lines


# ----- on disk, and shown ---------------------------------------------------


def write(directory: Path, planned: Sequence[Planned], about: About) -> None:
  """Writes a study directory.

  Raises: ValueError where it holds a study already.
  """
  if (directory / study.STUDY_FILE).exists():
    raise ValueError(
      f"{directory} holds a study already; `run` continues it. Use another "
      f"directory for another plan."
    )
  write_cells(directory, planned, about)


def write_cells(
  directory: Path, planned: Sequence[Planned], about: About
) -> None:
  """As `write`, whatever is there."""
  for run, config in planned:
    study.write_run(directory, run, config.to_json())
  # Last: a plan that was cut short is no study.
  text = json.dumps(dataclasses.asdict(about), indent=1)
  write_whole(directory / study.STUDY_FILE, text + "\n")


def show(
  runs: Sequence[Run],
  flops_per_second: float | None,
  price_per_hour: float | None,
) -> str:
  """One line a run, then the sum of what it will take."""
  width = max(len(run.id) for run in runs)
  lines = [
    f"{'cell':{width}}  params  FLOPs/byte  bytes   ratio   batch  "
    f"learning rate  useful/padded FLOPs  time"
  ]
  for run in runs:
    time = ""
    if flops_per_second:
      time = terminal.duration(run.padded_flops / flops_per_second)
    lines.append(
      f"{run.id:{width}}  {terminal.si(run.params):>6}  "
      f"{run.flops_per_byte:10.3g}  {terminal.si(run.bytes):>6}  "
      f"{run.ratio:5.3g}  {terminal.si(run.batch_bytes):>6}  "
      f"{run.learning_rate:13.4g}  "
      f"{run.useful_flops:.2e}/{run.padded_flops:.2e}  {time}".rstrip()
    )
  total = float(sum(run.padded_flops for run in runs))
  line = f"{len(runs)} cells, {total:.3g} padded FLOPs"
  if flops_per_second:
    hours = total / flops_per_second / 3600
    line += f", {terminal.duration(3600 * hours)} at {flops_per_second:.3g}/s"
    if price_per_hour:
      line += f", costs {hours * price_per_hour:.2f}"
  return "\n".join([*lines, line])
