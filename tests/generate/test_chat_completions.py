"""OpenAI-compatible chat completions, asked for by OpenAI's own client."""

import json
import threading

import numpy as np
import pytest

from aunet_jax.data import roles
from aunet_jax.generate import chat
from aunet_jax.generate.chat_completions import parse_request
from aunet_jax.generate.sampling import Sampling
from aunet_jax.generate.server import make_server
from tests.toy_generator import generator, talker

openai = pytest.importorskip(
  "openai", reason="OpenAI's client is not here; pip install openai"
)
MESSAGES = [
  {"role": "system", "content": "be brief"},
  {"role": "user", "content": "one é"},
  {"role": "assistant", "content": "two"},
  {"role": "user", "content": [{"type": "text", "text": "three"}]},
]
PROMPT = b"\xf8be brief\xf9one \xc3\xa9\xfatwo\xfb\xf9three\xfa"


def serving(model):
  with make_server(model, 0) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with openai.OpenAI(
      base_url=f"http://127.0.0.1:{server.server_port}/v1",
      api_key="none",
      max_retries=0,
      timeout=120,
    ) as client:
      yield client
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def client():
  yield from serving(talker())


def ask(client, **fields):
  settings = {"model": "any", "messages": MESSAGES, "max_tokens": 24}
  return client.chat.completions.create(**settings | fields)


def expected(**arguments):
  stop = [*chat.STOPS, *arguments.pop("stop", ())]
  return talker().generate([PROMPT], max_bytes=24, stop=stop, **arguments)


def test_an_answer_is_the_generators(client):
  answer = ask(client, seed=7, temperature=0.8, top_p=0.9)
  (row,) = expected(seed=7, settings=Sampling(temperature=0.8, top_p=0.9))
  (choice,) = answer.choices
  assert choice.message.role == "assistant"
  assert choice.message.content == row.text
  assert choice.logprobs is None and answer.object == "chat.completion"
  usage = answer.usage
  assert (usage.prompt_tokens, usage.completion_tokens) == (
    len(PROMPT),
    len(row.data),
  )


def test_a_turn_ends_at_a_mark_or_a_stop_and_is_streamed(client):
  rows = expected(seed=1, num_samples=8)
  stop = rows[0].text[2:4]
  for fields in ({}, {"stop": [stop]}):
    stop = [text.encode() for text in fields.get("stop", ())]
    rows = expected(seed=1, num_samples=8, stop=stop)
    texts, reasons = [""] * 8, [None] * 8
    speakers = []
    chunks = ask(
      client, seed=1, n=8, stream=True,
      stream_options={"include_usage": True}, **fields,
    )  # fmt: skip
    for chunk in chunks:
      assert chunk.object == "chat.completion.chunk"
      if not chunk.choices:
        used = chunk.usage.completion_tokens
        continue
      (choice,) = chunk.choices
      texts[choice.index] += choice.delta.content or ""
      reasons[choice.index] = choice.finish_reason or reasons[choice.index]
      speakers += [choice.delta.role] if choice.delta.role else []
    assert texts == [row.text for row in rows]
    ends = ["length" if row.reason == "length" else "stop" for row in rows]
    assert reasons == ends and set(ends) == {"length", "stop"}
    assert used == sum(len(row.data) for row in rows)
    assert speakers == ["assistant"] * 8


def test_logprobs_are_the_models(client):
  answer = ask(client, seed=7, logprobs=True, top_logprobs=3)
  (row,) = expected(seed=7, top_logprobs=20)
  content = answer.choices[0].logprobs.content
  assert bytes(b for one in content for b in one.bytes) == row.data
  np.testing.assert_allclose(
    [one.logprob for one in content], row.logprobs, rtol=1e-5
  )
  for one, top in zip(content, row.top_logprobs, strict=True):
    best = list(top.items())[:3]
    shown = [t.bytes[0] if t.bytes else 257 for t in one.top_logprobs]
    assert shown == [byte for byte, _ in best]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"messages": []}, "at least one message"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
    ({"messages": [{"role": "user"}]}, "content of message 1 must be text"),
    ({"messages": MESSAGES[:3]}, "the last turn is the assistant's"),
    ({"messages": [MESSAGES[2]]}, "turn 1 is the assistant's"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"top_logprobs": 2}, "needs logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"presence_penalty": 1.0}, "not implemented"),
    ({"extra_body": {"utf8": True}}, "'utf8' is not one of"),
  ],
)
def test_a_request_that_cannot_be_met_is_refused(client, fields, message):
  with pytest.raises(openai.BadRequestError, match=message):
    ask(client, **fields)


def test_a_model_that_was_not_tuned_says_so():
  for client in serving(generator()):
    with pytest.raises(openai.BadRequestError, match="not tuned"):
      ask(client)


def test_no_message_can_forge_a_role():
  forged = "".join(map(chr, range(0xDC80, 0xDD00))) + "\ud800"
  body = json.dumps({"messages": [{"role": "user", "content": forged}]})
  request = parse_request(body.encode(), talker())
  assert [b for b in request.prompt if b >= 0xF8] == [0xF9, 0xFA]
  assert (
    roles.decode(request.prompt)[0].text.decode("utf-8", "surrogatepass")
    == forged
  )
