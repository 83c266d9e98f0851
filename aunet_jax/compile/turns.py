"""What a turn of the decoding loop is on average: how often each phase runs.

Every turn runs one phase for a block of rows (`generate/decode.py`). Which one
depends on where rows meet boundaries, so the loop's own scheduling runs here
on rows whose boundaries fall at random, as often as the capacities of the
stages say: a stage of capacity c in a row of L bytes gets a position every L /
c bytes. Nothing else of the network runs.

Letters: B rows, P phases, N stages.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aunet_jax.config import ModelConfig
from aunet_jax.generate import decode

NUM_TURNS = 4096


class Waiting(NamedTuple):
  """The part of a decoding state that decides which phase runs."""

  phase_B: jax.Array
  done_B: jax.Array
  count_B: jax.Array


class Turns(NamedTuple):
  """Of an average turn, by phase."""

  shares: tuple[float, ...]  # how often it is this phase; they sum to 1
  rows: tuple[float, ...]  # that a call of it serves

  @property
  def bytes(self) -> float:
    """That all rows together choose in a turn."""
    return self.shares[0] * self.rows[0]


def names(model: ModelConfig) -> tuple[str, ...]:
  """Of the phases, in their order."""
  N = model.num_stages
  if N == 1:
    return ("a byte",)
  middle = range(2, N)
  return (
    "a byte, stage 1",
    *(f"stage {i}, contracting" for i in middle),
    f"stage {N}",
    *(f"stage {i}, expanding" for i in middle[::-1]),
  )


def after(phase: int, num_stages: int) -> tuple[int, int]:
  """Phases that a row waits for after this one: (up, down).

  Down where its byte is a boundary of the stage below, else up.
  """
  N = num_stages
  if phase == N - 1:  # the deepest
    up = 0 if N <= 2 else N
    return up, up
  if phase < N - 1:  # contracting; phase 0 ends with stage 1's
    stage = phase + 1
    return (0 if stage == 1 else 2 * N - 1 - stage), stage
  stage = 2 * N - 1 - phase
  above = 0 if stage == 2 else 2 * N - stage
  return above, above


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _simulate(reaches, schedule, num_rows, num_turns):
  """(calls_P, rows_P). reaches: of a byte, to stage 2, 3, …"""
  N = len(reaches) + 1
  P = max(1, 2 * N - 2)
  up_P, down_P = jnp.array([after(p, N) for p in range(P)]).T
  block_P = jnp.array(schedule.blocks(P))
  reach_N = jnp.array([1.0, *reaches])

  def turn(carry, key):
    waiting, level_B, calls_P, rows_P = carry
    phase, waits_B = decode.next_phase(waiting, schedule, P)

    def chosen(block):
      rows_C = decode.block_rows(waiting, waits_B, block)
      return jnp.zeros((num_rows,), bool).at[rows_C].set(True, mode="drop")

    runs_B = jnp.where(
      phase == 0, chosen(schedule.byte_block), chosen(schedule.block)
    )
    number_B = jax.random.uniform(key, (num_rows,))
    new_B = (number_B[:, None] < reach_N[None]).sum(axis=1) - 1
    level_B = jnp.where(runs_B & (phase == 0), new_B, level_B)
    # A contracting phase p is of stage p + 1, and goes down to level p + 1.
    goes_down_B = level_B >= phase + 1
    next_B = jnp.where(goes_down_B, down_P[phase], up_P[phase])
    waiting = Waiting(
      jnp.where(runs_B, next_B, waiting.phase_B),
      waiting.done_B,
      waiting.count_B + (runs_B & (phase == 0)),
    )
    number = jnp.minimum(waits_B.sum(), block_P[phase])
    calls_P, rows_P = calls_P.at[phase].add(1), rows_P.at[phase].add(number)
    return (waiting, level_B, calls_P, rows_P), None

  zeros_B, zeros_P = jnp.zeros(num_rows, jnp.int32), jnp.zeros(P, jnp.int32)
  waiting = Waiting(zeros_B, zeros_B > 0, zeros_B)
  keys = jax.random.split(jax.random.key(0), num_turns)
  (*_, calls_P, rows_P), _ = jax.lax.scan(
    turn, (waiting, zeros_B, zeros_P, zeros_P), keys
  )
  return calls_P, rows_P


def expected(
  model: ModelConfig,
  schedule: decode.Schedule,
  num_rows: int,
  num_turns: int = NUM_TURNS,
) -> Turns:
  """Of texts whose stages get positions as often as their capacities say."""
  L = model.capacities[0]
  reaches = tuple(capacity / L for capacity in model.capacities[1:])
  calls_P, rows_P = _simulate(reaches, schedule, num_rows, num_turns)
  calls_P, rows_P = calls_P.tolist(), rows_P.tolist()
  return Turns(
    tuple(calls / num_turns for calls in calls_P),
    tuple(r / max(1, c) for r, c in zip(rows_P, calls_P, strict=True)),
  )
