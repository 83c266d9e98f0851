"""Text on its way to a reader: complete characters, nothing past a stop."""

import functools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aunet_jax.config import EOS
from aunet_jax.data import tokenizer as tokenizer_lib
from aunet_jax.generate import utf8
from aunet_jax.generate.decode import Output
from aunet_jax.generate.sampling import Top
from aunet_jax.generate.streaming import RowText, hand_out

TEXT = st.text("ab|aé中😀", max_size=10).map(str.encode)
# Few byte values, so that stop strings, and pieces of characters, do come.
STOP = st.lists(
  st.sampled_from([b"\xa9", b"\xb8\xad", b"\xad", b"\x9f\x98", b"\xc3"])
  | st.binary(min_size=1, max_size=3)
  | st.text("ab|é中", max_size=3).map(str.encode)
).map(lambda texts: [text for text in texts if text])
CUTS = st.just(set(range(64))) | st.sets(st.integers(0, 12))


def cut_off(data: bytes, stop: list[bytes]) -> tuple[bytes, str]:
  """The rule in four lines: (what is kept, the reason)."""
  for size in range(1, len(data) + 1):
    ended = [text for text in stop if data[:size].endswith(text)]
    if ended:
      return data[: size - max(map(len, ended))], "stop"
  return data, "length"


def feed(row: RowText, data: bytes, cuts: set[int]):
  """Pieces as they come when the row is shown after `cuts` bytes."""
  pieces = []
  for number, byte in enumerate(data):
    if number in cuts:
      pieces.append(row.show(done=False))
    if row.reason is None:
      row.add(byte, number % 4, -float(number), {byte: -float(number)})
  return pieces, row.show(done=True)


@given(prompt=st.binary(max_size=5) | TEXT, data=TEXT, stop=STOP, cuts=CUTS)
def test_pieces_are_the_text_up_to_a_stop_string(prompt, data, stop, cuts):
  row = RowText(stop, prompt)
  pieces, last = feed(row, data, cuts)
  kept, reason = cut_off(data, stop)
  assert (bytes(row.data), row.reason) == (kept, reason)
  assert b"".join(piece.data for piece in [*pieces, last]) == kept
  begun = prompt.removesuffix(utf8.unfinished(prompt)).decode(errors="replace")
  shown = "".join(piece.text for piece in [*pieces, last])
  assert begun + shown == (prompt + kept).decode(errors="replace")
  # Every byte keeps its own numbers.
  assert row.levels == [n % 4 for n in range(len(kept))]
  for piece in [*pieces, last]:
    numbers = range(piece.start, piece.start + len(piece.data))
    assert piece.logprobs == [-n for n in numbers]
    assert piece.top_logprobs == [{data[n]: -n} for n in numbers]


def test_text_is_shown_as_soon_as_it_is_certain():
  def texts(data, stop=(), prompt=b""):
    pieces, last = feed(RowText(stop, prompt), data, set(range(64)))
    return [piece.text for piece in [*pieces[1:], last]]

  assert texts(b"abc") == ["a", "b", "c"]
  assert texts("aé中".encode()) == ["a", "", "é", "", "", "中"]
  assert texts("中a".encode()[1:], prompt="中".encode()[:1]) == ["", "中", "a"]
  assert texts(b"\xc3\xa9", prompt=b"\xe4") == ["\ufffd", "é"]
  # A byte that may begin a stop string waits until it does not.
  assert texts(b"abab|", [b"ab|"]) == ["", "", "ab", "", ""]
  assert texts(b"aab", [b"ab|", b"zz"]) == ["", "a", "ab"]


@given(data=TEXT, cuts=CUTS)
def test_no_character_is_split_on_screen(data, cuts):
  pieces, last = feed(RowText(), data, cuts)
  for piece in [*pieces, last]:
    assert piece.data.decode() == piece.text


@given(prompt=TEXT, size=st.integers(0, 3), data=TEXT, stop=STOP, cuts=CUTS)
def test_whole_characters_leave_no_part_of_one(prompt, size, data, stop, cuts):
  prompt, data = prompt + data[:size], data[size:]  # anywhere in a character
  row = RowText(stop, prompt, whole_characters=True)
  pieces, last = feed(row, data, cuts)
  kept, _ = cut_off(data, stop)
  result = bytes(row.data)
  assert kept.startswith(result) and len(kept) - len(result) < 4
  # A stop string inside the prompt's own last character leaves it open.
  if result or not utf8.unfinished(prompt):
    (prompt + result).decode()
  assert len(row.logprobs) == len(row.levels) == len(result)
  assert b"".join(piece.data for piece in [*pieces, last]) == result


