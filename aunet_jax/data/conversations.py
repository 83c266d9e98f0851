"""Records of prompts and answers, or of messages -> documents of turns.

Every record is one document that fits a row, see `roles`: a row never begins
inside one, so what is learned can be told from the bytes of a row alone. One
that is too long loses the left of its prompt; where the answer alone is too
long the record is skipped.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from aunet_jax.config import DataConfig
from aunet_jax.data import packing, roles
from aunet_jax.data.records import Document, Skip
from aunet_jax.data.tokenizer import Tokenizer


class _WrongError(ValueError):
  """A record that gives no conversation: (reason, detail)."""


@dataclasses.dataclass(frozen=True)
class Reader:
  """Makes a document of every record of a file.

  Attributes: messages: the field of a list of messages with `role` and
    `content`; None = `prompt` and `completion` are fields of text.
  """

  messages: str | None
  prompt: str
  completion: str
  splitter: Any
  capacities: tuple[int, ...]
  tokenizer: Tokenizer | None = None  # None: rows are of bytes

  @property
  def field(self) -> str:
    """One that every record has."""
    return self.prompt if self.messages is None else self.messages

  def identity(self) -> list:
    """What an index depends on, beside splitter and capacities."""
    return [self.messages, self.prompt, self.completion]

  def document(self, record: Any, where: str, size: int) -> Document | Skip:
    """Args: size: bytes of the record, lost where there is no document."""
    try:
      turns = self._turns(record)
      fitting = roles.shorten(turns, self._fits)
      if fitting is None:
        raise _WrongError(
          "answer longer than a row",
          f"its {len(turns[-1].text):,} bytes do not fit rows of capacities "
          f"{self.capacities}",
        )
    except _WrongError as error:
      return Skip(where, *error.args, size)
    text = roles.encode(fitting)
    return Document(where, text, len(roles.encode(turns)) - len(text))

  def _fits(self, turns: Sequence[roles.Turn]) -> bool:
    text = roles.encode(turns)
    if self.tokenizer is not None:  # of one stage
      return len(self.tokenizer.encode(text)) < self.capacities[0]
    if len(text) >= self.capacities[0]:
      return False
    slots_S = packing.slots(text, self.splitter, len(self.capacities))
    return bool((slots_S <= self.capacities).all())

  def _turns(self, record: Any) -> list[roles.Turn]:
    """Raises: _WrongError."""
    if not isinstance(record, dict):
      raise _WrongError("not an object", f"a {type(record).__name__}")
    if self.messages is None:
      named = {"user": self.prompt, "assistant": self.completion}
      said = [(role, _field(record, name)) for role, name in named.items()]
      names = list(named.values())
    else:
      messages = _field(record, self.messages)
      if not isinstance(messages, list):
        kind = type(messages).__name__
        raise _WrongError(
          "messages of a wrong type", f"{self.messages!r} is a {kind}"
        )
      said = [(_field(m, "role"), _field(m, "content")) for m in messages]
      names = [f"content of message {n + 1}" for n in range(len(said))]
    turns = []
    for name, (role, text) in zip(names, said, strict=True):
      if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise _WrongError("text of a wrong type", f"{name!r} is {kind}")
      try:
        turns.append(roles.turn_of(role, text))
      except ValueError as error:
        raise _WrongError("no such role", str(error)) from None
    try:
      roles.check_order(turns, last="assistant")
    except ValueError as error:
      raise _WrongError("roles out of order", str(error)) from None
    if any(t.role == "assistant" and not t.text for t in turns):
      raise _WrongError("empty answer", "the assistant says nothing")
    return turns


def _field(record: Any, name: str) -> Any:
  if not isinstance(record, dict):
    raise _WrongError(
      "not an object", f"a message is a {type(record).__name__}"
    )
  if name not in record:
    known = ", ".join(map(str, list(record)[:8]))
    raise _WrongError("no such field", f"no {name!r} among: {known}")
  return record[name]


def make_reader(
  config: DataConfig,
  splitter,
  capacities: Sequence[int],
  tokenizer: Tokenizer | None = None,
) -> Reader | None:
  """The reader of a config; None where its records are plain text."""
  if config.format == "text":
    return None
  return Reader(
    config.messages_field if config.format == "chat" else None,
    config.prompt_field,
    config.completion_field,
    splitter,
    tuple(capacities),
    tokenizer,
  )
