"""Every setting of a run as frozen dataclasses, each with its unit or source.

Validation lives here, so a config built in Python is checked exactly like one
from a file or the command line (`config`).
"""

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Sequence

BOS = 256  # first input of every document; never a target
EOS = 257  # last target of every document; never an input
# Bytes from this one on are in no UTF-8 text; of conversations they are marks.
FIRST_MARK = 0xF8
VOCAB_SIZE = 258  # as the official code (facebookresearch/lingua, apps/aunet)
UPSAMPLINGS = ("multi_linear", "repeat", "simple")
REMATS = ("none", "dots", "full")
ATTENTIONS = ("auto", "xla", "splash", "triton", "triton_64", "triton_32")
SCHEDULES = ("cosine", "wsd", "constant")
OPTIMIZERS = ("adamw", "muon")
UNDECAYED = ("norms", "embeddings", "head")
DTYPES = ("float32", "bfloat16")
FORMATS = ("text", "completion", "chat")
MOST_HEADS = 4  # bytes a model predicts at one position
LARGEST = 2**62  # no setting is above; past it numbers overflow


def swiglu_dim(dim: int, multiple_of: int = 256) -> int:
  """Feed-forward width of the paper's models (Table 9, column FFN).

  Two thirds of 4 * dim, rounded up to a multiple of `multiple_of`.
  """
  return -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of


def shown(value) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}…"


