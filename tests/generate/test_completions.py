"""OpenAI-compatible completions, asked for by OpenAI's own client."""

import json
import threading

import numpy as np
import pytest

from aunet_jax.config import EOS
from aunet_jax.evaluate import score
from aunet_jax.generate import completions
from aunet_jax.generate.sampling import Sampling
from aunet_jax.generate.server import make_server
from tests.toy_generator import generator, make_config, make_params

openai = pytest.importorskip(
  "openai", reason="OpenAI's client is not here; pip install openai"
)


@pytest.fixture(scope="module")
def client():
  with make_server(generator(), 0) as server:
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


def ask(client, **fields):
  return client.completions.create(
    **{"model": "any", "max_tokens": 24} | fields
  )


def expected(prompt, **arguments):
  return generator().generate([prompt], max_bytes=24, **arguments)


def test_a_completion_is_the_generators(client):
  answer = ask(client, prompt="one é", seed=7, temperature=0.8, top_p=0.9)
  (row,) = expected(
    "one é".encode(), seed=7, settings=Sampling(temperature=0.8, top_p=0.9)
  )
  (choice,) = answer.choices
  assert choice.text == row.text and choice.finish_reason == "length"
  assert choice.logprobs is None and answer.object == "text_completion"
  assert answer.model == "any"
  usage = answer.usage
  assert (usage.prompt_tokens, usage.completion_tokens) == (6, 24)
  assert usage.total_tokens == 30


def test_prompts_and_samples_are_choices_in_order(client):
  answer = ask(client, prompt=["a", "b"], n=2, seed=1)
  rows = generator().generate([b"a", b"b"], num_samples=2, max_bytes=24, seed=1)
  assert [c.index for c in answer.choices] == [0, 1, 2, 3]
  assert [c.text for c in answer.choices] == [row.text for row in rows]
  # Bytes as numbers are prompts too.
  for prompt in (list(b"a"), [list(b"a"), list(b"b")]):
    again = ask(client, prompt=prompt, n=2, seed=1)
    assert again.choices[0].text == answer.choices[0].text


def test_a_stream_is_the_answer_in_pieces(client):
  fields = dict(prompt=["a", "b"], n=2, seed=1, logprobs=2)
  answer = ask(client, **fields)
  chunks = list(
    ask(client, stream=True, stream_options={"include_usage": True}, **fields)
  )
  assert len({chunk.id for chunk in chunks}) == 1
  for row, choice in enumerate(answer.choices):
    mine = [
      c.choices[0] for c in chunks if c.choices and c.choices[0].index == row
    ]
    assert "".join(c.text for c in mine) == choice.text
    assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
    assert mine[-1].finish_reason == choice.finish_reason
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
      values = [getattr(c.logprobs, name) for c in mine if c.logprobs]
      assert sum(values, []) == getattr(choice.logprobs, name), name
  assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage


def test_logprobs_are_those_of_scoring(client):
  answer = ask(client, prompt="ab é", seed=3, logprobs=3, echo=True)
  (choice,) = answer.choices
  (row,) = expected("ab é".encode(), seed=3, top_logprobs=5)
  data, found = row.prompt + row.data, choice.logprobs
  assert choice.text == "ab é" + row.text
  names = [chr(b) if b < 128 else f"bytes:\\x{b:02x}" for b in data]
  assert found.tokens == names
  config = make_config()
  (result,) = score.score(
    config, make_params(config), generator().splitter, [(b"", data)]
  )
  assert -sum(found.token_logprobs) == pytest.approx(result.nats, abs=1e-3) or (
    sum(found.token_logprobs) == pytest.approx(result.nats, abs=1e-3)
  )
  for name, logprob, top in zip(
    names, found.token_logprobs, found.top_logprobs, strict=True
  ):
    assert 3 <= len(top) <= 4 and top[name] == logprob
    assert max(top.values()) == list(top.values())[0]
  # Every byte is told which character of the text it is part of.
  assert found.text_offset[:6] == [0, 1, 2, 3, 3, 4]
  assert found.text_offset == sorted(found.text_offset)
  assert found.text_offset[-1] < len(choice.text)


