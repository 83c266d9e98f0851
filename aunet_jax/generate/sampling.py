"""Choosing the next byte: temperature, cut-offs, repetition, stop strings.

A model of tokens chooses tokens in the same way: where bytes are counted here,
they are its tokens.

Noise depends on (seed, sample, byte index) alone, so a row draws the same bytes
whatever else is in the batch. All settings are traced values: changing them
compiles nothing, but for switching a part on or off.

Letters: B rows of the batch, C rows of a block, V vocabulary, H slots of the
history ring, S bytes of the longest stop string, Q stop strings, U other bytes,
T newest bytes, K most likely bytes, Z states of UTF-8.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet import cache
from aunet_jax.config import BOS, EOS
from aunet_jax.generate import utf8

HISTORY = 1024  # bytes in which repetition is looked for
FEW = 512  # ids of a vocabulary that are faster compared than sorted
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
MAX_TOP = 20  # most likely bytes that are reported
# Temperatures between: logits divided by less overflow in float32, and more is
# no float32.
_COLDEST, _HOTTEST = 1e-30, 1e30


def whole_number(name: str, value: Any) -> int:
  """`value` as int; NumPy's and JAX's integers are some too.

  Raises: ValueError for anything else, under `name`.
  """
  try:
    return operator.index(value)
  except TypeError:
    kind = type(value).__name__
    raise ValueError(f"{name} must be an integer, not a {kind}.") from None


def _real_number(name: str, value: Any) -> float:
  try:
    if not isinstance(value, str | bytes):
      return float(value)
  except OverflowError:  # an int too large for a float; the ranges refuse it
    return math.inf if value > 0 else -math.inf
  except (TypeError, ValueError):
    pass
  raise ValueError(f"{name}={value!r} must be a number.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How bytes are drawn. The cut-offs hold together: a byte must pass all."""

  temperature: float = 1.0  # 0 = greedy: the most likely byte, always
  top_k: int | None = None  # only the k most likely bytes
  top_p: float = 1.0  # fewest most likely bytes with this much probability
  min_p: float = 0.0  # only bytes this likely relative to the most likely
  no_repeat: int | None = None  # no run of this many bytes occurs twice
  utf8: bool = False  # only bytes that keep the text valid UTF-8

  def __post_init__(self):
    # NumPy's numbers become Python's, which no comparison overflows.
    for name, to_number in (
      ("temperature", _real_number),
      ("top_p", _real_number),
      ("min_p", _real_number),
      ("top_k", whole_number),
      ("no_repeat", whole_number),
    ):
      value = getattr(self, name)
      if value is not None or to_number is _real_number:
        object.__setattr__(self, name, to_number(name, value))
    if self.temperature != 0 and not (_COLDEST <= self.temperature <= _HOTTEST):
      raise ValueError(
        f"temperature={self.temperature} must be 0, which is greedy, or "
        f"between {_COLDEST} and {_HOTTEST}."
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(
        f"top_k={self.top_k} must be at least 1; leave it out to keep all."
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(
        f"top_p={self.top_p} must be in (0, 1]; 1 keeps every byte."
      )
    if not 0 <= self.min_p <= 1:
      raise ValueError(
        f"min_p={self.min_p} must be in [0, 1]; 0 keeps every byte."
      )
    if self.no_repeat is not None and not 2 <= self.no_repeat <= HISTORY:
      raise ValueError(
        f"no_repeat={self.no_repeat} must be between 2 and {HISTORY} bytes; "
        f"16 to 64 stops loops without forbidding common words."
      )


class Settings(NamedTuple):
  """What is the same for every row."""

  eos: jax.Array  # int32 scalar: the id that ends a document; BOS is before it
  temperature: jax.Array  # float32 scalars
  top_k: jax.Array  # int32 scalar
  top_p: jax.Array
  min_p: jax.Array
  no_repeat: jax.Array | None  # int32 scalar
  stop_QS: jax.Array | None  # int32 stop strings, right-aligned; -1 = none
  stop_used_QS: jax.Array | None  # bool: the position belongs to the string


class History(NamedTuple):
  """The last bytes of each row, and what of them is being repeated."""

  byte_BH: jax.Array  # int32 ring; BOS where there is no byte yet
  run_BH: jax.Array  # int32: bytes up to this slot that equal the newest ones
  position_B: jax.Array  # int32: of the next byte


class Top(NamedTuple):
  """The most likely bytes at the newest places, a ring by byte number."""

  byte_BTK: jax.Array  # int32, most likely first, EOS included
  logprob_BTK: jax.Array  # float32, nats


class Memory(NamedTuple):
  """What choosing remembers of each row; None where it is not asked for."""

  history: History | None
  tail_BS: jax.Array | None  # int32: last generated bytes; BOS before the first
  utf8_B: jax.Array | None  # int32: state of UTF-8
  top: Top | None


class Choice(NamedTuple):
  """What choosing needs; carried through the loop."""

  key_B: jax.Array  # one PRNG key per row, of (seed, sample)
  limit_B: jax.Array  # int32: bytes to generate at most
  settings: Settings
  memory: Memory


def check_stops(stop: Sequence[bytes]) -> tuple[bytes, ...]:
  """Raises: ValueError for what cannot be a list of stop strings."""
  if isinstance(stop, str | bytes):
    raise ValueError(f"stop={stop!r} must be a list of byte strings.")
  stop = tuple(stop)
  if len(stop) > MAX_STOPS:
    raise ValueError(f"{len(stop)} stop strings; at most {MAX_STOPS} can be.")
  for text in stop:
    if not isinstance(text, bytes):
      raise ValueError(
        f"stop string {text!r} is a {type(text).__name__}; stop strings are "
        f"bytes: use text.encode()."
      )
    if not text:
      raise ValueError("a stop string is empty; it would stop before any byte.")
    if len(text) > MAX_STOP_BYTES:
      raise ValueError(
        f"a stop string has {len(text)} bytes; at most {MAX_STOP_BYTES} can be."
      )
  return stop


def make_choice(
  sampling: Sampling,
  prompts: Sequence[bytes | np.ndarray],
  seeds: Sequence[int],
  samples: Sequence[int],
  stop: Sequence[bytes] = (),
  *,
  max_bytes: int = 2**31 - 1,
  num_top: int = 0,
  recent: int = 1,
  eos: int = EOS,
) -> Choice:
  """The carry for rows with these prompts.

  Args: prompts: bytes, or ids of tokens. samples: numbers rows of equal prompts
    and seeds. max_bytes: bytes a row may get, within which `utf8` finishes its
    last character. num_top: most likely bytes to remember, for the `recent`
    newest places. eos: the largest id there is; BOS is the one before it.
  Raises: ValueError for a stop string that is none, a seed that is no unsigned
    32-bit int, or a character in the prompt that max_bytes cannot finish.
  """
  seeds = [whole_number("seed", seed) for seed in seeds]
  for seed in seeds:
    if not 0 <= seed < 2**32:
      raise ValueError(f"seed={seed} must be in [0, 2^32).")
  stop_QS, stop_used_QS = _make_stops(check_stops(stop))
  B = len(prompts)
  key_B = jax.vmap(lambda s, n: jax.random.fold_in(jax.random.key(s), n))(
    jnp.asarray(np.array(seeds, np.uint32)),
    jnp.asarray(np.array(samples, np.uint32)),
  )
  no_repeat = sampling.no_repeat
  settings = Settings(
    eos=jnp.int32(eos),
    temperature=jnp.float32(sampling.temperature),
    # More than the vocabulary is all of it.
    top_k=jnp.int32(min(sampling.top_k or 2**30, 2**30)),
    top_p=jnp.float32(sampling.top_p),
    min_p=jnp.float32(sampling.min_p),
    no_repeat=None if no_repeat is None else jnp.int32(no_repeat),
    stop_QS=stop_QS,
    stop_used_QS=stop_used_QS,
  )
  memory = Memory(
    history=None if no_repeat is None else _make_history(prompts, eos - 1),
    tail_BS=(
      None
      if stop_QS is None
      else jnp.full((B, stop_QS.shape[1]), eos - 1, jnp.int32)
    ),
    utf8_B=_make_utf8(prompts, max_bytes) if sampling.utf8 else None,
    top=(
      Top(
        jnp.zeros((B, recent, num_top), jnp.int32),
        jnp.zeros((B, recent, num_top), jnp.float32),
      )
      if num_top
      else None
    ),
  )
  return Choice(key_B, jnp.full((B,), max_bytes, jnp.int32), settings, memory)


def _make_history(prompts, bos) -> History:
  byte_BH = np.full((len(prompts), HISTORY), bos, np.int32)
  run_BH = np.zeros_like(byte_BH)
  for b, prompt in enumerate(prompts):
    # Only what the ring will still hold matters, and the runs it can show.
    first = max(0, len(prompt) - 2 * HISTORY)
    for position in range(first, len(prompt)):
      byte, slot = prompt[position], position % HISTORY
      run = np.where(byte_BH[b] == byte, np.roll(run_BH[b], 1) + 1, 0)
      byte_BH[b, slot], run[slot] = byte, 0
      run_BH[b] = run
  position_B = np.array([len(prompt) for prompt in prompts], np.int32)
  return History(
    jnp.asarray(byte_BH), jnp.asarray(run_BH), jnp.asarray(position_B)
  )


def _make_stops(stop) -> tuple[jax.Array | None, jax.Array | None]:
  """Stop strings as arrays of few shapes, since each shape is a program."""
  if not stop:
    return None, None
  longest = max(len(text) for text in stop)
  Q = next(size for size in (4, 16, MAX_STOPS) if size >= len(stop))
  S = next(size for size in (16, 128, MAX_STOP_BYTES) if size >= longest)
  text_QS = np.full((Q, S), -1, np.int32)  # no byte equals -1
  used_QS = np.ones((Q, S), bool)
  for q, text in enumerate(stop):
    text_QS[q, S - len(text) :] = list(text)
    used_QS[q, : S - len(text)] = False
  return jnp.asarray(text_QS), jnp.asarray(used_QS)


def _make_utf8(prompts, max_bytes) -> jax.Array:
  states = [utf8.state_after(prompt) for prompt in prompts]
  missing = max(int(utf8.MISSING[state]) for state in states)
  if missing > max_bytes:
    raise ValueError(
      f"a prompt ends inside a character that lacks {missing} bytes; "
      f"max_bytes={max_bytes} cannot finish it."
    )
  return jnp.asarray(states, jnp.int32)


# ----- inside the loop ------------------------------------------------------


def _passes_cutoffs(logits_CV: jax.Array, settings: Settings) -> jax.Array:
  """bool (C, V): top-k, top-p and min-p, ties broken by byte value."""
  prob_CV = jax.nn.softmax(logits_CV, axis=-1)
  byte_V = jnp.arange(logits_CV.shape[1])
  if len(byte_V) <= FEW:
    # Every byte against every other: on these few it is faster than sorting.
    other_CU1, own_C1V = logits_CV[:, :, None], logits_CV[:, None]
    first_1UV = (byte_V[:, None] < byte_V[None])[None]
    ahead_CUV = (other_CU1 > own_C1V) | ((other_CU1 == own_C1V) & first_1UV)
    rank_CV = ahead_CUV.sum(axis=1)
    before_CV = jnp.where(ahead_CUV, prob_CV[:, :, None], 0.0).sum(axis=1)
  else:
    order_CV = jnp.argsort(logits_CV, axis=1, stable=True, descending=True)
    rank_CV = jnp.argsort(order_CV, axis=1)
    sorted_CV = jnp.take_along_axis(prob_CV, order_CV, axis=1)
    before_CV = jnp.take_along_axis(
      jnp.cumsum(sorted_CV, axis=1) - sorted_CV, rank_CV, axis=1
    )
  keep_CV = (
    (rank_CV < settings.top_k)
    & (before_CV < settings.top_p)
    & (prob_CV >= settings.min_p * prob_CV.max(axis=-1, keepdims=True))
  )
  return keep_CV | (rank_CV == 0)  # rounding never leaves nothing to choose


def _passing_cutoffs(logits_CV, valid_CV, settings) -> jax.Array:
  """bool (C, V): the valid bytes among those that pass.

  Cut first, so that a text which is valid by itself is drawn as if nothing
  were held to. Where no valid byte passes, the cut-offs are those of the
  valid bytes alone.
  """
  pass_CV = _passes_cutoffs(logits_CV, settings)
  if valid_CV is None:
    return pass_CV
  both_CV = pass_CV & valid_CV
  valid_CV &= _passes_cutoffs(_only(valid_CV, logits_CV), settings)
  return jnp.where(both_CV.any(axis=1, keepdims=True), both_CV, valid_CV)


def _only(valid_CV: jax.Array | None, logits_CV: jax.Array) -> jax.Array:
  """Logits below which no invalid byte is, even where all are -inf."""
  if valid_CV is None:
    return logits_CV
  lowest = jnp.finfo(logits_CV.dtype).min
  return jnp.where(valid_CV, jnp.maximum(logits_CV, lowest), -jnp.inf)


def _draw(logits_CV, valid_CV, settings: Settings, key_C, count_C) -> jax.Array:
  """A byte per row from the tempered and cut distribution, int32 (C,)."""
  V = logits_CV.shape[1]

  def greedy():
    best_C = jnp.argmax(_only(valid_CV, logits_CV), axis=-1)
    return best_C.astype(jnp.int32)

  def sample():
    scaled_CV = logits_CV / settings.temperature
    cuts = (settings.top_k < V) | (settings.top_p < 1) | (settings.min_p > 0)
    allowed_CV = jax.lax.cond(
      cuts,
      lambda: _passing_cutoffs(scaled_CV, valid_CV, settings),
      lambda: jnp.ones(scaled_CV.shape, bool) if valid_CV is None else valid_CV,
    )
    noise_CV = jax.vmap(
      lambda key, n: jax.random.gumbel(jax.random.fold_in(key, n), (V,))
    )(key_C, count_C)
    noisy_CV = _only(valid_CV, scaled_CV + noise_CV)
    noisy_CV = jnp.where(allowed_CV, noisy_CV, -jnp.inf)
    return jnp.argmax(noisy_CV, axis=-1).astype(jnp.int32)

  return jax.lax.cond(settings.temperature > 0, sample, greedy)


def _repeats(history: History, no_repeat, V) -> jax.Array:
  """bool (C, V): bytes that would complete a run seen before."""
  C = history.byte_BH.shape[0]
  follows_CH = jnp.roll(history.byte_BH, -1, axis=1)
  repeat_CH = history.run_BH >= no_repeat - 1
  banned_CV = jnp.zeros((C, V), bool)
  return banned_CV.at[jnp.arange(C)[:, None], follows_CH].max(repeat_CH)


def _remember(history: History, byte_C) -> History:
  byte_CH, run_CH, position_C = history
  newest_CH = (position_C % HISTORY)[:, None] == jnp.arange(HISTORY)[None]
  run_CH = jnp.where(
    (byte_CH == byte_C[:, None]) & ~newest_CH,
    jnp.roll(run_CH, 1, axis=1) + 1,
    0,
  )
  byte_CH = jnp.where(newest_CH, byte_C[:, None], byte_CH)
  return History(byte_CH, run_CH, position_C + 1)


def _utf8_valid(state_C, left_C, V) -> jax.Array:
  """bool (C, V): bytes after which `left_C` more can finish the character."""
  missing_ZV = np.full((utf8.NUM_STATES, V), np.iinfo(np.int32).max, np.int32)
  missing_ZV[:, :256] = np.where(
    utf8.NEXT >= 0, utf8.MISSING[utf8.NEXT], missing_ZV[:, :256]
  )
  missing_ZV[utf8.BETWEEN, EOS] = 0
  return jnp.asarray(missing_ZV)[state_C] <= left_C[:, None]


def _utf8_next(state_C, byte_C) -> jax.Array:
  next_C = jnp.asarray(utf8.NEXT).at[state_C, byte_C].get(mode="clip")
  return jnp.where(byte_C < 256, next_C, state_C)


def guess(
  choice: Choice, logits_CV: jax.Array, count_C: jax.Array
) -> jax.Array:
  """A draft of what `choose` may pick as byte number `count_C`, int32 (C,).

  With the same temperature and noise, and no regard to what choosing leaves
  out besides; of all rows of the batch.
  """
  open_V = jnp.arange(logits_CV.shape[1]) != BOS
  logits_CV = jnp.where(open_V[None], logits_CV, -jnp.inf)
  settings = choice.settings._replace(
    top_k=jnp.int32(2**30), top_p=jnp.float32(1), min_p=jnp.float32(0)
  )
  return _draw(logits_CV, None, settings, choice.key_B, count_C)


def choose(
  choice: Choice, logits_CV: jax.Array, count_C: jax.Array, rows_C: jax.Array
) -> tuple[Choice, jax.Array, jax.Array, jax.Array]:
  """Picks byte number `count_C` of each row of a block.

  Returns: the carry; byte_C int32, EOS included, never BOS; logprob_C float32,
    the model's own log-probability of it, in nats, before any setting here;
    stop_C bool: EOS came, or a stop string is complete.
  """
  C, V = logits_CV.shape
  settings = choice.settings
  memory = jax.tree.map(lambda x: cache.take(x, rows_C), choice.memory)
  logprob_CV = jax.nn.log_softmax(logits_CV, axis=-1)
  byte_V = jnp.arange(V)
  open_V = (byte_V < settings.eos - 1) | (byte_V == settings.eos)
  open_CV = jnp.broadcast_to(open_V, (C, V))
  if memory.history is not None:
    open_CV &= ~_repeats(memory.history, settings.no_repeat, V)
  valid_CV = None
  if memory.utf8_B is not None:
    left_C = cache.take(choice.limit_B, rows_C) - count_C - 1
    valid_CV = _utf8_valid(memory.utf8_B, left_C, V)
    both_CV = open_CV & valid_CV
    # Where every byte that ends the character would repeat, one does.
    valid_CV = jnp.where(both_CV.any(axis=1, keepdims=True), both_CV, valid_CV)
    open_CV |= valid_CV
  byte_C = _draw(
    jnp.where(open_CV, logits_CV, -jnp.inf),
    valid_CV,
    settings,
    cache.take(choice.key_B, rows_C),
    count_C,
  )
  logprob_C = jnp.take_along_axis(logprob_CV, byte_C[:, None], axis=1)[:, 0]
  stop_C = byte_C == settings.eos
  if memory.history is not None:
    memory = memory._replace(history=_remember(memory.history, byte_C))
  if memory.utf8_B is not None:
    memory = memory._replace(utf8_B=_utf8_next(memory.utf8_B, byte_C))
  if memory.tail_BS is not None:
    tail_CS = jnp.concatenate([memory.tail_BS[:, 1:], byte_C[:, None]], axis=1)
    equal_CQS = tail_CS[:, None] == settings.stop_QS[None]
    ends_CQ = (equal_CQS | ~settings.stop_used_QS[None]).all(axis=-1)
    stop_C |= ends_CQ.any(axis=-1)
    memory = memory._replace(tail_BS=tail_CS)
  if memory.top is not None:
    memory = memory._replace(top=_keep_top(memory.top, logprob_CV, count_C))
  memory = jax.tree.map(
    lambda x_B, x_C: cache.put(x_B, rows_C, x_C), choice.memory, memory
  )
  return choice._replace(memory=memory), byte_C, logprob_C, stop_C


def _keep_top(top: Top, logprob_CV, count_C) -> Top:
  C, T, K = top.byte_BTK.shape
  best_CK, byte_CK = most_likely(logprob_CV, K)
  row_C, slot_C = jnp.arange(C), count_C % T
  return Top(
    top.byte_BTK.at[row_C, slot_C].set(byte_CK),
    top.logprob_BTK.at[row_C, slot_C].set(best_CK),
  )


def most_likely(logprob_V: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
  """Over the last axis: (log-probabilities, bytes int32), best first."""
  best, byte = jax.lax.top_k(logprob_V, num)
  return best, byte.astype(jnp.int32)
