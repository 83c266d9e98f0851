"""Decoding that drafts bytes and verifies them, for one row.

The heads after the first (`aunet/heads.py`) draft the bytes after the one that
was just chosen. The next turn reads it and its drafts at once, as successive
positions of the row, and chooses a byte at each of them, as `decode.py` would,
for as long as the choice is what was drafted. So every byte is chosen from the
model's own logits, with the noise of its own number: drafts decide how many
bytes a turn gives, 1 to `model.heads`, and never which.

A turn, of a row whose newest byte and drafts are Q candidates:

  1. contract_1 reads all candidates; each sees what the caches hold and the
     candidates before it.
  2. If the newest byte is a boundary, the deeper stages run once.
  3. expand_1 and the head, for all candidates. A draft that is a boundary would
     need the deeper stages, so logits from it on are left out.
  4. Bytes are chosen; the heads draft from the last state that was used.
  5. The caches get the positions that were right; nothing is ever taken back.

Drafts are drawn with the noise that choosing will use, so a head that predicts
what the model does makes the draw that the model makes (the coupling of arXiv
2302.01318 by common noise instead of rejection).

Letters: Q candidates, C rows of a block (here 1 or Q), D width, E width of the
next stage, B = 1 row, V vocabulary, O offsets, P phases, N stages, Z splitting
automaton states, M bytes that n-grams reach back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.aunet import cache, network
from aunet_jax.aunet.block import Stack
from aunet_jax.config import BOS, ModelConfig
from aunet_jax.data.rows import Rows
from aunet_jax.generate import sampling
from aunet_jax.generate.decode import Output, Schedule, num_phases
from aunet_jax.generate.prefill import Prefilled

NO_DRAFT = BOS  # is never chosen


class State(NamedTuple):
  """Everything a row needs to go on; see `decode.State`."""

  caches: dict
  up_BOD: tuple
  recent_BM: jax.Array  # int32: the bytes before the newest
  offset_BN: jax.Array  # int32: stage 1's is that of the byte before
  position_BN: jax.Array  # int32: newest position of each stage
  level_B: jax.Array  # int32: of the newest byte
  splitter_BZ: jax.Array  # int32
  byte_BQ: jax.Array  # int32: the newest byte, and drafts of those to come
  done_B: jax.Array  # bool
  count_B: jax.Array  # int32
  limit_B: jax.Array  # int32
  choice: Any
  calls_P: jax.Array  # int32, as if each part were a phase of `decode.py`
  rows_P: jax.Array  # int32: of stage 1, the candidates that were right


def schedule(config: ModelConfig) -> Schedule:
  """Rows a part computes, for `generator.make_stats`."""
  return Schedule(byte_block=config.heads, block=1, wait=1)


class _Deep(NamedTuple):
  """What the stages below the first change."""

  up_BOD: tuple
  offset_BN: jax.Array
  position_BN: jax.Array
  writes: dict[str, cache.Write]
  runs_P: jax.Array  # int32


def _run_deeper(weights, config: ModelConfig, state: State, i, x_CD, deep):
  """Stage i + 1 gets a position from stage i's newest, x_CD, a boundary."""
  N = config.num_stages
  row_C = jnp.zeros((1,), jnp.int32)

  def run_stack(name, x_CE, deep, phase):
    x_CE, write = Stack.step(
      weights[name],
      config.stages[i],
      config,
      state.caches[name],
      x_CE,
      deep.position_BN[:, i],
      row_C,
    )
    writes = deep.writes | {name: write}
    runs_P = deep.runs_P.at[phase].add(1)
    return x_CE, deep._replace(writes=writes, runs_P=runs_P)

  x_CE = network.pool(weights, config, i, x_CD)
  deep = deep._replace(position_BN=deep.position_BN.at[:, i].add(1))
  if i + 1 == N:
    x_CE, deep = run_stack("deepest", x_CE, deep, N - 1)
  else:
    x_CE, deep = run_stack(f"contract_{i + 1}", x_CE, deep, i)
    deep = _go_deeper(weights, config, state, i + 1, x_CE, deep)
    y_CE = network.at_offset(config, deep.up_BOD[i], deep.offset_BN[:, i])
    if config.stages[i].skip:
      y_CE += x_CE
    x_CE, deep = run_stack(f"expand_{i + 1}", y_CE, deep, 2 * N - 2 - i)
  up_COD = network.upsample(weights, config, i, x_CE)
  up_BOD = (*deep.up_BOD[: i - 1], up_COD, *deep.up_BOD[i:])
  return deep._replace(up_BOD=up_BOD)


