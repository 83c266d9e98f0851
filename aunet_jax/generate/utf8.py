"""UTF-8 as a small automaton: which bytes may come next.

Well-formed sequences as the Unicode Standard lists them (section 3.9, table
3-7): no overlong form, no surrogate, nothing above U+10FFFF. A state is what is
known of an unfinished character.
"""

import numpy as np

BETWEEN = 0  # the state between characters


# What may come in each state: (first byte, last byte, next state).
_MOVES = (
  (  # between characters
    (0x00, 0x7F, 0),
    (0xC2, 0xDF, 1),
    (0xE0, 0xE0, 4),
    (0xE1, 0xEC, 2),
    (0xED, 0xED, 5),
    (0xEE, 0xEF, 2),
    (0xF0, 0xF0, 6),
    (0xF1, 0xF3, 3),
    (0xF4, 0xF4, 7),
  ),
  ((0x80, 0xBF, 0),),  # one byte is missing
  ((0x80, 0xBF, 1),),  # two are
  ((0x80, 0xBF, 2),),  # three are
  ((0xA0, 0xBF, 1),),  # after E0: less would be overlong
  ((0x80, 0x9F, 1),),  # after ED: more would be a surrogate
  ((0x90, 0xBF, 2),),  # after F0: less would be overlong
  ((0x80, 0x8F, 2),),  # after F4: more would be above U+10FFFF
)
NUM_STATES = len(_MOVES)


# int32 (states,): bytes until the character is complete.
MISSING = np.array([0, 1, 2, 3, 2, 2, 3, 3], np.int32)


def _next_states() -> np.ndarray:
  table = np.full((NUM_STATES, 256), -1, np.int32)
  for state, moves in enumerate(_MOVES):
    for first, last, target in moves:
      table[state, first : last + 1] = target
  return table


NEXT = _next_states()  # int32 (states, bytes); -1 where the byte is wrong


def _run(data: bytes) -> int:
  """The state after `data` from between characters; -1 if it is not UTF-8."""
  state = BETWEEN
  for byte in data:
    state = int(NEXT[state, byte])
    if state < 0:
      break
  return state


def unfinished(data: bytes) -> bytes:
  """The bytes at the end of `data` that may become a character yet.

  Empty where the last character is complete, or is none. (Python's incremental
  decoder keeps halves of surrogates too, which never become one.)
  """
  for size in range(1, 4):
    if _run(data[-size:]) > BETWEEN:
      return data[-size:]
  return b""


def state_after(data: bytes) -> int:
  """The state in which `data` ends; wrong bytes in it are passed over."""
  return _run(unfinished(data))
