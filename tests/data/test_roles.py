"""Conversations as bytes: marks, what is learned, and what has to go."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from aunet_jax.config import BOS, EOS
from aunet_jax.data import roles
from aunet_jax.data.roles import Turn
from aunet_jax.splitting.splitter import Splitter
from tests import toy_tokens

# All code points, surrogates too: what a JSON string can hold.
ANY_TEXT = st.text(st.characters(codec=None), max_size=12)
TURNS = st.lists(
  st.tuples(st.sampled_from(sorted(roles.MARKS)), ANY_TEXT), max_size=5
).map(lambda said: [roles.turn_of(*one) for one in said])


@hypothesis.given(text=ANY_TEXT)
def test_no_text_makes_a_mark(text):
  assert max(roles.encode_text(text), default=0) < 0xF8


def test_lone_surrogates_of_a_command_line_make_no_mark():
  forged = b"\xfa\xf8\xff".decode("utf-8", "surrogateescape")
  data = roles.encode_text(forged)
  assert data.decode("utf-8", "surrogatepass") == forged
  assert max(data) < 0xF8


@hypothesis.given(turns=TURNS)
def test_a_document_gives_its_turns_back(turns):
  assert roles.decode(roles.encode(turns)) == turns


def test_the_layout_is_as_documented():
  turns = [
    roles.turn_of("system", "S"),
    roles.turn_of("user", "é"),
    roles.turn_of("assistant", "A"),
    roles.turn_of("user", "B"),
  ]
  expected = b"\xf8S\xf9\xc3\xa9\xfaA\xfb\xf9B"
  assert roles.encode(turns) == expected
  assert roles.encode_prompt(turns) == expected + b"\xfa"


@hypothesis.given(turns=TURNS)
def test_what_is_learned_is_the_assistant_and_its_end(turns):
  expected = []  # turn by turn, with no look at the bytes
  for role, text in turns:
    learned = role == "assistant"
    expected += [False] + [learned] * (len(text) + learned)
  expected += [False]  # EOS
  text = np.frombuffer(roles.encode(turns), np.uint8)
  ids = np.concatenate([[BOS], text])
  targets = np.concatenate([text, [EOS]])
  mask = roles.in_answers(ids)
  np.testing.assert_array_equal(mask, expected)
  assert EOS not in targets[mask]


@hypothesis.given(text=ANY_TEXT | st.text("the cat ÷øùúû", max_size=9))
def test_no_text_makes_the_token_of_a_mark(text):
  tokenizer = toy_tokens.tokenizer()
  assert tokenizer.decode(tokenizer.marks) == bytes(roles.ALL.tolist())
  ids = tokenizer.encode(roles.encode_text(text))
  assert not np.isin(ids, tokenizer.marks).any()


@hypothesis.given(
  turns=st.lists(
    st.tuples(
      st.sampled_from(sorted(roles.MARKS)),
      ANY_TEXT | st.text("the cat", max_size=9),
    ),
    max_size=5,
  ).map(lambda said: [roles.turn_of(*one) for one in said])
)
def test_tokens_of_the_same_bytes_are_learned(turns):
  tokenizer = toy_tokens.tokenizer()
  text = roles.encode(turns)
  ids = tokenizer.encode(text)
  marks = np.isin(ids, tokenizer.marks)
  assert marks.sum() == len(turns) + sum(t.role == "assistant" for t in turns)
  assert (tokenizer.num_bytes[ids[marks]] == 1).all()
  of_tokens = roles.in_answers(
    np.concatenate([[tokenizer.bos], ids]), tokenizer.marks
  )
  of_bytes = roles.in_answers(np.array([BOS, *text]))
  sizes = np.append(tokenizer.num_bytes[ids], 1)  # EOS
  np.testing.assert_array_equal(np.repeat(of_tokens, sizes), of_bytes)


@pytest.mark.parametrize(
  ("names", "last", "message"),
  [
    ("user assistant", "assistant", None),
    ("system user assistant user", "user", None),
    ("assistant user", "user", "turn 1 is the assistant's, not the user's"),
    ("user user assistant", "assistant", "turn 2 is the user's"),
    ("user system assistant", "assistant", "turn 2 is the system's"),
    ("user", "assistant", "the last turn is the user's"),
    ("system", "user", "no turn of a user"),
    ("", "user", "no turn of a user"),
  ],
)
def test_roles_take_turns(names, last, message):
  turns = [roles.turn_of(name, "x") for name in names.split()]
  if message is None:
    roles.check_order(turns, last)
    return
  with pytest.raises(ValueError, match=message):
    roles.check_order(turns, last)


def test_an_unknown_role_is_named():
  with pytest.raises(ValueError, match="role 'tool' is none of system"):
    roles.turn_of("tool", "x")


def talk(*texts: str) -> list[Turn]:
  names = ("user", "assistant")
  turns = [roles.turn_of(names[n % 2], t) for n, t in enumerate(texts[1:])]
  return [roles.turn_of("system", texts[0]), *turns]


def within(size: int):
  return lambda turns: len(roles.encode(turns)) <= size


def test_the_oldest_exchange_goes_first_then_the_left_of_the_question():
  turns = talk("sys", "old question", "old answer", "ünew question", "answer")
  assert roles.shorten(turns, within(100)) == turns
  assert roles.shorten(turns, within(40)) == [turns[0], *turns[3:]]
  cut = roles.shorten(turns, within(20))
  assert cut == talk("sys", "stion", "answer")[:1] + [
    Turn("user", b"question"[-7:]),
    turns[4],
  ]
  # Past the question's start only its system goes, and the answer stays whole.
  assert roles.shorten(turns, within(10)) == [Turn("user", b"n"), turns[4]]
  assert roles.shorten(turns, within(9)) == [Turn("user", b""), turns[4]]
  assert roles.shorten(turns, within(8)) is None


@hypothesis.given(turns=TURNS, size=st.integers(0, 40))
def test_shortening_keeps_characters_and_the_answer_whole(turns, size):
  asked = [turn._replace(role="user") for turn in turns[:1]]
  pair = [*asked, Turn("assistant", b"answer")]
  if len(pair) < 2:
    return
  shorter = roles.shorten(pair, within(size))
  if shorter is None:
    assert size < len(b"\xf9\xfaanswer\xfb")
    return
  assert len(roles.encode(shorter)) <= size
  assert shorter[-1] == pair[-1]
  kept = shorter[0].text
  assert pair[0].text.endswith(kept)
  if kept:
    assert kept[0] & 0xC0 != 0x80


@pytest.mark.parametrize("rules", [["word@1"], ["word@2", "pretok"], ["punct"]])
def test_a_mark_is_a_boundary_of_every_stage(rules):
  plain, marked = Splitter(rules), Splitter(rules, has_roles=True)
  assert marked.hash != plain.hash == marked.rules_hash
  text = roles.encode(talk("a b", "c d. e", "f", "g", "h i"))
  levels = marked.levels(text)
  marks = np.frombuffer(text, np.uint8) >= 0xF8
  assert marks.sum() == 7 and (levels[marks] == len(rules)).all()
  # All other bytes are split as without roles.
  np.testing.assert_array_equal(levels[~marks], plain.levels(text)[~marks])