def test_a_prompt_is_scored_without_writing(client):
  answer = ask(client, prompt="ab é", max_tokens=0, echo=True, logprobs=0)
  (choice,) = answer.choices
  assert choice.text == "ab é" and choice.finish_reason == "length"
  (row,) = expected("ab é".encode())
  np.testing.assert_allclose(
    choice.logprobs.token_logprobs, row.prompt_logprobs, atol=1e-5
  )
  assert choice.logprobs.top_logprobs is None
  assert answer.usage.completion_tokens == 0
  silent = ask(client, prompt="ab", max_tokens=0)
  assert silent.choices[0].text == ""


def test_stop_strings_are_never_sent(client):
  (row,) = expected(b"x", seed=2, settings=Sampling(utf8=True))
  stop = [row.text[6:8], row.text[12], "\n\n\n"]
  fields = dict(prompt="x", seed=2, stop=stop, extra_body={"utf8": True})
  text = row.text[: min(row.text.index(s) for s in stop[:2])]
  (choice,) = ask(client, **fields).choices
  assert (choice.text, choice.finish_reason) == (text, "stop")
  chunks = list(ask(client, stream=True, **fields))
  assert "".join(c.choices[0].text for c in chunks) == text
  assert (
    ask(client, **fields | {"stop": stop[0]}).choices[0].text
    == (row.text[: row.text.index(stop[0])])
  )


def test_without_a_seed_texts_differ(client):
  texts = {ask(client, prompt="x").choices[0].text for _ in range(4)}
  assert len(texts) > 1


def test_the_model_is_listed(client):
  assert [model.id for model in client.models.list()] == [completions.MODEL]


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(prompt=[]), "empty list"),
    (dict(prompt=["a"] * 65), "65 prompts"),
    (dict(prompt=[256]), "0 to 255"),
    (dict(prompt=[[1], [-1]]), "0 to 255"),
    (dict(prompt=[["a"]]), "0 to 255"),
    (dict(prompt=[1, "a"]), "prompt must be text"),
    (dict(prompt={}), "prompt must be text"),
    (dict(n=65), "n=65"),
    (dict(n=0), "n=0"),
    (dict(max_tokens=-1), "max_tokens=-1"),
    (dict(max_tokens=10**12), "max_bytes=1000000000000"),
    (dict(logprobs=6), "logprobs=6"),
    (dict(logprobs=True), "logprobs must be of type int"),
    (dict(echo=True, stream=True), "echo and stream"),
    (dict(stop=[3]), "stop must be text"),
    (dict(stop=3), "stop must be text"),
    (dict(stop={}), "stop must be text"),
    (dict(stop=[""]), "empty"),
    (dict(suffix="x"), "suffix is not implemented"),
    (dict(best_of=3), "best_of is not implemented"),
    (dict(logit_bias={"5": 1}), "logit_bias is not implemented"),
    (dict(presence_penalty=0.5), "presence_penalty is not implemented"),
    (dict(temperature=-1), "temperature=-1"),
    (dict(temperature=10**400), "temperature=inf"),
    (dict(seed=-5), "seed=-5"),
    (dict(extra_body={"tempo": 1}), "'tempo' is not one of"),
    (dict(extra_body={"stream_options": 3}), "stream_options must be of type"),
  ],
)
def test_what_cannot_be_met_is_a_bad_request(client, fields, message):
  with pytest.raises(openai.BadRequestError) as caught:
    ask(client, **{"prompt": "x"} | fields)
  assert message in caught.value.body["message"]
  assert caught.value.type == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken():
  body = {
    "prompt": "x",
    "suffix": None,
    "best_of": 2,
    "n": 2,
    "logit_bias": {},
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "user": "me",
    "stop": None,
  }
  request = completions.parse_request(json.dumps(body).encode())
  assert request.num_samples == 2 and request.arguments["stop"] == ()


def test_the_end_of_a_document_is_a_stop_and_has_a_name():
  request = completions.parse_request(b'{"prompt": "x", "logprobs": 2}')
  (row,) = expected(b"x")
  row = type(row)(
    **vars(row)
    | dict(
      data=b"a",
      logprobs=np.array([-np.inf], np.float32),
      top_logprobs=[{EOS: -0.5, 98: -1.0, 99: -2.0}],
      reason="eos",
    )
  )
  (choice,) = completions.Answer(request).complete([row])["choices"]
  assert choice["finish_reason"] == "stop"
  assert choice["logprobs"]["top_logprobs"] == [
    {"<eos>": -0.5, "b": -1.0, "a": -9999.0}
  ]