def hint(name: str, names: Iterable[str]) -> str:
  close = difflib.get_close_matches(str(name), names, n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise ValueError(
      f"{name}={value!r} must be one of {', '.join(choices)}."
      f"{hint(value, choices)}"
    )


# Positions and widths are int32 on devices.
LARGEST_DIM = 2**30
LARGEST_WORKERS = 1024  # processes of one training process that read rows


def _check_positive(name: str, value: int | float) -> None:
  if not 0 < value <= LARGEST:
    raise ValueError(f"{name}={shown(value)} must be a positive number.")


def _check_range(name: str, value: int | float, low, high=None) -> None:
  if not low <= value <= (LARGEST if high is None else high):
    above = f"at least {low}" if high is None else f"{low} to {high}"
    raise ValueError(f"{name}={shown(value)} must be {above}.")


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
  remat: str = "dots"  # what the backward pass recomputes: none, dots, full
  attention: str = "auto"  # kernel (`aunet/attention.py`); auto: by device
  conv: int = 0  # taps of a causal convolution before attention; 0 = none
  qk_norm: bool = False  # RMSNorm of every query and key before RoPE
  # Width at which the learning rate was tuned; initialization and learning
  # rates are scaled from it to dim (`aunet/width.py`). None = no scaling.
  base_dim: int | None = None

  def __post_init__(self):
    for name in ("dim", "num_layers", "head_dim", "capacity"):
      _check_range(f"stage {name}", getattr(self, name), 1, LARGEST_DIM)
    for name in ("window", "num_kv_heads", "ffn_dim"):
      if getattr(self, name) is not None:
        _check_range(f"stage {name}", getattr(self, name), 1, LARGEST_DIM)
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
    _check_range("stage conv", self.conv, 0, 64)
    if self.conv == 1:
      raise ValueError("conv=1 sees no other position; use 2 or more, or 0.")
    if self.base_dim is not None:
      _check_range("stage base_dim", self.base_dim, 1, LARGEST_DIM)
      if self.base_dim % self.head_dim:
        raise ValueError(
          f"base_dim={self.base_dim} must be a multiple of "
          f"head_dim={self.head_dim}: a stage is widened by heads. Try "
          f"base_dim={-(-self.base_dim // self.head_dim) * self.head_dim}."
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

  @property
  def growth(self) -> float:
    """How many times as wide as its base model it is."""
    return 1.0 if self.base_dim is None else self.dim / self.base_dim

  @property
  def base_ffn(self) -> float:
    """Feed-forward width of its base model."""
    if self.ffn_dim is None and self.base_dim is not None:
      return swiglu_dim(self.base_dim)
    return self.ffn / self.growth


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
  logit_cap: float | None = None  # c: logits become c tanh(logits / c)
  tie_embeddings: bool = False  # the head is the transposed byte embedding
  zero_head: bool = False  # the head begins at 0: every byte equally likely
  ngram_rows: int = 0  # rows of each n-gram table, a power of two; 0 = none
  ngram_longest: int = 8  # bytes; there is a table for each n from 3 to it
  heads: int = 1  # bytes predicted at a position: the next, and those after it
  # Weight of the loss of each head after the first (0.3 in arXiv 2412.19437).
  heads_loss_weight: float = 0.3
  dtype: str = "bfloat16"  # compute; norms, softmax, logits, loss: float32
  param_dtype: str = "float32"
  # False: layers are a loop in the compiled program. None: on CPUs.
  unroll_layers: bool | None = None

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
    _check_range("model.ngram_rows", self.ngram_rows, 0, 2**28)
    _check_range("model.ngram_longest", self.ngram_longest, 3, 32)
    _check_range("model.heads", self.heads, 1, MOST_HEADS)
    _check_range("model.heads_loss_weight", self.heads_loss_weight, 0)
    if self.ngram_rows & (self.ngram_rows - 1):
      raise ValueError(
        f"model.ngram_rows={self.ngram_rows} must be a power of two; try "
        f"{1 << self.ngram_rows.bit_length()}."
      )
    if self.zero_head and self.tie_embeddings:
      raise ValueError(
        "model.zero_head=True with model.tie_embeddings=True would begin with "
        "an embedding of zeros; leave one of them out."
      )
    if self.logit_cap is not None:
      _check_positive("model.logit_cap", self.logit_cap)
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
          f"{name}: weight={shown(item['weight'])} must be a number."
        )
    if not (
      isinstance(path, str)
      or (
        isinstance(path, list | tuple) and all(isinstance(p, str) for p in path)
      )
    ):
      raise ValueError(
        f"{name}={shown(value)} must be a path, or a list of which each item "
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
  # Share of documents, by a hash of the text; near copies stay together.
  heldout_fraction: float = 0.02
  text_field: str = "text"  # of JSONL objects and table rows; "a.b" is nested
  # What a record is: a text, a prompt with its completion, or the messages of
  # a conversation. In the last two the loss counts answers only
  # (docs/finetuning.md).
  format: str = "text"
  prompt_field: str = "prompt"  # of completion
  completion_field: str = "completion"
  messages_field: str = "messages"  # of chat
  # Between the documents of a text file: "line", "blank_line" or any string;
  # None = a file is one document.
  separator: str | None = None
  tokenizer: str | None = None  # a tokenizer.json; None = read bytes
  cache_dir: str | None = None  # None = WORKDIR/data
  # Whether a run builds an index that is not in the cache. None: yes, unless
  # several processes would wait for one of more than 10 GB of files.
  build_index: bool | None = None
  num_workers: int = 0  # Grain worker processes; 0 = in this process
  # The run stops if more than this share of records, or of text, is skipped.
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
    _check_choice("data.format", self.format, FORMATS)
    if self.format != "text":
      if self.separator is not None:
        raise ValueError(
          f"data.separator={self.separator!r} is for data.format='text', not "
          f"{self.format!r}; leave it out."
        )
      if self.train == "python":
        raise ValueError(
          f"data.format={self.format!r} needs data.train: the path of JSON "
          f"lines."
        )
    _check_range("data.num_workers", self.num_workers, 0, LARGEST_WORKERS)
    _check_range("data.max_skip_fraction", self.max_skip_fraction, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  # Workdir whose newest parameters the run starts from; None = random ones.
  init_from: str | None = None
  # Workdir of a run to branch off: state, data and log continue from its newest
  # checkpoint up to which the learning rates agree, or from that of
  # branch_step. None = not a branch.
  branch_from: str | None = None
  branch_step: int | None = None
  num_steps: int = 1000
  batch_size: int = 8  # rows of a step, over all devices
  grad_accumulation: int = 1  # microbatches a step is computed in
  log_every_steps: int = 10
  eval_every_steps: int = 0  # held-out evaluation; 0 = only at the end
  eval_bytes: int | None = None  # bytes of held-out text; None = all of it
  max_nonfinite_steps: int = 10  # skipped steps in a row before the run stops
  max_roll_backs: int = 0  # times it then goes back to a checkpoint instead
  spike_sigmas: float = 6.0  # deviations above the mean that make a spike
  # A process in which nothing happens for this many seconds, and this many
  # median steps, ends with status 1; hang_seconds None = never.
  hang_seconds: float | None = 1800.0
  hang_factor: float = 20.0
  sample_prompt: str = ""  # text the final sample continues
  sample_bytes: int = 400  # length of the final sample; 0 = none
  tensorboard: bool = True
  wandb: str | None = None  # project of Weights & Biases to log to as well

  def __post_init__(self):
    for name in (
      "num_steps",
      "batch_size",
      "grad_accumulation",
      "log_every_steps",
      "max_nonfinite_steps",
    ):
      _check_positive(f"train.{name}", getattr(self, name))
    if self.branch_from is not None and self.init_from is not None:
      raise ValueError(
        f"train.branch_from={self.branch_from!r} has all that "
        f"train.init_from={self.init_from!r} would give; set one of them."
      )
    if self.branch_step is not None:
      _check_range("train.branch_step", self.branch_step, 0)
      if self.branch_from is None:
        raise ValueError(
          f"train.branch_step={self.branch_step} needs train.branch_from, the "
          f"workdir that has this checkpoint."
        )
    for name in ("eval_every_steps", "sample_bytes", "max_roll_backs"):
      _check_range(f"train.{name}", getattr(self, name), 0)
    _check_positive("train.spike_sigmas", self.spike_sigmas)
    _check_positive("train.hang_factor", self.hang_factor)
    if self.hang_seconds is not None:
      _check_positive("train.hang_seconds", self.hang_seconds)
    if self.eval_bytes is not None:
      _check_positive("train.eval_bytes", self.eval_bytes)
    if self.batch_size % self.grad_accumulation:
      raise ValueError(
        f"train.batch_size={self.batch_size} rows do not divide into "
        f"train.grad_accumulation={self.grad_accumulation} microbatches."
      )


def _factors(name: str, value) -> tuple[float, ...] | None:
  """Numbers of a list, or of text that joins them by commas."""
  if value is None:
    return None
  items = value.split(",") if isinstance(value, str) else value
  try:
    factors = tuple(float(item) for item in items)
  except (TypeError, ValueError):
    factors = ()
  if not factors or not all(0 <= factor <= LARGEST for factor in factors):
    raise ValueError(
      f"{name}={shown(value)} must be numbers of at least 0, one a stage, "
      f'such as "0,1".'
    )
  return factors


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
  # Factors of learning rate and weight decay, one a stage, stage 1 first: a
  # list, or text as "0,1". A rate of 0 freezes a stage. None = 1 for each.
  stage_lr: typing.Any = None
  stage_decay: typing.Any = None
  embedding_lr: float = 1.0  # further factors, of embedding tables and head
  head_lr: float = 1.0
  # Parameters without weight decay, joined by ",": norms, embeddings, head. The
  # paper's code decays all.
  no_decay: str = ""
  # Decay of a running mean of the parameters; evaluation, generation and export
  # then use the mean. None = no mean.
  average: float | None = None

  def __post_init__(self):
    for name in ("stage_lr", "stage_decay"):
      factors = _factors(f"optimizer.{name}", getattr(self, name))
      object.__setattr__(self, name, factors)
    if self.average is not None and not 0 < self.average < 1:
      raise ValueError(
        f"optimizer.average={self.average} must lie between 0 and 1, such as "
        f"0.999."
      )
    for name in ("embedding_lr", "head_lr"):
      _check_range(f"optimizer.{name}", getattr(self, name), 0)
    for name in self.undecayed:
      _check_choice("optimizer.no_decay", name, UNDECAYED)
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

  @property
  def undecayed(self) -> tuple[str, ...]:
    return tuple(self.no_decay.split(",")) if self.no_decay else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; at most one None takes what is left."""

  data: int | None = None  # batch split, parameters copied
  fsdp: int | None = 1  # batch and parameters split
  tensor: int | None = 1  # heads and feed-forward split


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  every_steps: int = 500
  every_minutes: float | None = 20.0  # also; None = by steps alone
  keep: int = 3  # newest checkpoints kept
  # Multiples of this many steps are also saved and kept; None = none.
  milestone_steps: int | None = None

  def __post_init__(self):
    _check_positive("checkpoint.every_steps", self.every_steps)
    _check_positive("checkpoint.keep", self.keep)
    for name in ("every_minutes", "milestone_steps"):
      if getattr(self, name) is not None:
        _check_positive(f"checkpoint.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything that a run is made from."""

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
    try:  # bytes of a command line that are no UTF-8 come as lone surrogates
      length = len(self.train.sample_prompt.encode(errors="surrogateescape"))
    except UnicodeEncodeError:
      raise ValueError(
        f"train.sample_prompt={shown(self.train.sample_prompt)} is not text."
      ) from None
    longest = self.model.capacities[0] - 2  # BOS is before it, a byte after it
    longest -= 2 * self.has_roles  # two marks
    if length > longest:
      raise ValueError(
        f"train.sample_prompt has {length} bytes; this model's rows leave room "
        f"for {longest} and one byte to generate."
      )
    for name in ("stage_lr", "stage_decay"):
      factors = getattr(self.optimizer, name)
      if factors is not None and len(factors) != self.model.num_stages:
        raise ValueError(
          f"optimizer.{name}={factors} has {len(factors)} numbers; the model "
          f"has {self.model.num_stages} stages."
        )
    if self.model.tie_embeddings and self.optimizer.head_lr != 1:
      raise ValueError(
        f"optimizer.head_lr={self.optimizer.head_lr}: with "
        f"model.tie_embeddings there is no head; set optimizer.embedding_lr."
      )
    if self.optimizer.warmup_steps >= self.train.num_steps:
      raise ValueError(
        f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be less "
        f"than train.num_steps={self.train.num_steps}."
      )

  @property
  def has_roles(self) -> bool:
    """Whether bytes from FIRST_MARK on mark who speaks."""
    return self.data.format != "text"

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2)


def runs_code(rule: str) -> bool:
  """Whether a splitting rule is code to import: "my_module:my_rule"."""
  return ":" in rule.partition("@")[0]
