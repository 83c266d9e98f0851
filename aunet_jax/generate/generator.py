"""Text from a trained model: prompts in, completions out.

  generator = Generator.from_workdir("runs/quickstart")
  for completion in generator.generate([b"def main"], max_bytes=200):
    print(completion.text)

Rows of a batch are independent: prompts may differ in length, and what a row
draws depends on its seed, its sample number and the byte's index alone.

A model of tokens reads the tokens of a prompt and draws tokens. Its completions
are bytes all the same, and every number of a byte is there for these: what a
token got stands at its first byte. A stop string or the last of `max_bytes` may
be inside a token, so what ends a row is then looked for on the host.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from aunet_jax.aunet import network, sharding
from aunet_jax.config import BOS, EOS, MOST_HEADS, ModelConfig
from aunet_jax.data.rows import Rows, make_rows
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.generate import decode, draft, prefill, sampling, utf8
from aunet_jax.generate.decode import Output, State
from aunet_jax.generate.sampling import Sampling, Top, whole_number
from aunet_jax.generate.streaming import (
  OnPiece,
  OnText,
  RowText,
  hand_out,
  most_likely,
)

# Phases per call of the compiled loop: a call returns to Python, which can
# then notice Ctrl-C and hand out text.
MAX_TURNS = 128
STREAM_TURNS = 16
MAX_POSITIONS = 2**31 - 1  # positions are int32
MAX_ROWS = 2**16  # of one batch; far more than any device has room for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What one row generated.

  `reason` is "eos" (the document ended), "stop" (a stop string came; it is
  not part of `data`), "length" (max_bytes or, of tokens, the model's positions)
  or "interrupted" (Ctrl-C). Of a model of tokens, a token's nats are those of
  its first byte, and its others have 0; all levels are 0.
  The lists of top log-probabilities give for each byte the most likely ones at
  its place, best first, EOS included; they are empty if not asked for.
  """

  prompt: bytes
  data: bytes
  logprobs: np.ndarray  # float32: the model's nats for each byte of `data`
  levels: np.ndarray  # int8: level of each byte of `data`
  prompt_logprobs: np.ndarray  # float32, for each byte of `prompt`
  prompt_levels: np.ndarray  # int8
  reason: str
  top_logprobs: list[dict[int, float]]
  prompt_top_logprobs: list[dict[int, float]]

  @property
  def text(self) -> str:
    """`data` as text, with the character that the prompt left open."""
    data = utf8.unfinished(self.prompt) + self.data
    return data.decode("utf-8", errors="replace")


class Stats(NamedTuple):
  """What one `generate` computed, summed over rows.

  A slot is one position of one row at one stage.
  """

  num_bytes: int  # generated, EOS included
  slots: tuple[float, ...]  # computed per stage, for idle rows too
  needed: tuple[float, ...]  # of them, those that a row was waiting for

  def slots_per_byte(self) -> tuple[float, ...]:
    return tuple(slots / max(1, self.num_bytes) for slots in self.slots)


def default_schedule(batch: int, mesh: Mesh | None) -> str:
  """The fastest schedule where docs/generation.md has measured it."""
  if batch == 1:
    return "any"
  if mesh is not None and mesh.shape["data"] > 1:
    return "sync"  # the others move rows from device to device
  return "pack" if batch >= 32 else "half"  # blocks of few rows are slow


_prefill = jax.jit(
  prefill.prefill, static_argnames=("config", "slots", "again")
)


run_program = jax.jit(
  decode.run,
  static_argnames=(
    "config",
    "splitter_step",
    "choose",
    "schedule",
    "max_turns",
    "use_level_head",
  ),
  donate_argnames="state",
)


draft_program = jax.jit(
  draft.run,
  static_argnames=("config", "splitter_step", "max_turns"),
  donate_argnames="state",
)


class PromptScores(NamedTuple):
  """What the model says of the bytes after position 0, L - 1 a row."""

  logprob_BL: np.ndarray  # float32, nats, of the byte that is there
  top: Top | None  # the most likely bytes


