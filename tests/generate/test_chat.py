"""Prompts of conversations, and what becomes of answers."""

import numpy as np
import pytest

from aunet_jax.data import roles
from aunet_jax.generate import chat
from aunet_jax.generate.generator import Completion, Generator
from aunet_jax.splitting.splitter import Splitter
from tests import toy_tokens
from tests.toy_generator import generator, make_config, make_params, talker


def turns(*texts) -> list[roles.Turn]:
  names = ("user", "assistant")
  return [roles.turn_of(names[n % 2], text) for n, text in enumerate(texts)]


def test_a_prompt_ends_where_the_assistant_begins():
  prompt = chat.prompt_of(talker(), turns("hi", "yes", "so"), 10)
  assert prompt == b"\xf9hi\xfayes\xfb\xf9so\xfa"
  with pytest.raises(ValueError, match="the last turn is the assistant's"):
    chat.prompt_of(talker(), turns("hi", "yes"), 10)
  with pytest.raises(ValueError, match="not tuned on conversations"):
    chat.prompt_of(generator(), turns("hi"), 10)


def test_a_conversation_past_the_positions_forgets_its_start():
  config = make_config(window=None)  # 128 positions, no more
  limited = Generator(
    config, make_params(config), Splitter(config.rules, has_roles=True)
  )
  long = turns("a" * 60, "b" * 30, "last")
  prompt = chat.prompt_of(limited, long, 100)
  assert prompt == b"\xf9last\xfa"
  assert chat.prompt_of(limited, turns("x" * 300), 100) == (
    b"\xf9" + b"x" * 25 + b"\xfa"
  )
  with pytest.raises(ValueError, match="set it to at most 125"):
    chat.prompt_of(limited, turns("x"), 126)
  chat.prompt_of(limited, turns("x"), 125)


def test_positions_of_a_model_of_tokens_are_counted_in_tokens():
  talker = toy_tokens.generator(has_roles=True)  # 32 positions
  prompt = chat.prompt_of(talker, turns("the cat" * 30), 400)
  assert len(talker.units(prompt)) == 15  # and BOS: half of them
  assert len(prompt) > 30
  (one,) = talker.generate([prompt], max_bytes=400, stop=chat.STOPS)
  assert one.reason in ("stop", "eos", "length")


def test_an_answer_that_goes_on_holds_no_mark():
  none = np.zeros(0, np.float32)
  completion = Completion(
    prompt=b"", data=b"a\xff\xfd\xc3", logprobs=none, levels=none,
    prompt_logprobs=none, prompt_levels=none, reason="length",
    top_logprobs=[], prompt_top_logprobs=[],
  )  # fmt: skip
  turn = chat.answered(completion)
  assert turn == roles.turn_of("assistant", "a\ufffd\ufffd\ufffd")