def _go_deeper(weights, config, state: State, i, x_CD, deep: _Deep) -> _Deep:
  """The stages below stage i, if its newest position is a boundary."""
  offset_BN = deep.offset_BN

  def boundary(deep):
    deep = deep._replace(offset_BN=offset_BN.at[:, i - 1].set(0))
    return _run_deeper(weights, config, state, i, x_CD, deep)

  def inside(deep):
    return deep._replace(offset_BN=offset_BN.at[:, i - 1].add(1))

  return jax.lax.cond(state.level_B[0] >= i, boundary, inside, deep)


def _choose(weights, config, splitter_step, state: State, h_QD, open_Q, output):
  """Chooses bytes while they are what was drafted.

  Args: open_Q: whether the state h_QD of a candidate can be trusted.
  Returns: the State with the newest byte, how many were chosen, and the Output.
  """
  row_C = jnp.zeros((1,), jnp.int32)
  logits_QV = network.logits(weights, config, h_QD)
  follows_Q = jnp.append(state.byte_BQ[0, 1:], NO_DRAFT)
  open_Q = jnp.append(open_Q[1:], False)
  large = {"caches": state.caches, "up_BOD": state.up_BOD}

  def go_on(carry):
    return carry[1]

  def choose_one(carry):
    num, _, state, output = carry
    count_C = state.count_B
    choice, byte_C, logprob_C, stop_C = sampling.choose(
      state.choice, logits_QV[num][None], count_C, row_C
    )
    splitter_BZ, level_B = splitter_step(state.splitter_BZ, byte_C)
    stop_C |= count_C + 1 >= state.limit_B
    at = output.count_B[0]
    output = Output(
      output.count_B + 1,
      *(
        x_BT.at[0, at].set(x_C[0].astype(x_BT.dtype))
        for x_BT, x_C in (
          (output.byte_BT, byte_C),
          (output.level_BT, level_B),
          (output.logprob_BT, logprob_C),
        )
      ),
    )
    state = state._replace(
      choice=choice,
      splitter_BZ=splitter_BZ,
      level_B=level_B,
      count_B=count_C + 1,
      done_B=stop_C,
      byte_BQ=state.byte_BQ.at[:, 0].set(byte_C),
    )
    right = open_Q[num] & (byte_C[0] == follows_Q[num]) & ~stop_C[0]
    return num + 1, right, state, output

  small = state._replace(caches={}, up_BOD=())
  carry = (jnp.int32(0), jnp.bool_(True), small, output)
  num, _, state, output = jax.lax.while_loop(go_on, choose_one, carry)
  return state._replace(**large), num, output


def _draft(weights, config, state: State, h_CD) -> State:
  """Drafts what follows the newest byte, of the state that predicted it."""
  byte_C = state.byte_BQ[:, 0]
  bytes_C = [byte_C]
  for k in range(2, config.heads + 1):
    h_CD = network.ahead(weights, config, k, h_CD, byte_C)
    logits_CV = network.logits(weights, config, h_CD)
    byte_C = sampling.guess(state.choice, logits_CV, state.count_B + (k - 2))
    bytes_C.append(byte_C)
  return state._replace(byte_BQ=jnp.stack(bytes_C, axis=1))