@functools.partial(jax.jit, static_argnames="num_top")
def _prompt_scores(logits_BLV, bytes_BL, num_top) -> PromptScores:
  logprob_BLV = jax.nn.log_softmax(logits_BLV[:, :-1], axis=-1)
  next_BL1 = bytes_BL[:, 1:, None]
  logprob_BL = jnp.take_along_axis(logprob_BLV, next_BL1, axis=2)[:, :, 0]
  if not num_top:
    return PromptScores(logprob_BL, None)
  best_BLK, byte_BLK = sampling.most_likely(logprob_BLV, num_top)
  return PromptScores(logprob_BL, Top(byte_BLK, best_BLK))


def state_shardings(state: State, mesh: Mesh) -> State:
  """Rows over `data`, heads over `tensor`; of arrays or their shapes.

  By the dims that fields are named after: B is a row, G a key/value head. Not
  over `fsdp`: with rows on both axes, XLA's partitioner (jax 0.10.2, CPU)
  compiles the loop to one that mixes rows up.
  """
  axes = {"B": "data", "G": "tensor"}

  def place(path, x):
    fields = [key.name for key in path if isinstance(key, GetAttrKey)]
    dims = fields[-1].rpartition("_")[2]
    spec = [
      axis if axis and x.shape[i] % mesh.shape[axis] == 0 else None
      for i, axis in enumerate(map(axes.get, dims))
    ]
    while spec and spec[-1] is None:  # else JAX takes it for another sharding
      spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map_with_path(place, state)


