"""Cached decoding: prefill, and one jitted loop that needs no history.

The forward pass (`aunet/network.py`) is turned round so that a loop can run it
one byte at a time. Per row of a batch the state holds, for every stage, what
its mixer keeps of the past (attention: keys and values of the last `window`
positions), the encoding of its newest position, the newest coarse vector
(already upsampled, once per offset), the distance to the last boundary and the
splitting automaton. Nothing grows, so a byte costs the same whatever came
before it.

Rows reach boundaries at different bytes. A row is therefore always waiting for
one *phase* of the network:

  phase 0           expand_1, head, choose a byte, contract_1
  phase i - 1       contract_i, for a middle stage i       (a boundary follows)
  phase N - 1       the deepest stage N
  phase 2N - 1 - i  expand_i, for a middle stage i          (on the way back)

and each turn of the loop runs one phase for a block of the rows that wait for
it. `Schedule` says how large the blocks are and how many rows a phase waits
for; every schedule gives the same bytes (docs/generation.md has timings).

Each part of the network has its mathematics of one position, `step`, beside
that of a row; `prefill.py` runs the model itself over the prompts. Named scopes
say which part an operation of the compiled loop belongs to.

Letters: B rows of the batch, C rows of a block, D width, E width of the next
stage, V vocabulary, O offsets, P phases, N stages, T turns of the loop, Z
splitting automaton states.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet import cache, network
from aunet_jax.aunet.block import Stack
from aunet_jax.config import ModelConfig
from aunet_jax.data.rows import Rows
from aunet_jax.generate.prefill import Prefilled

# (carry, logits_CV, count_C, rows_C) -> (carry, byte_C, logprob_C, stop_C)
Choose = Callable[..., tuple[Any, jax.Array, jax.Array, jax.Array]]


class State(NamedTuple):
  """Everything a batch needs to go on; arrays only.

  Fields are named by the dims of their arrays, also where these are several.
  """

  caches: dict  # stack -> list over layers of what its mixer keeps
  encoded_BD: tuple  # by stage: its contracting path at the newest position
  up_BOD: tuple  # by transition: newest coarse vector at each offset
  recent_BM: jax.Array  # int32: the newest bytes, as many as n-grams reach back
  offset_BN: jax.Array  # int32 (B, N - 1): distance to the last boundary
  position_BN: jax.Array  # int32: newest position of each stage
  level_B: jax.Array  # int32: level of the newest byte
  splitter_BZ: jax.Array  # int32: the splitting automaton
  phase_B: jax.Array  # int32: what the row waits for
  done_B: jax.Array  # bool
  count_B: jax.Array  # int32: bytes generated so far, EOS included
  limit_B: jax.Array  # int32: bytes to generate
  choice: Any  # what `choose` carries
  calls_P: jax.Array  # int32: times each phase ran
  rows_P: jax.Array  # int32: rows that were waiting in those calls


class Output(NamedTuple):
  """What one call of the loop generated; row b holds `count_B[b]` entries."""

  count_B: jax.Array  # int32
  byte_BT: jax.Array  # int32, EOS included; ids where the model reads tokens
  level_BT: jax.Array  # int8, of the byte
  logprob_BT: jax.Array  # float32, nats


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How rows of a batch share calls of the network."""

  byte_block: int  # rows a call of phase 0 computes
  block: int  # rows a call of a deeper phase computes
  wait: int  # rows that make a deeper phase run before more bytes are chosen

  def blocks(self, num_phases: int) -> tuple[int, ...]:
    """Rows a call computes, by phase."""
    return (self.byte_block, *[self.block] * (num_phases - 1))


def num_phases(config: ModelConfig) -> int:
  return max(1, 2 * config.num_stages - 2)


