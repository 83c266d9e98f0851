"""A conversation as bytes: who speaks is said by bytes that no text contains.

A turn is the mark of its role, then its text as UTF-8; END follows the text of
the assistant, who says with it that the turn is over:

  F8 system text  F9 user text  FA assistant text FB  F9 …

UTF-8 has no bytes F8 to FF, so no text of a user can make a mark: `encode_text`
is the only way from text to bytes. The splitter of a model of conversations
makes every mark a boundary of all stages.

To a model of tokens a mark is the token of its byte. A tokenizer encodes valid
text apart from bytes that are none (`tokenizer.Tokenizer.encode`), so a mark is
one token, no text has it, and tokens never reach over it.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from aunet_jax.config import FIRST_MARK

MARKS = {
  "system": FIRST_MARK,
  "user": FIRST_MARK + 1,
  "assistant": FIRST_MARK + 2,
}
END = FIRST_MARK + 3
END_TEXT = bytes([END])  # what generation stops at
ALL = np.array([*MARKS.values(), END], np.int32)  # the marks


class Turn(NamedTuple):
  role: str  # a key of MARKS
  text: bytes  # UTF-8, or a surrogate alone in the same form


def encode_text(text: str) -> bytes:
  """UTF-8; a lone surrogate in the same form, ED A0 80 to ED BF BF.

  Python's "surrogateescape" would make any byte of one, a mark too.
  """
  return text.encode("utf-8", "surrogatepass")


def turn_of(role: str, text: str) -> Turn:
  """Raises: ValueError for a role that there is not."""
  if not isinstance(role, str) or role not in MARKS:
    raise ValueError(f"role {role!r:.40} is none of {', '.join(MARKS)}")
  return Turn(role, encode_text(text))


def check_order(turns: Sequence[Turn], last: str) -> None:
  """A system's turn or none, then user and assistant by turns up to `last`.

  Raises: ValueError naming the first turn that is out of order.
  """
  begins = 1 if turns and turns[0].role == "system" else 0
  for number, turn in enumerate(turns[begins:]):
    expected = ("user", "assistant")[number % 2]
    if turn.role != expected:
      raise ValueError(
        f"turn {begins + number + 1} is the {turn.role}'s, not the {expected}'s"
      )
  if len(turns) == begins:
    raise ValueError("there is no turn of a user")
  if turns[-1].role != last:
    raise ValueError(
      f"the last turn is the {turns[-1].role}'s, not the {last}'s"
    )


def encode(turns: Iterable[Turn]) -> bytes:
  """The document of a conversation."""
  parts = []
  for role, text in turns:
    parts += [bytes([MARKS[role]]), text]
    if role == "assistant":
      parts.append(END_TEXT)
  return b"".join(parts)


def encode_prompt(turns: Iterable[Turn]) -> bytes:
  """The same, and the mark after which the assistant's next turn follows."""
  return encode(turns) + bytes([MARKS["assistant"]])


def decode(document: bytes) -> list[Turn]:
  """The turns of a document; inverse of `encode`."""
  names = {mark: role for role, mark in MARKS.items()}
  data = np.frombuffer(document, np.uint8)
  starts = np.flatnonzero((data >= FIRST_MARK) & (data < END)).tolist()
  turns = []
  for start, stop in itertools.pairwise([*starts, len(data)]):
    text = document[start + 1 : stop].removesuffix(END_TEXT)
    turns.append(Turn(names[data[start]], text))
  return turns


def in_answers(ids_L: np.ndarray, marks: np.ndarray = ALL) -> np.ndarray:
  """Which targets of a document are learned: of a piece that reads `ids_L`.

  Those after the assistant's mark, END the last of them.

  Args: ids_L: what every position reads, BOS first. marks: ids of `ALL`, of
    tokens `Tokenizer.marks`.
  Returns: bool (L,).
  """
  is_mark_L = np.isin(ids_L, marks)
  last_L = np.maximum.accumulate(np.where(is_mark_L, np.arange(len(ids_L)), 0))
  _, _, assistant, _ = marks
  return ids_L[last_L] == assistant


def shorten(
  turns: Sequence[Turn], fits: Callable[[list[Turn]], bool]
) -> list[Turn] | None:
  """A conversation without its oldest text, as much as has to go.

  First the oldest exchanges of user and assistant go; then the left of the last
  user's text, whole characters; then the system's turn. What the assistant says
  last is never cut.

  Returns: None where that alone does not fit.
  """
  turns = list(turns)
  if fits(turns):
    return turns
  system = [turn for turn in turns[:1] if turn.role == "system"]
  rest = turns[len(system) :]
  last = rest[-2:] if rest[-1].role == "assistant" else rest[-1:]
  while len(rest) > len(last):
    rest = rest[2:]
    if fits(system + rest):
      return system + rest
  question = last[0]
  for head in (system, []):

    def without(cut, head=head):
      while cut < len(question.text) and question.text[cut] & 0xC0 == 0x80:
        cut += 1
      return [*head, Turn(question.role, question.text[cut:]), *last[1:]]

    low, high = 0, len(question.text)  # cuts that do not fit, and that do
    if not fits(without(high)):
      continue
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (low, middle) if fits(without(middle)) else (middle, high)
    return without(high)
  return None