class Generator:
  """A model made ready to generate; compiled programs are kept and shared.

  Args:
    config: the model's. params: unboxed, as `aunet_jax.load` gives them.
    splitter: of the model's rules.
    tokenizer: of a model of tokens; None = it reads bytes.
    mesh: where params live; None = one device.
    int8: keep matrices as int8 (see `quantize`).
  """

  def __init__(
    self,
    config: ModelConfig,
    params: dict,
    splitter,
    *,
    tokenizer: Tokenizer | None = None,
    mesh: Mesh | None = None,
    int8: bool = False,
  ):
    self.config = config
    self.splitter = splitter
    self.tokenizer = tokenizer
    self.mesh = mesh
    self._step = splitter.step  # one object: programs are found again by it
    with self._context():
      self.weights = jax.jit(
        functools.partial(network.make_weights, config=config, int8=int8)
      )(params)
      self.params = params
      if int8:
        self.params = network.round_params(params, config)

  @classmethod
  def from_workdir(
    cls, workdir, *, mesh=None, int8=False, trust_rules=False
  ) -> "Generator":
    """The model of a workdir.

    Args: trust_rules: see `aunet_jax.load`.
    Raises: CheckpointError where the workdir holds no model.
    """
    from aunet_jax.workdir import load

    loaded = load.load(workdir, mesh, trust_rules)
    return cls(
      loaded.config.model,
      loaded.params,
      loaded.splitter,
      tokenizer=loaded.tokenizer,
      mesh=mesh,
      int8=int8,
    )

  @contextlib.contextmanager
  def _context(self):
    if self.mesh is None:
      yield
    else:
      with jax.set_mesh(self.mesh), nn.logical_axis_rules(sharding.RULES):
        yield

  def _check_prompts(self, prompts) -> None:
    if not prompts:
      raise ValueError("there is no prompt; give at least one (b'' is one).")
    for prompt in prompts:
      if not isinstance(prompt, bytes):
        raise ValueError(
          f"prompt {prompt!r} is a {type(prompt).__name__}; prompts are "
          f"bytes: use text.encode()."
        )

  def units(self, text: bytes) -> bytes | np.ndarray:
    """What the model reads of a text: its bytes, or ids of tokens."""
    return text if self.tokenizer is None else self.tokenizer.encode(text)

  def _limits(self, read, max_bytes, max_positions) -> list[int]:
    """How many bytes, or tokens, may follow each prompt.

    A token has a byte at least, so `max_bytes` tokens are enough. How many it
    takes is not known before, so a text of tokens may also end where the
    model's positions do.

    Args: read: of every prompt, what the model reads.
    """
    if max_bytes < 1:
      raise ValueError(f"max_bytes={max_bytes} must be at least 1.")
    if max_positions is not None and max_positions < 1:
      raise ValueError(f"max_positions={max_positions} must be at least 1.")
    longest = max(map(len, read)) + 1
    if longest + max_bytes > MAX_POSITIONS:
      raise ValueError(
        f"max_bytes={max_bytes} is more than can be counted; at most "
        f"{MAX_POSITIONS - longest} can follow this prompt."
      )
    limit = max_positions or self.config.position_limit
    if limit is None:
      return [max_bytes] * len(read)
    of_tokens = self.tokenizer is not None
    if longest > limit - of_tokens:
      unit = "tokens" if of_tokens else "bytes"
      raise ValueError(
        f"a prompt of {longest - 1} {unit} is longer than the "
        f"{limit - 1 - of_tokens} this model has positions for; shorten it, or "
        f"set max_positions."
      )
    if of_tokens:
      return [min(max_bytes, limit - 1 - len(ids)) for ids in read]
    if longest + max_bytes > limit:
      raise ValueError(
        f"a prompt of {longest - 1} bytes and max_bytes={max_bytes} need "
        f"{longest + max_bytes} positions; the model was trained on {limit}: "
        f"set max_bytes to at most {limit - longest}, or set max_positions."
      )
    return [max_bytes] * len(read)

  def _check_tokens(self, settings, num_top) -> None:
    """Raises: ValueError for what is of bytes alone, of a model of tokens."""
    given = {"utf8": settings.utf8, "top_logprobs": num_top}
    for name in given:
      if self.tokenizer is not None and given[name]:
        raise ValueError(
          f"{name} is of bytes, and this model writes tokens; leave it out."
        )

  def _check_levels(self, levels) -> None:
    if levels not in ("rule", "head"):
      raise ValueError(f'levels={levels!r} must be "rule" or "head".')
    if levels == "head" and self.config.level_loss_weight == 0:
      raise ValueError(
        'levels="head" needs a model with a level head; this one was trained '
        "with model.level_loss_weight=0. Leave levels out, or train with a "
        "weight above 0."
      )

  def _check_drafts(self, batch, levels) -> None:
    needed = {
      "a model of bytes, not of tokens": self.tokenizer is None,
      f"a model trained with model.heads of 2 to {MOST_HEADS}, not 1": (
        self.config.heads > 1
      ),
      f"one prompt and one sample, not {batch} rows": batch == 1,
      'levels="rule"': levels == "rule",
      "one device": self.mesh is None,
    }
    for need, is_met in needed.items():
      if not is_met:
        raise ValueError(f"drafts need {need}; leave draft out.")

  def _start(
    self,
    read,
    num_samples,
    seeds,
    limits,
    stop,
    settings,
    num_top,
    drafts,
  ):
    """Prefills and gives (State, Rows, PromptScores), one row a sample.

    Args: read: of every prompt, what the model reads. limits: of each.
    """
    config, tokenizer = self.config, self.tokenizer
    bos, eos = BOS, EOS
    if tokenizer is not None:
      bos, eos, stop = tokenizer.bos, tokenizer.eos, ()
    rows = make_rows(read, self.splitter, config.num_stages, bos)
    slots = prefill.cache_sizes(config, rows.capacities, max(limits))
    prefilled, logits_BLV = _prefill(
      self.params,
      self.weights,
      rows.bytes_BL,
      rows.levels_BL,
      rows.documents_BL,
      rows.counts_BN,
      config=config.with_capacities(rows.capacities),
      slots=slots,
      again=drafts,
    )
    scores = _prompt_scores(logits_BLV, rows.bytes_BL, num_top)
    if num_samples > 1:
      prefilled = jax.tree.map(
        lambda x: jnp.repeat(x, num_samples, axis=0), prefilled
      )
    rows = Rows(*(np.repeat(x, num_samples, axis=0) for x in rows))
    numbers = np.tile(np.arange(num_samples), len(read))
    choice = sampling.make_choice(
      settings,
      [units for units in read for _ in range(num_samples)],
      np.repeat(seeds, num_samples),
      numbers,
      stop,
      max_bytes=max(limits),
      num_top=num_top,
      recent=MAX_TURNS * (config.heads if drafts else 1),
      eos=eos,
    )
    limit_B = np.repeat(np.array(limits, np.int32), num_samples)
    if drafts:
      state = draft.start(prefilled, rows, limit_B, choice, config)
    else:
      state = decode.start(
        prefilled, rows, limit_B, choice, decode.num_phases(config)
      )
    scores = jax.tree.map(
      lambda x: np.repeat(x, num_samples, axis=0), jax.device_get(scores)
    )
    return state, rows, scores

  def generate(
    self,
    prompts: Sequence[bytes],
    *,
    max_bytes: int = 200,
    settings: Sampling = Sampling(),  # noqa: B008 (frozen)
    num_samples: int = 1,
    seed: int | Sequence[int] = 0,
    stop: Sequence[bytes] = (),
    top_logprobs: int = 0,
    on_text: OnText | None = None,
    on_piece: OnPiece | None = None,
    schedule: str | None = None,
    levels: str = "rule",
    max_positions: int | None = None,
    on_stats: Callable[[Stats], None] | None = None,
    drafts: bool = False,
  ) -> list[Completion]:
    """Continues every prompt `num_samples` times.

    Args:
      prompts: bytes; b"" starts a document.
      seed: one for all, or one per prompt. Equal seeds and sample numbers give
        equal noise, so equal prompts with one seed give equal text.
      stop: strings that end a row as soon as one is complete; it is cut off,
        the longest if several end at one byte.
      top_logprobs: most likely bytes to report at every place, at most
        `sampling.MAX_TOP`.
      on_text: called with (row, text) as text comes, never in the middle of
        a character or of a stop string. Row = prompt * num_samples + sample.
      on_piece: called with (row, Piece): the text and its bytes' numbers.
      schedule: any, sync, half or pack (`decode.make_schedule`); None picks.
      levels: what gives generated bytes their levels: the splitting "rule" or
        the model's level "head" (trained with level_loss_weight > 0). The
        prompt's levels are the rule's either way.
      max_positions: positions (bytes or tokens) that a text may reach, over the
        model's own limit.
      on_stats: called once with the work done.
      drafts: let the model's heads draft bytes and verify several at once, for
        one prompt and one sample. The text is that of plain decoding, but for
        draws so close that float rounding decides (`draft.py`).

    Returns: completions in row order. Ctrl-C ends the loop early and returns
      what there is, with reason "interrupted".
    Raises: ValueError for a setting or prompt that cannot be.
    """
    prompts = list(prompts)
    max_bytes = whole_number("max_bytes", max_bytes)
    num_samples = whole_number("num_samples", num_samples)
    num_top = whole_number("top_logprobs", top_logprobs)
    if max_positions is not None:
      max_positions = whole_number("max_positions", max_positions)
    self._check_prompts(prompts)
    self._check_tokens(settings, num_top)
    self._check_levels(levels)
    read = [self.units(prompt) for prompt in prompts]
    limits = self._limits(read, max_bytes, max_positions)
    stop = sampling.check_stops(stop)
    if not 1 <= num_samples <= MAX_ROWS // len(prompts):
      raise ValueError(
        f"num_samples={num_samples} must be at least 1, and {MAX_ROWS} rows at "
        f"most over the {len(prompts)} prompts."
      )
    if not 0 <= num_top <= sampling.MAX_TOP:
      raise ValueError(
        f"top_logprobs={num_top} must be between 0 and {sampling.MAX_TOP}."
      )
    seeds = _seeds(seed, len(prompts))
    batch = len(prompts) * num_samples
    if drafts:
      self._check_drafts(batch, levels)
      plan = draft.schedule(self.config)
    else:
      plan = decode.make_schedule(
        schedule or default_schedule(batch, self.mesh),
        batch,
        self.config,
      )
    with self._context():
      state, rows, scores = self._start(
        read, num_samples, seeds, limits, stop, settings, num_top, drafts
      )
      state = (
        state
        if self.mesh is None
        else jax.device_put(state, state_shardings(state, self.mesh))
      )
      texts = [
        RowText(
          stop,
          prompts[b // num_samples],
          settings.utf8,
          max_bytes,
          self.tokenizer,
        )
        for b in range(batch)
      ]
      show = _both(on_text, on_piece)
      counters = jax.device_get(counters_of(state))
      with contextlib.suppress(KeyboardInterrupt):
        for output, counters, top in self._loop(
          state, texts, plan, levels, show is not None, drafts
        ):
          hand_out(texts, output, counters.count_B, counters.done_B, top, show)
    if on_stats is not None:
      on_stats(make_stats(counters, plan, self.config))
    completions = []
    for b, text in enumerate(texts):
      text.end("interrupted")
      prompt = prompts[b // num_samples]
      ids = read[b // num_samples]
      completions.append(
        Completion(
          prompt=prompt,
          data=bytes(text.data),
          logprobs=np.array(text.logprobs, np.float32),
          levels=np.array(text.levels, np.int8),
          prompt_logprobs=self._of_bytes(ids, scores.logprob_BL[b, : len(ids)]),
          prompt_levels=self._of_bytes(
            ids, rows.levels_BL[b, 1 : len(ids) + 1]
          ),
          reason=text.reason,
          top_logprobs=text.top_logprobs,
          prompt_top_logprobs=(
            [most_likely(scores.top, b, t) for t in range(len(ids))]
            if scores.top
            else []
          ),
        )
      )
    return completions

  def _of_bytes(self, ids, number_N: np.ndarray) -> np.ndarray:
    """A number for every byte of a prompt, from those of what was read."""
    if self.tokenizer is None:
      return number_N
    sizes_N = self.tokenizer.num_bytes[ids]
    of_bytes = np.zeros(sizes_N.sum(), number_N.dtype)
    of_bytes[np.cumsum(sizes_N) - sizes_N] = number_N
    return of_bytes

  def _loop(
    self, state, texts, plan, levels, streams, drafts
  ) -> Iterator[tuple[Output, "Counters", Top | None]]:
    """Args: texts: of the rows; one that has a reason has ended."""
    streams |= self.tokenizer is not None  # the host may end a row
    turns = jnp.int32(STREAM_TURNS if streams else MAX_TURNS)
    static = {
      "config": self.config,
      "splitter_step": self._step,
      "max_turns": MAX_TURNS,
    }
    program = draft_program
    if not drafts:
      program = run_program
      static |= {
        "choose": sampling.choose,
        "schedule": plan,
        "use_level_head": levels == "head",
      }
    while True:
      state, output = program(self.weights, state, turns, **static)
      output, counters, top = jax.device_get(
        (output, counters_of(state), state.choice.memory.top)
      )
      yield output, counters, top
      done_B = np.array([text.reason is not None for text in texts])
      if done_B.all():
        return
      if (done_B != counters.done_B).any():
        done_B = jax.device_put(done_B, state.done_B.sharding)
        state = state._replace(done_B=done_B)


def _seeds(seed: int | Sequence[int], num_prompts: int) -> list[int]:
  """One a prompt. Raises: ValueError for other numbers of them."""
  if np.ndim(seed) == 0:
    return [whole_number("seed", seed)] * num_prompts
  seeds = [whole_number("seed", one) for one in seed]
  if len(seeds) != num_prompts:
    raise ValueError(
      f"there are {len(seeds)} seeds for {num_prompts} prompts; give one "
      f"for each, or one for all."
    )
  return seeds


def _both(on_text: OnText | None, on_piece: OnPiece | None) -> OnPiece | None:
  if on_text is None:
    return on_piece

  def show(row, piece):
    on_text(row, piece.text)
    if on_piece is not None:
      on_piece(row, piece)

  return show


class Counters(NamedTuple):
  """What a State counts, on the host."""

  done_B: np.ndarray
  count_B: np.ndarray
  calls_P: np.ndarray
  rows_P: np.ndarray


def counters_of(state: State) -> Counters:
  return Counters(state.done_B, state.count_B, state.calls_P, state.rows_P)


def make_stats(
  counters: Counters, schedule: decode.Schedule, config: ModelConfig
) -> Stats:
  """Slots per stage; a middle stage's two paths count half each."""
  N = config.num_stages

  def per_stage(of_phase):
    slots = [of_phase[i] for i in range(N)]
    for i in range(1, N - 1):  # contracts in phase i, expands in 2N - 2 - i
      slots[i] = (slots[i] + of_phase[2 * N - 2 - i]) / 2
    return tuple(float(x) for x in slots)

  return Stats(
    num_bytes=int(counters.count_B.sum()),
    slots=per_stage(counters.calls_P * schedule.blocks(len(counters.calls_P))),
    needed=per_stage(counters.rows_P),
  )
