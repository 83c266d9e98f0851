"""The automaton of UTF-8 against Python's decoder."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from aunet_jax.generate import utf8

# One byte for every way a byte can be treated.
KINDS = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1]
KINDS += [0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3]
KINDS += [0xF4, 0xF5, 0xFF]
# Some way to go on after each beginning of a character.
ENDS = [
  bytes(end)
  for n in (1, 2, 3)
  for end in itertools.product([0x80, 0xA0, 0x90], *[[0x80]] * (n - 1))
]


def is_utf8(data: bytes) -> bool:
  try:
    data.decode()
  except UnicodeDecodeError:
    return False
  return True


def may_become_a_character(data: bytes) -> bool:
  return any(
    is_utf8(data + end) and len((data + end).decode()) == 1 for end in ENDS
  )


def test_every_start_of_a_character_is_known_and_nothing_else():
  for size in (1, 2, 3):
    for data in itertools.product(KINDS, repeat=size):
      data = bytes(data)
      tails = [data[-n:] for n in range(1, size + 1)]
      expected = [tail for tail in tails if may_become_a_character(tail)]
      assert [utf8.unfinished(data)] == (expected or [b""]), data
      state = utf8.state_after(data)
      if expected:
        missing = next(len(end) for end in ENDS if is_utf8(expected[0] + end))
        assert utf8.MISSING[state] == missing
      else:
        assert state == utf8.BETWEEN


def test_every_byte_is_right_or_wrong_in_every_state():
  for start in (
    b"",
    b"\xc3",
    b"\xe4",
    b"\xf1",
    b"\xe0",
    b"\xed",
    b"\xf0",
    b"\xf4",
  ):
    state = utf8.state_after(start)
    for byte in range(256):
      data = start + bytes([byte])
      right = len(data) <= 4 and (is_utf8(data) or may_become_a_character(data))
      assert (utf8.NEXT[state, byte] >= 0) == right, data


@given(st.binary(max_size=8) | st.text(max_size=4).map(str.encode))
def test_the_automaton_accepts_what_decodes(data):
  state = utf8.BETWEEN
  for byte in data:
    state = utf8.NEXT[state, byte] if state >= 0 else state
  assert (state == utf8.BETWEEN) == is_utf8(data)


def test_every_character_is_accepted():
  text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
  states = {utf8.BETWEEN}
  table = utf8.NEXT.tolist()
  state = utf8.BETWEEN
  for byte in text.encode():
    state = table[state][byte]
    states.add(state)
  assert state == utf8.BETWEEN and states == set(range(utf8.NUM_STATES))
