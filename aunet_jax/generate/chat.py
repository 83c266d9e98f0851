"""A conversation with a model that was tuned on conversations.

The model reads the turns so far and the assistant's mark, and writes until it
says that its turn is over; see `data.roles`. A conversation that has grown past
the model's positions loses its oldest exchanges.
"""

from collections.abc import Sequence

from aunet_jax.data import roles
from aunet_jax.data.roles import Turn
from aunet_jax.generate.generator import Completion, Generator

# END, and the other marks: nobody else speaks in the assistant's turn.
STOPS = (roles.END_TEXT, *(bytes([mark]) for mark in roles.MARKS.values()))


def check(generator: Generator) -> None:
  """Raises: ValueError for a model that knows no roles."""
  if not generator.splitter.has_roles:
    raise ValueError(
      "this model was not tuned on conversations, so it knows no roles; tune "
      "one with data.format='chat' or 'completion' (docs/finetuning.md)."
    )


def prompt_of(
  generator: Generator,
  turns: Sequence[Turn],
  max_bytes: int,
  max_positions: int | None = None,
) -> bytes:
  """What the model reads before it writes at most `max_bytes` of an answer.

  How many tokens an answer takes is not known: of a model of tokens, there is
  room for `max_bytes` of them or half the positions, whichever is less.

  Raises: ValueError where roles are out of order, `max_bytes` leaves no room,
    or the model knows no roles.
  """
  check(generator)
  roles.check_order(turns, last="user")
  limit = max_positions or generator.config.position_limit

  room = max_bytes
  if limit is not None and generator.tokenizer is not None:
    room = min(room, limit // 2)

  def fits(turns):
    if limit is None:
      return True
    return len(generator.units(roles.encode(turns))) + 2 + room <= limit

  shorter = roles.shorten(turns, fits)
  if shorter is None:
    raise ValueError(
      f"max_bytes={max_bytes} leaves no room for a question in the {limit} "
      f"positions of this model; set it to at most {max(1, limit - 3)}."
    )
  return roles.encode_prompt(shorter)


def answered(completion: Completion) -> Turn:
  """The assistant's turn, as part of a conversation that goes on.

  What the model wrote is made valid UTF-8, so it holds no mark either.
  """
  text = completion.data.decode("utf-8", "replace")
  return Turn("assistant", text.encode())
