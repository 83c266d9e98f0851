"""The splitting function: bytes to the level of every byte (AU-Net, 2.1).

The level of a byte is how many stages deep its vector is kept: 0 stays in
stage 1, k is also a position of stages 2 … k + 1. `Splitter` computes levels
with one automaton, compiled from named rules (see `rules` and `automaton`),
and beside it those that are too large for one (`vocabulary`, `entropy`), in
two drivers: `levels` and `scan` over whole corpora on the host, and `step`
byte by byte inside jit, for decoding.

Unlike the official splitter, which runs regular expressions over whole texts
and lets what follows a white space move the cut before it, levels here depend
on nothing but the bytes up to and including their own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.compiled import compiled
from aunet_jax.config import BOS, EOS, FIRST_MARK
from aunet_jax.splitting import automaton, entropy
from aunet_jax.splitting.rules import Rule, make_rule
from aunet_jax.splitting.vocabulary import Vocabulary, read_tokens

SYMBOL_BITS = automaton.SYMBOL_BITS


LEVEL_BITS = automaton.LEVEL_BITS


UNSTARTED = automaton.UNSTARTED


@compiled
def _run(data, levels, node, row, byte_table, rule_table, fresh, pending):
  """Fills `levels` for `data`; returns the node and row after it."""
  for i in range(data.size):
    byte = np.int64(data[i])
    if byte & 0xC0 == 0x80:
      at = (node << 6) + (byte & 0x3F)
    elif node <= UNSTARTED:
      at = fresh + byte
    else:
      at = pending + byte
    value = np.int64(byte_table[at])
    node = value >> SYMBOL_BITS
    value = np.int64(rule_table[row + (value & ((1 << SYMBOL_BITS) - 1))])
    levels[i] = value & ((1 << LEVEL_BITS) - 1)
    row = value >> LEVEL_BITS
  return node, row


# Rules that run beside the automaton: the part of their name before
# the @, and what makes one of the text after it. A machine has `start`, `scan`,
# `step` and `hash` as `Vocabulary`.
MACHINES = {
  "tokens": lambda path: Vocabulary(read_tokens(path)),
  "entropy": entropy.load,
}


_NEVER = Rule(start=0, step=lambda state, character: (state, False))


class Splitter:
  """Levels of bytes, by the rules that feed stages 2, 3, ….

  Args:
    rules: names such as "word@2"; see `rules.RULES` and `MACHINES`. None at
      all make a splitter for a model of one stage: every level is 0.
    has_roles: whether bytes from FIRST_MARK on mark who speaks; then they have
      the deepest level, whatever the rules.

  Attributes:
    rules, has_roles: as given, rules a tuple.
    num_levels: the deepest level there is; BOS has it.
    hash: names the function computed; checkpoints keep it.
    rules_hash: of the same rules without roles.
    start: int32 (k,), the state before the first byte of a document: what is
      known of an unfinished character, the automaton's row, and the state of
      each machine beside it. k is 2 where there is none.

  Raises: ValueError naming a rule that does not exist.
  """

  def __init__(self, rules: Sequence[str], has_roles: bool = False):
    if isinstance(rules, str):
      raise ValueError(
        f"rules={rules!r} must be a sequence of rules, one for each stage "
        f"below the bytes: {rules.split(',')!r}."
      )
    self.rules, self.has_roles = tuple(rules), has_roles
    machines = {}  # by level
    for level, name in enumerate(self.rules, 1):
      kind, at, argument = name.partition("@")
      if kind in MACHINES and at:
        machines[level] = MACHINES[kind](argument)
    self.tables = automaton.compile_rules(
      [
        _NEVER if level in machines else make_rule(name)
        for level, name in enumerate(self.rules, 1)
      ]
    )
    self.num_levels = len(self.rules)
    self._machines = tuple(machines.items())
    names = [self.tables.hash]
    names += [f"{level}:{machine.hash}" for level, machine in self._machines]
    self.rules_hash = "+".join(names)
    self.hash = f"{self.rules_hash}+roles" if has_roles else self.rules_hash
    starts = [np.array([UNSTARTED, 0], np.int32)]
    starts += [machine.start for _, machine in self._machines]
    self.start = np.concatenate(starts)

  def __repr__(self) -> str:
    return f"Splitter({list(self.rules)!r})"

  def __reduce__(self):
    return Splitter, (self.rules, self.has_roles)

  def levels(self, data: bytes | np.ndarray) -> np.ndarray:
    """The level of each byte of one document: int8, as long as `data`.

    Args: data: bytes, or a uint8 array or memory map. No BOS, no EOS.
    """
    return self.scan(data, self.start)[0]

  def scan(
    self, data: bytes | np.ndarray, state: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Levels of the next bytes of a document, and the state after them.

    Scanning a then b from the state after a is scanning a + b. Releases the
    interpreter lock, so threads scan in parallel.

    Args: data: as `levels`. state: int32 (k,), `start` or from a `scan`.
    Returns: levels int8 (n,), state int32 (k,).
    Raises: ValueError for a state that no text leads to: a compiled loop would
      read memory that is not its own.
    """
    data_N = as_bytes_array(data)
    state = np.asarray(state)
    if state.shape != self.start.shape or not self.tables.has_state(*state[:2]):
      raise ValueError(f"{state} is no state of {self!r}.")
    levels_N = np.empty(data_N.size, np.int8)
    tables = self.tables
    node, row = _run(
      data_N,
      levels_N,
      int(state[0]),
      int(state[1]),
      tables.byte_table,
      tables.rule_table,
      tables.fresh,
      tables.pending,
    )
    ends, at = [np.array([node, row], np.int32)], 2
    for level, machine in self._machines:
      size = len(machine.start)
      cuts_N, end = machine.scan(data_N, state[at : at + size])
      np.maximum(levels_N, np.int8(level) * cuts_N, out=levels_N)
      ends.append(end)
      at += size
    if self.has_roles:
      levels_N[data_N >= FIRST_MARK] = self.num_levels
    return levels_N, np.concatenate(ends)

  def init_state(self, batch: int) -> jax.Array:
    """States at the start of `batch` documents, int32 (batch, k)."""
    return jnp.tile(jnp.asarray(self.start), (batch, 1))

  def step(
    self, state_BK: jax.Array, byte_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Reads one byte in each row. Pure; made for the body of a loop in jit.

    Args:
      state_BK: int32 (B, k), from `init_state`, `step`, or `scan`.
      byte_B: int32 (B,), 0-255, BOS or EOS. BOS starts a document whatever
        came before and has the deepest level; EOS has level 0.
    Returns: the next states, int32 (B, k), and levels, int32 (B,).
    """
    tables = self.tables
    node_B, row_B = state_BK[:, 0], state_BK[:, 1]
    text_B = byte_B & 0xFF
    at_B = jnp.where(
      text_B & 0xC0 == 0x80,
      (node_B << 6) + (text_B & 0x3F),
      jnp.where(node_B <= UNSTARTED, tables.fresh, tables.pending) + text_B,
    )
    value_B = jnp.asarray(tables.byte_table)[at_B].astype(jnp.int32)
    node_B = value_B >> SYMBOL_BITS
    symbol_B = value_B & ((1 << SYMBOL_BITS) - 1)
    value_B = jnp.asarray(tables.rule_table)[row_B + symbol_B]
    level_B = value_B & ((1 << LEVEL_BITS) - 1)
    nexts, at = [jnp.stack([node_B, value_B >> LEVEL_BITS], axis=1)], 2
    for level, machine in self._machines:
      size = len(machine.start)
      after, cut_B = machine.step(state_BK[:, at : at + size], text_B)
      level_B = jnp.maximum(level_B, jnp.where(cut_B, level, 0))
      nexts.append(after)
      at += size
    if self.has_roles:
      level_B = jnp.where(text_B >= FIRST_MARK, self.num_levels, level_B)
    next_BK = jnp.concatenate(nexts, axis=1)
    is_bos_B, is_eos_B = byte_B == BOS, byte_B == EOS
    next_BK = jnp.where(is_bos_B[:, None], jnp.asarray(self.start), next_BK)
    next_BK = jnp.where(is_eos_B[:, None], state_BK, next_BK)
    level_B = jnp.where(is_bos_B, self.num_levels, level_B)
    return next_BK, jnp.where(is_eos_B, 0, level_B)


def as_bytes_array(data: bytes | np.ndarray) -> np.ndarray:
  """A contiguous, read-only, flat uint8 view of `data`; no copy if it is one.

  Raises: ValueError for an array that does not hold bytes.
  """
  if isinstance(data, np.ndarray):
    if data.dtype != np.uint8 or data.ndim != 1:
      raise ValueError(
        f"data is {data.dtype} of shape {data.shape}; a splitter reads bytes, "
        "or a flat array of uint8 without BOS and EOS."
      )
    view = np.ascontiguousarray(data).view(np.ndarray)[:]
    view.flags.writeable = False  # one compiled loop for every source
    return view
  if isinstance(data, str):
    raise ValueError("data is a str; a splitter reads bytes: text.encode().")
  return np.frombuffer(data, np.uint8)