def _turn(weights, config, splitter_step, state: State, output):
  """Reads the candidates, chooses bytes, and drafts the next candidates."""
  N, Q = config.num_stages, config.heads
  byte_Q, ahead_Q = state.byte_BQ[0], jnp.arange(Q, dtype=jnp.int32)
  position_Q = state.position_BN[0, 0] + ahead_Q
  row_Q = jnp.zeros((Q,), jnp.int32)
  first = "deepest" if N == 1 else "contract_1"

  def run_stack(name, x_QD):
    return Stack.step(
      weights[name],
      config.stages[0],
      config,
      state.caches[name],
      x_QD,
      position_Q,
      row_Q,
      Q,
    )

  # 1. All candidates; n-grams see the candidates before them.
  M = state.recent_BM.shape[1]
  ids = jnp.append(state.recent_BM[0], byte_Q)
  recent_QM = jnp.stack([ids[q : q + M] for q in range(Q)])
  x_QD, recent_QM = network.embed(weights, config, byte_Q, recent_QM)
  x_QD, read = run_stack(first, x_QD)

  # Until a draft is a boundary, candidates are of the newest byte's segment.
  splitter_BZ, open_Q = state.splitter_BZ, [jnp.bool_(True)]
  for q in range(1, Q):
    splitter_BZ, level_B = splitter_step(splitter_BZ, byte_Q[q][None])
    open_Q.append(open_Q[-1] & (level_B[0] == 0))
  open_Q = jnp.stack(open_Q)

  writes, offset_BN, position_BN = {}, state.offset_BN, state.position_BN
  if N > 1:
    # 2. The deeper stages.
    nothing = {
      name: Stack.no_write(config.stages[i], state.caches[name], 1, 1)
      for name, i in network.stack_names(config).items()
      if i > 0
    }
    runs_P = jnp.zeros((num_phases(config),), jnp.int32)
    deep = _Deep(state.up_BOD, offset_BN, position_BN, nothing, runs_P)
    deep = _go_deeper(weights, config, state, 1, x_QD[:1], deep)
    writes = deep.writes
    offset_BN, position_BN = deep.offset_BN, deep.position_BN
    state = state._replace(
      up_BOD=deep.up_BOD,
      calls_P=state.calls_P + deep.runs_P,
      rows_P=state.rows_P + deep.runs_P,
    )

    # 3. Up again.
    up_QOD = jnp.repeat(state.up_BOD[0], Q, axis=0)
    up_QD = network.at_offset(config, up_QOD, offset_BN[0, 0] + ahead_Q)
    x_QD = up_QD + x_QD if config.stages[0].skip else up_QD
    x_QD, writes["expand_1"] = run_stack("expand_1", x_QD)

  # 4. Bytes are chosen, and drafted.
  state, num, output = _choose(
    weights, config, splitter_step, state, x_QD, open_Q, output
  )
  state = _draft(weights, config, state, x_QD[num - 1][None])

  # 5. Right are the positions that a byte was chosen at.
  right_Q = jnp.where(ahead_Q < num, 0, 1)  # row 1 of 1 is none
  for name, write in ((first, read), ("expand_1", writes.get("expand_1"))):
    if write is not None:
      writes[name] = write._replace(rows_C=right_Q)
  caches = {
    name: Stack.write(config.stages[i], state.caches[name], writes[name])
    for name, i in network.stack_names(config).items()
  }
  if N > 1:
    offset_BN = offset_BN.at[:, 0].add(num - 1)
  state = state._replace(
    caches=caches,
    recent_BM=recent_QM[num - 1][None],
    offset_BN=offset_BN,
    position_BN=position_BN.at[:, 0].add(num),
    calls_P=state.calls_P.at[0].add(1),
    rows_P=state.rows_P.at[0].add(num),
  )
  return state, output


def run(
  weights: dict,
  state: State,
  num_turns: jax.Array,
  *,
  config: ModelConfig,
  splitter_step,
  max_turns: int,
) -> tuple[State, Output]:
  """Generates until the row is done or `num_turns` turns have run.

  Arguments and results as `decode.run`; a turn gives up to `config.heads`
  bytes, and the Output has room for all.
  """
  size = max_turns * config.heads
  output = Output(
    jnp.zeros((1,), jnp.int32),
    jnp.zeros((1, size), jnp.int32),
    jnp.zeros((1, size), jnp.int8),
    jnp.zeros((1, size), jnp.float32),
  )

  def unfinished(carry):
    turn, state, _ = carry
    return (turn < num_turns) & ~state.done_B[0]

  def take_turn(carry):
    turn, state, output = carry
    state, output = _turn(weights, config, splitter_step, state, output)
    return turn + 1, state, output

  carry = (jnp.zeros((), jnp.int32), state, output)
  _, state, output = jax.lax.while_loop(unfinished, take_turn, carry)
  return state, output


def start(
  prefilled: Prefilled,
  rows: Rows,
  limit_B: np.ndarray,
  choice: Any,
  config: ModelConfig,
) -> State:
  """The state in which the newest byte of the prompt is read again.

  Args: prefilled: with `again`, of one row.
  """
  byte_BQ = np.full((1, config.heads), NO_DRAFT, np.int32)
  byte_BQ[0, 0] = rows.bytes_BL[0, rows.counts_BN[0, 0] - 1]
  offset_BN = np.array(rows.offset_BN)
  if config.num_stages > 1:  # a turn begins with one more
    offset_BN[:, 0] -= 1
  P = num_phases(config)
  return State(
    caches=prefilled.caches,
    up_BOD=prefilled.up_BOD,
    recent_BM=prefilled.recent_BM,
    offset_BN=jnp.asarray(offset_BN),
    position_BN=jnp.asarray(rows.counts_BN) - 1,
    level_B=jnp.zeros((1,), jnp.int32),  # its deeper stages have run
    splitter_BZ=jnp.asarray(rows.splitter_BZ),
    byte_BQ=jnp.asarray(byte_BQ),
    done_B=jnp.asarray(limit_B <= 0),
    count_B=jnp.zeros((1,), jnp.int32),
    limit_B=jnp.asarray(limit_B, jnp.int32),
    choice=choice,
    calls_P=jnp.zeros((P,), jnp.int32),
    rows_P=jnp.zeros((P,), jnp.int32),
  )