def make_schedule(name: str, batch: int, config: ModelConfig) -> Schedule:
  """The schedules that are worth having; all are one at batch 1.

  any: a deeper phase runs for the whole batch as soon as one row needs it.
  sync: rows choose bytes until all of them stand at a boundary, then the
    deeper phase runs once for all.
  half: a deeper phase runs for up to half the batch, as soon as a phase's
    share of the rows wait.
  pack: a deeper phase runs for a quarter of the batch (less, from four stages
    on), as soon as that many rows wait. Where no row can choose a byte, some
    phase has that many, so no deeper call computes a row that does not need it.

  In all of them every row that can chooses a byte when phase 0 runs.
  """
  P = num_phases(config)
  half, part = -(-batch // 2), -(-batch // max(4, P - 1))
  if name == "any":
    return Schedule(batch, batch, 1)
  if name == "sync":
    return Schedule(batch, batch, batch)
  if name == "half":
    return Schedule(batch, half, -(-batch // P))
  if name == "pack":
    return Schedule(batch, part, part)
  raise ValueError(f"schedule={name!r} must be one of any, sync, half, pack.")


# ----- phases ---------------------------------------------------------------


class Call:
  """One phase at work on a block of rows: reads the State, collects Writes."""

  def __init__(self, weights, config, caches, rows_C):
    self.weights, self.config = weights, config
    self.caches = caches
    self.rows_C = rows_C
    self.writes: dict[str, cache.Write] = {}

  def take(self, x_B):
    return cache.take(x_B, self.rows_C)

  def put(self, x_B, value_C):
    return cache.put(x_B, self.rows_C, value_C)

  def run_stack(self, state, name, x_CD):
    """One position of every row through a named stack."""
    i = network.stack_names(self.config)[name]
    with jax.named_scope(name):
      x_CD, self.writes[name] = Stack.step(
        self.weights[name],
        self.config.stages[i],
        self.config,
        self.caches[name],
        x_CD,
        self.take(state.position_BN)[:, i],
        self.rows_C,
      )
    return x_CD

  def all_writes(self, batch, schedule):
    """Writes for every stack, so that all phases return the same arrays."""
    writes = {}
    for name, i in network.stack_names(self.config).items():
      stage, caches = self.config.stages[i], self.caches[name]
      C = schedule.byte_block if i == 0 else schedule.block
      writes[name] = self.writes.get(
        name, Stack.no_write(stage, caches, batch, C)
      )
    return writes

  def pool(self, state, i):
    """What stage i takes from the one above it."""
    with jax.named_scope(f"pool_{i - 1}"):
      x_CD = self.take(state.encoded_BD[i - 2])
      return network.pool(self.weights, self.config, i - 1, x_CD)

  def expand(self, state, i):
    """Stage i's expanding path at its newest position (1-based i)."""
    up_COD = self.take(state.up_BOD[i - 1])
    offset_C = self.take(state.offset_BN)[:, i - 1]
    with jax.named_scope(f"upsample_{i}"):
      x_CD = network.at_offset(self.config, up_COD, offset_C)
    if self.config.stages[i - 1].skip:
      x_CD += self.take(state.encoded_BD[i - 1])
    return self.run_stack(state, f"expand_{i}", x_CD)

  def advance(self, state, i):
    """Stage i gets a new position."""
    position_CN = self.take(state.position_BN).at[:, i - 1].add(1)
    return state._replace(position_BN=self.put(state.position_BN, position_CN))

  def enter(self, state, i, encoded_CD):
    """Stores stage i's encoding; the row goes deeper or starts back up."""
    N = self.config.num_stages
    goes_down_C = self.take(state.level_B) >= i
    offset_CN = self.take(state.offset_BN)
    offset_CN = offset_CN.at[:, i - 1].set(
      jnp.where(goes_down_C, 0, offset_CN[:, i - 1] + 1)
    )
    back = 0 if i == 1 else 2 * N - 1 - i
    encoded_BD = self.put(state.encoded_BD[i - 1], encoded_CD)
    return state._replace(
      encoded_BD=_set(state.encoded_BD, i - 1, encoded_BD),
      offset_BN=self.put(state.offset_BN, offset_CN),
      phase_B=self.put(state.phase_B, jnp.where(goes_down_C, i, back)),
    )

  def leave(self, state, i, x_CE):
    """Stage i is through; its vector goes up to stage i - 1."""
    with jax.named_scope(f"upsample_{i - 1}"):
      up_COD = network.upsample(self.weights, self.config, i - 1, x_CE)
      up_BOD = self.put(state.up_BOD[i - 2], up_COD)
    above = 0 if i == 2 else 2 * self.config.num_stages - i
    phase_C = jnp.full(self.rows_C.shape, above, jnp.int32)
    return state._replace(
      up_BOD=_set(state.up_BOD, i - 2, up_BOD),
      phase_B=self.put(state.phase_B, phase_C),
    )


def _set(arrays: tuple, i: int, array) -> tuple:
  return (*arrays[:i], array, *arrays[i + 1 :])


def _byte_phase(
  call: Call, splitter_step, choose, use_level_head, state, output
):
  """Phase 0: predict, choose and read in one byte."""
  weights, config = call.weights, call.config
  N = config.num_stages
  h_CD = call.take(state.encoded_BD[0]) if N == 1 else call.expand(state, 1)
  count_C = call.take(state.count_B)
  with jax.named_scope("head"):
    logits_CV = network.logits(weights, config, h_CD)
  with jax.named_scope("sampling"):
    choice, byte_C, logprob_C, stop_C = choose(
      state.choice, logits_CV, count_C, call.rows_C
    )
  with jax.named_scope("splitting"):
    splitter_CZ, level_C = splitter_step(call.take(state.splitter_BZ), byte_C)
  if use_level_head:
    level_C = network.predicted_level(weights, config, h_CD, byte_C)
  stop_C |= count_C + 1 >= call.take(state.limit_B)
  at_C = call.take(output.count_B)

  def put_out(array_BT, value_C):
    return array_BT.at[call.rows_C, at_C].set(
      value_C.astype(array_BT.dtype), mode="drop"
    )

  output = Output(
    call.put(output.count_B, at_C + 1),
    put_out(output.byte_BT, byte_C),
    put_out(output.level_BT, level_C),
    put_out(output.logprob_BT, logprob_C),
  )
  state = state._replace(
    choice=choice,
    count_B=call.put(state.count_B, count_C + 1),
    done_B=call.put(state.done_B, stop_C),
    splitter_BZ=call.put(state.splitter_BZ, splitter_CZ),
    level_B=call.put(state.level_B, level_C),
  )
  state = call.advance(state, 1)
  with jax.named_scope("embedding"):
    x_CD, recent_CM = network.embed(
      weights, config, byte_C, call.take(state.recent_BM)
    )
  if config.ngram_rows:
    state = state._replace(recent_BM=call.put(state.recent_BM, recent_CM))
  x_CD = call.run_stack(state, "deepest" if N == 1 else "contract_1", x_CD)
  if N == 1:
    encoded_BD = call.put(state.encoded_BD[0], x_CD)
    return state._replace(encoded_BD=(encoded_BD,)), output
  return call.enter(state, 1, x_CD), output


def _contract_phase(call: Call, i, state, output):
  x_CE = call.pool(state, i)
  state = call.advance(state, i)
  x_CE = call.run_stack(state, f"contract_{i}", x_CE)
  return call.enter(state, i, x_CE), output


def _deepest_phase(call: Call, state, output):
  N = call.config.num_stages
  x_CE = call.pool(state, N)
  state = call.advance(state, N)
  x_CE = call.run_stack(state, "deepest", x_CE)
  return call.leave(state, N, x_CE), output


def _expand_phase(call: Call, i, state, output):
  return call.leave(state, i, call.expand(state, i)), output


def _phases(
  weights, config, splitter_step, choose, use_level_head, schedule
) -> list[Callable]:
  """By number: (State, Output, waits_B, caches) to the first two, changed, and
  the Writes of every stack. The caches are apart from the State because phases
  only read them."""
  N = config.num_stages

  def phase(work, *arguments):
    def run_phase(state, output, waits_B, caches):
      of_bytes = work is _byte_phase
      block = schedule.byte_block if of_bytes else schedule.block
      rows_C = block_rows(state, waits_B, block)
      call = Call(weights, config, caches, rows_C)
      state, output = work(call, *arguments, state, output)
      return state, output, call.all_writes(waits_B.shape[0], schedule)

    return run_phase

  phases = [phase(_byte_phase, splitter_step, choose, use_level_head)]
  if N > 1:
    middle = range(2, N)
    phases += [phase(_contract_phase, i) for i in middle]
    phases.append(phase(_deepest_phase))
    phases += [phase(_expand_phase, i) for i in middle[::-1]]
  return phases


# ----- the loop -------------------------------------------------------------


def next_phase(state: State, schedule: Schedule, P: int):
  """The phase to run: scalar int32, and who waits for it: bool (B,)."""
  waits_PB = jnp.arange(P)[:, None] == state.phase_B[None]
  waits_PB &= ~state.done_B[None]
  count_P = waits_PB.sum(axis=1)
  alive = count_P.sum()
  ready_P = (count_P >= jnp.minimum(schedule.wait, alive)) & (count_P > 0)
  # The last phase that is ready brings rows back to bytes soonest; if none
  # is, choosing bytes makes more rows wait below.
  phase = jnp.where(
    ready_P.any(),
    P - 1 - jnp.argmax(ready_P[::-1]),
    jnp.where(count_P[0] > 0, 0, jnp.argmax(count_P)),
  )
  return phase, waits_PB[phase]


def block_rows(state, waits_B, block):
  """int32 (C,): rows that wait, those with fewest bytes first; B = none."""
  B = waits_B.shape[0]
  row_B = jnp.arange(B, dtype=jnp.int32)
  if block == B:
    return jnp.where(waits_B, row_B, B)
  last = jnp.iinfo(jnp.int32).max
  order_C = jnp.argsort(jnp.where(waits_B, state.count_B, last))[:block]
  return jnp.where(waits_B[order_C], order_C, B).astype(jnp.int32)


def run(
  weights: dict,
  state: State,
  num_turns: jax.Array,
  *,
  config: ModelConfig,
  splitter_step: Callable,
  choose: Choose,
  schedule: Schedule,
  max_turns: int,
  use_level_head: bool = False,
) -> tuple[State, Output]:
  """Generates until every row is done or `num_turns` phases have run.

  Args: num_turns: int32 scalar, at most `max_turns` (static, the size of the
    output). splitter_step: the splitting automaton's, which gives a chosen
    byte its level; with `use_level_head` the model's level head gives it.
    choose: picks a byte per row, as `sampling.choose` does.
  """
  phases = _phases(
    weights, config, splitter_step, choose, use_level_head, schedule
  )
  P = len(phases)
  B = state.done_B.shape[0]
  block_P = jnp.array(schedule.blocks(P), jnp.int32)
  output = Output(
    jnp.zeros((B,), jnp.int32),
    jnp.zeros((B, max_turns), jnp.int32),
    jnp.zeros((B, max_turns), jnp.int8),
    jnp.zeros((B, max_turns), jnp.float32),
  )

  def unfinished(carry):
    turn, state, _ = carry
    return (turn < num_turns) & ~state.done_B.all()

  def take_turn(carry):
    turn, state, output = carry
    phase, waits_B = next_phase(state, schedule, P)
    num_rows = jnp.minimum(waits_B.sum(dtype=jnp.int32), block_P[phase])
    state = state._replace(
      calls_P=state.calls_P.at[phase].add(1),
      rows_P=state.rows_P.at[phase].add(num_rows),
    )
    caches = state.caches
    arguments = (state._replace(caches={}), output, waits_B, caches)
    if P == 1:
      state, output, writes = phases[0](*arguments)
    else:
      state, output, writes = jax.lax.switch(phase, phases, *arguments)
    written = {}
    for name, i in network.stack_names(config).items():
      with jax.named_scope(f"{name}/cache_write"):
        written[name] = Stack.write(
          config.stages[i], caches[name], writes[name]
        )
    return turn + 1, state._replace(caches=written), output

  carry = (jnp.zeros((), jnp.int32), state, output)
  _, state, output = jax.lax.while_loop(unfinished, take_turn, carry)
  return state, output


# ----- starting -------------------------------------------------------------


def start(
  prefilled: Prefilled, rows: Rows, limit_B: np.ndarray, choice: Any, P: int
) -> State:
  """The state in which every row waits to choose its first byte.

  Phase 0 begins with the last prompt position's expanding path, whose caches
  hold the positions before it.
  """
  B = rows.counts_BN.shape[0]

  def zeros(size):  # each its own buffer: the loop takes them over
    return jnp.zeros((size,), jnp.int32)

  return State(
    **prefilled._asdict(),
    offset_BN=jnp.asarray(rows.offset_BN),
    position_BN=jnp.asarray(rows.counts_BN) - 1,
    level_B=zeros(B),
    splitter_BZ=jnp.asarray(rows.splitter_BZ),
    phase_B=zeros(B),
    done_B=jnp.asarray(limit_B <= 0),
    count_B=zeros(B),
    limit_B=jnp.asarray(limit_B, jnp.int32),
    choice=choice,
    calls_P=zeros(P),
    rows_P=zeros(P),
  )
