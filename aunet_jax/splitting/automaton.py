"""Compiles splitting rules and UTF-8 decoding to two tables of integers.

A byte is answered by two look-ups. The first reads UTF-8:

    (node, byte) -> (next node, symbol)

where a node is what is known of an unfinished character and a symbol says
what the byte brings: the middle of a character, the end of one of some
class, or either one after the news that the bytes before it were no
character. The second runs all rules of a splitter at once:

    (row, symbol) -> (next row, level)

with one row for each reachable, distinguishable combination of their states.

What is not UTF-8 is read as Python's `bytes.decode(errors="replace")` reads
it: each longest broken piece of a character counts as one MALFORMED character.
If only the next byte shows that a piece is broken, its cut is lost (the level
of a byte may not depend on what follows it) but its rule state is not. Bytes
0x80-0xBF at the very start of a document are skipped, as the end of a
character that was cut off there.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from aunet_jax.splitting.rules import Rule
from aunet_jax.splitting.unicode_table import (
  MALFORMED,
  NUM_CLASSES,
  load_classes,
)

# Kinds of characters: the classes, then each character a rule tells apart.
# Symbols: 0 = inside a character, 1 + k = a character of kind k, and the same
# again for a byte which shows that the character before it was broken off.
SYMBOL_BITS = 6  # low bits of an entry of the byte table


MAX_APART = (2**SYMBOL_BITS - 2) // 2 - NUM_CLASSES


LEVEL_BITS = 4  # low bits of an entry of the rule table


MAX_LEVELS = 2**LEVEL_BITS - 1


MAX_TABLE_BYTES = 256 * 1024


MAX_COMBINED_STATES = 6000  # before merging; a second of compiling


# Nodes up to this one await the start of a character. It is where a document
# starts: bytes 0x80-0xBF there are the end of a character that was cut off.
UNSTARTED = 1


# Layout of the byte table: 64 entries a node for the bytes 0x80-0xBF, then
# all 256 bytes for nodes 0 and 1, then all 256 for any other node (there the
# bytes 0x80-0xBF are not used).


@dataclasses.dataclass(frozen=True)
class Tables:
  """The machine of one splitter, as read by every driver."""

  byte_table: np.ndarray  # uint16, next node << SYMBOL_BITS | symbol
  fresh: int  # where the 256 entries of nodes 0 and 1 start
  pending: int  # where the 256 entries of the other nodes start
  rule_table: np.ndarray  # int32 (rows * num_symbols,), next << LEVEL_BITS |
  # level; next is already multiplied by num_symbols
  num_symbols: int
  num_levels: int

  @property
  def num_states(self) -> int:
    return len(self.rule_table) // self.num_symbols

  def has_state(self, node: int, row: int) -> bool:
    """Whether both are numbers that the tables themselves may hold."""
    return (
      0 <= node < self.fresh // 64
      and 0 <= row < len(self.rule_table)
      and row % self.num_symbols == 0
    )

  @property
  def nbytes(self) -> int:
    return self.byte_table.nbytes + self.rule_table.nbytes

  @property
  def hash(self) -> str:
    """Names the function the tables compute; 16 hexadecimal digits."""
    digest = hashlib.sha256(f"aunet_jax splitter, {self.num_levels}".encode())
    digest.update(self.byte_table.astype("<u2").tobytes())
    digest.update(self.rule_table.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


@functools.cache
def byte_table(apart: str = "") -> tuple[np.ndarray, int, int]:
  """The UTF-8 half of `Tables`: (byte_table, fresh, pending).

  Args: apart: characters that are a kind of their own, in this order.
  """
  kinds = load_classes()[0].copy()
  for number, character in enumerate(apart):
    kinds[ord(character)] = NUM_CLASSES + number
  first_broken = 1 + NUM_CLASSES + len(apart)
  valid = kinds.reshape(-1, 64) + 1  # symbols, one block of 64 a row
  # A byte 0x80-0xBF that cannot follow ends the broken piece before it and is
  # another one itself.
  broken = first_broken + 1 + MALFORMED
  nodes: dict[tuple[int, ...], int] = {
    (1 + MALFORMED,) * 64: 0,
    (UNSTARTED << SYMBOL_BITS,) * 64: UNSTARTED,
  }

  def node(entries) -> int:
    """The number of the node with these 64 entries, made if it is new."""
    return nodes.setdefault(tuple(int(e) for e in entries), len(nodes))

  def entry(next_node: int) -> int:
    return next_node << SYMBOL_BITS

  last = [node(block) for block in valid]  # the last 6 bits of a character

  def middle(blocks: Sequence[int | None]) -> int:
    """The node before 64 others; None = not a character."""
    return node([broken if b is None else entry(b) for b in blocks])

  def third(first: int) -> int:
    """The node 12 bits before the end of the characters from `first` on."""
    return middle(last[first >> 6 : (first >> 6) + 64])

  leads = {byte: last[byte & 0x1F] for byte in range(0xC2, 0xE0)}
  for byte in range(0xE0, 0xF0):
    blocks = list(last[(byte & 0xF) << 6 : ((byte & 0xF) + 1) << 6])
    if byte == 0xE0:
      blocks[:32] = [None] * 32  # overlong
    if byte == 0xED:
      blocks[32:] = [None] * 32  # surrogates
    leads[byte] = middle(blocks)
  for byte in range(0xF0, 0xF5):
    firsts = [((byte & 7) << 18) | (i << 12) for i in range(64)]
    allowed = [0x10000 <= first < 0x110000 for first in firsts]
    leads[byte] = middle(
      [
        third(first) if ok else None
        for first, ok in zip(firsts, allowed, strict=True)
      ]
    )
  fresh = np.full(256, 1 + MALFORMED)
  fresh[:128] = valid[:2].reshape(-1)
  for byte, next_node in leads.items():
    fresh[byte] = entry(next_node)
  table = np.concatenate([np.array(list(nodes)).reshape(-1), fresh])
  pending = fresh + first_broken
  if len(nodes) << SYMBOL_BITS > 0xFFFF:
    raise AssertionError(f"{len(nodes)} nodes do not fit the byte table")
  start = len(nodes) * 64
  return np.concatenate([table, pending]).astype(np.uint16), start, start + 256


def _apply(rule: Rule, state, character, broken: bool):
  """One symbol of a rule: (next state, cut?).

  Args: character: as `Rule.step` takes it, None inside one. broken: the
    character before this one was broken off.
  """
  if rule.every_byte:
    return rule.step(state, MALFORMED if character is None else character)
  if broken:
    state, _ = rule.step(state, MALFORMED)
  return (state, False) if character is None else rule.step(state, character)


def _characters(rule: Rule, apart: str) -> list:
  """What a rule is told for each symbol, but for what is broken."""
  classes, _ = load_classes()
  return [
    None,
    *range(NUM_CLASSES),
    *(c if c in rule.apart else int(classes[ord(c)]) for c in apart),
  ]


def _product(rules: Sequence[Rule], apart: str):
  """Runs all rules at once: next state and level, both (states, symbols)."""
  told = [_characters(rule, apart) for rule in rules]
  symbols = range(1 + NUM_CLASSES + len(apart))
  numbers = {tuple(rule.start for rule in rules): 0}
  queue, next_states, levels = list(numbers), [], []
  for states in queue:  # grows while it is walked
    next_states.append([])
    levels.append([])
    for broken, symbol in itertools.product((False, True), symbols):
      results = [
        _apply(rule, state, characters[symbol], broken)
        for rule, state, characters in zip(rules, states, told, strict=True)
      ]
      target = tuple(state for state, _ in results)
      if target not in numbers:
        numbers[target] = len(numbers)
        queue.append(target)
      if len(numbers) > MAX_COMBINED_STATES:
        raise ValueError(
          f"the splitting rules reach more than {MAX_COMBINED_STATES} states "
          "together; use rules that count less far, or fewer of them."
        )
      next_states[-1].append(numbers[target])
      cuts = [level for level, (_, cut) in enumerate(results, 1) if cut]
      levels[-1].append(max(cuts, default=0))
  return np.array(next_states, np.int32), np.array(levels, np.int32)


def _minimise(next_states: np.ndarray, levels: np.ndarray):
  """Merges states that answer every text alike, and numbers them canonically.

  Moore's algorithm: start from states whose levels agree and split a group
  until the members of each lead to the same groups on every symbol.
  """
  _, group = np.unique(levels, axis=0, return_inverse=True)
  while True:
    signature = np.concatenate([group[:, None], group[next_states]], axis=1)
    _, finer = np.unique(signature, axis=0, return_inverse=True)
    if finer.max() == group.max():
      break
    group = finer
  representative = {}
  for state, number in enumerate(group.tolist()):
    representative.setdefault(number, state)
  # Breadth-first from the start, symbols in order: any two sets of rules that
  # compute the same function get the same tables.
  order = {int(group[0]): 0}
  for number in (queue := [int(group[0])]):
    for target in group[next_states[representative[number]]].tolist():
      if target not in order:
        order[target] = len(order)
        queue.append(target)
  kept = [representative[number] for number in queue]
  renumber = np.array([order[number] for number in group.tolist()], np.int32)
  return renumber[next_states[kept]], levels[kept]


def compile_rules(rules: Sequence[Rule]) -> Tables:
  """Tables for rules[0] feeding stage 2, rules[1] stage 3, and so on.

  The level of a byte is 1 + the highest rule that cuts there, 0 if none does,
  so a cut of a deep stage is one of every stage above it too.

  Raises: ValueError if the tables would pass MAX_TABLE_BYTES.
  """
  if len(rules) > MAX_LEVELS:
    raise ValueError(
      f"{len(rules)} splitting rules; a splitter has at most {MAX_LEVELS}."
    )
  apart = "".join(sorted({c for rule in rules for c in rule.apart}))
  if len(apart) > MAX_APART:
    raise ValueError(
      f"the splitting rules tell {len(apart)} characters apart ({apart}); "
      f"at most {MAX_APART} can be."
    )
  utf8, fresh, pending = byte_table(apart)
  next_states, levels = _minimise(*_product(rules, apart))
  num_symbols = next_states.shape[1]
  rule_table = next_states * num_symbols << LEVEL_BITS | levels
  tables = Tables(
    byte_table=utf8,
    fresh=fresh,
    pending=pending,
    rule_table=rule_table.reshape(-1).astype(np.int32),
    num_symbols=num_symbols,
    num_levels=len(rules),
  )
  if tables.nbytes > MAX_TABLE_BYTES:
    raise ValueError(
      f"the splitting rules need {tables.num_states} states and "
      f"{tables.nbytes} bytes of tables, more than {MAX_TABLE_BYTES}; use "
      "rules that count less far, or fewer of them."
    )
  return tables