def test_a_stop_string_in_the_prompts_last_character_leaves_nothing():
  row = RowText([b"\x80"], b"a\xf0", whole_characters=True)
  pieces, last = feed(row, "😀".encode()[1:], {1, 2})
  assert not row.data and row.reason == "stop"
  assert [piece.text for piece in [*pieces, last]] == ["", "", "\ufffd"]


@functools.cache
def tokens(folder) -> tokenizer_lib.Tokenizer:
  """Of whole words, and of pieces of characters."""
  text = "ab|ab|é中中😀 aé中 ab😀 中a b😀é |é| 😀中".encode()
  path = folder / "tokenizer.json"
  path.write_text(tokenizer_lib.train([text * 9], 268))
  return tokenizer_lib.Tokenizer(path)


@given(
  prompt=TEXT,
  numbers=st.lists(st.integers(0, 267) | st.integers(256, 267), max_size=8),
  stop=STOP,
  cuts=CUTS,
  most=st.integers(1, 12),
)
def test_tokens_are_shown_as_their_bytes_would_be(
  tmp_path_factory, prompt, numbers, stop, cuts, most
):
  tokenizer = tokens(tmp_path_factory.getbasetemp())
  row = RowText(stop, prompt, max_bytes=most, tokenizer=tokenizer)
  pieces = []
  for n, number in enumerate(numbers):
    if n in cuts:
      pieces.append(row.show(done=False))
    if row.reason is None:
      row.add(number, 0, -1.0)
  pieces.append(row.show(done=True))
  data = tokenizer.decode(numbers)
  of_bytes = RowText(stop, prompt)
  _, last = feed(of_bytes, data[:most], set())
  assert (row.data, row.reason) == (of_bytes.data, of_bytes.reason)
  assert "".join(piece.text for piece in pieces) == last.text
  # Every token counts once, at its first byte.
  starts = np.cumsum([0, *tokenizer.num_bytes[numbers]])[:-1]
  expected = np.isin(np.arange(len(row.data)), starts)
  np.testing.assert_array_equal(row.logprobs, -1.0 * expected)


def test_the_longest_of_two_stop_strings_is_cut_off():
  for stop in ([b"b|", b"ab|", b"|"], [b"|", b"ab|", b"b|"]):
    row = RowText(stop)
    feed(row, b"aab|", set())
    assert (bytes(row.data), row.reason) == (b"a", "stop")


def test_eos_and_the_end_of_a_call_are_told_apart():
  def output(*bytes_T):
    one = np.array([bytes_T])
    return Output(np.array([len(bytes_T)]), one, 0 * one, -1.0 * one)

  row, pieces = RowText([b"zz"]), []
  ring = Top(np.arange(6).reshape(1, 3, 2), -np.arange(6.0).reshape(1, 3, 2))

  def call(count, done, *bytes_T):
    hand_out(
      [row],
      output(*bytes_T),
      np.array([count]),
      np.array([done]),
      ring,
      lambda b, piece: pieces.append((b, piece.text)),
    )

  call(2, False, 97, 122)
  assert pieces == [(0, "a")] and row.reason is None
  call(2, False)  # nothing came, so nothing is shown
  assert pieces == [(0, "a")]
  call(4, True, 98, EOS)
  assert pieces == [(0, "a"), (0, "zb")] and row.reason == "eos"
  call(4, True, 99)  # a row that has ended gets nothing more
  assert bytes(row.data) == b"azb"
  # The prompt's last character, which nothing completes, is shown at the end.
  hand_out(
    [RowText((), b"\xe4")],
    output(EOS),
    np.array([1]),
    np.array([True]),
    None,
    lambda b, piece: pieces.append((b, piece.text)),
  )
  assert pieces[2:] == [(0, "\ufffd")]
  silent = RowText()
  hand_out([silent], output(97), np.array([1]), np.array([False]), None, None)
  assert bytes(silent.data) == b"a" and not silent.top_logprobs
  # Bytes 0, 1 and 2 lie at their numbers in the ring.
  assert [list(top) for top in row.top_logprobs] == [[0, 1], [2, 3], [4, 5]]
