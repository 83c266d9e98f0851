"""What lm-evaluation-harness is told equals what the library says."""

import math
import random
import types

import pytest

pytest.importorskip("lm_eval")

from aunet_jax import config as config_lib  # noqa: E402
from aunet_jax.aunet import sharding  # noqa: E402
from aunet_jax.data import roles  # noqa: E402
from aunet_jax.evaluate import bits_per_byte, harness, score  # noqa: E402
from aunet_jax.evaluate.harness import HarnessModel, Writing  # noqa: E402
from aunet_jax.splitting.splitter import Splitter  # noqa: E402
from aunet_jax.workdir import load  # noqa: E402
from tests import toy_generator, toy_tokens  # noqa: E402

TEXTS = [  # of 20 to 24 bytes: few shapes to compile
  "The word is a long one.",
  "Ein Wort: äöü ßéà",
  "слово и ещё",
  "字は語より短。",
  "الكلمة أطول",
  "कुछ शब्द",
  "단어는 길다.",
  "מילה אחת של",
]
ROW = 128  # positions of the toy's rows


def request(*args):
  return types.SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def loaded():
  generator = toy_generator.generator()
  model = load.AUNet(generator.config)
  config = config_lib.Config(model=generator.config)
  return load.Loaded(model, generator.params, generator.splitter, config, 0)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(config_lib.MeshConfig())


def make(loaded, mesh, batch_size=8):
  def write(prompts, writing):
    generator = toy_generator.generator()
    settings = harness_settings(writing)
    found = generator.generate(
      prompts, max_bytes=writing.max_bytes, stop=writing.stop,
      settings=settings,
    )  # fmt: skip
    return [one.data for one in found]

  return harness.HarnessModel(loaded, mesh, write, batch_size)


def harness_settings(writing):
  from aunet_jax.generate.sampling import Sampling

  return Sampling(temperature=writing.temperature)


def test_likelihoods_are_those_of_score(loaded, mesh):
  pairs = [("", TEXTS[0])]
  for text in TEXTS:
    pairs += [(text[:5], text[5:]), (text[:-1] + " ", text[-1])]
  model = make(loaded, mesh)
  found = model.loglikelihood([request(*pair) for pair in pairs])
  expected = score.score(
    loaded.model.config, loaded.params, loaded.splitter,
    [(a.encode(), b.encode()) for a, b in pairs],
  )  # fmt: skip
  for (nats, greedy), one in zip(found, expected, strict=True):
    assert nats == pytest.approx(one.nats, rel=1e-5)
    assert greedy == one.is_greedy
  assert model.truncated == 0
  # Neither the order nor the size of batches matters.
  order = list(range(len(pairs)))
  random.Random(0).shuffle(order)
  other = make(loaded, mesh, 4).loglikelihood(
    [request(*pairs[n]) for n in order]
  )
  for n, (nats, _) in zip(order, other, strict=True):
    assert nats == pytest.approx(found[n][0], rel=1e-5)


def test_a_context_past_the_row_loses_its_left(loaded, mesh):
  model = make(loaded, mesh)
  context, continuation = "some words " * 40, "äend"
  ((nats, _),) = model.loglikelihood([request(context, continuation)])
  assert model.truncated == 1
  kept = context.encode()[-(ROW - 1 - len(continuation.encode())) :]
  ((alone, _),) = make(loaded, mesh).loglikelihood(
    [request(kept.decode(), continuation)]
  )
  assert nats == pytest.approx(alone, rel=1e-6)


def test_a_continuation_past_the_row_is_scored_in_parts(loaded, mesh):
  model = make(loaded, mesh)
  text = ("some words, one after the other; " * 9).encode()
  context, continuation = text[:40], text[40:]
  ((nats, greedy),) = model.loglikelihood(
    [request(context.decode(), continuation.decode())]
  )
  assert (model.truncated, model.in_parts) == (1, 1)
  half, expected = (ROW - 1) // 2, []
  for at in range(40, len(text), half):
    end = min(at + half, len(text))
    expected.append((text[max(0, end - ROW + 1) : at], text[at:end]))
  assert b"".join(part for _, part in expected) == continuation
  scores = score.score(
    loaded.model.config, loaded.params, loaded.splitter, expected
  )
  assert nats == pytest.approx(sum(one.nats for one in scores), rel=1e-5)
  assert greedy == all(one.is_greedy for one in scores)


def test_rolling_bits_are_those_of_evaluate(loaded, mesh, tmp_path):
  texts = [*TEXTS, "many words " * 60]  # the last is longer than a row
  nats = make(loaded, mesh).loglikelihood_rolling([request(t) for t in texts])
  run, folder = tmp_path / "run", tmp_path / "texts"
  load.save_params(run, loaded.config, loaded.params)
  folder.mkdir()
  for i, text in enumerate(texts):
    (folder / f"{i}.txt").write_text(text)
  rows = []
  result = bits_per_byte.evaluate_workdir(
    str(run), str(folder), log=lambda _: 0, on_document=rows.append
  )
  total = sum(len(text.encode()) for text in texts)
  bits = -sum(nats) / math.log(2) / total
  assert result["bits_per_byte_without_eos"] == pytest.approx(bits, rel=1e-5)
  for one, row in zip(nats, rows, strict=True):
    bits = -one / math.log(2) / row["bytes"]
    assert row["bits_per_byte_without_eos"] == pytest.approx(bits, rel=1e-5)


def test_greedy_text_is_the_generators(loaded, mesh):
  prompts = [*TEXTS, ""]
  options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
  model = make(loaded, mesh, 16)
  found = model.generate_until([request(text, options) for text in prompts])
  expected = toy_generator.generator().generate(
    [text.encode() for text in prompts],
    max_bytes=20,
    settings=harness_settings(Writing(20)),
    stop=[b"\n"],
  )
  assert found == [one.data.decode(errors="replace") for one in expected]
  assert len(set(found)) > 1


@pytest.mark.parametrize(
  "options, expected",
  [
    ({}, Writing(1280)),
    ({"until": "é"}, Writing(1280, ("é".encode(),))),
    ({"until": ["", "a"], "max_gen_toks": 2}, Writing(10, (b"a",))),
    ({"do_sample": False, "temperature": 0.7}, Writing(1280)),
    ({"do_sample": True}, Writing(1280, temperature=1.0)),
    ({"temperature": 0.5, "top_p": 0.9}, Writing(1280, (), 0.5, 0.9)),
    ({"temperature": 0.0}, Writing(1280)),
  ],
)
def test_what_a_task_wants_is_understood(options, expected):
  assert Writing.from_request(options) == expected


def test_a_prompt_keeps_half_a_row(loaded, mesh):
  seen = []

  def write(prompts, writing):
    seen.extend((len(prompt), writing.max_bytes) for prompt in prompts)
    return [b""] * len(prompts)

  model = harness.HarnessModel(loaded, mesh, write)
  model.generate_until([request("x" * 500, {}), request("x", {})])
  assert seen == [(1, 63), (64, 63)] and model.truncated == 1


# ----- as a conversation ------------------------------------------------------

MESSAGES = [
  {"role": "system", "content": "brief"},
  {"role": "user", "content": "a é?"},
  {"role": "assistant", "content": "yes"},
  {"role": "user", "content": "b \udcfa\ud800?"},
]


@pytest.fixture
def talker(loaded):
  splitter = Splitter(loaded.model.config.rules, has_roles=True)
  return loaded._replace(splitter=splitter)


def test_a_choice_is_scored_as_an_answer_with_its_end(talker, mesh):
  model = HarnessModel(talker, mesh, None, 16, as_chat=True)
  context = model.apply_chat_template(MESSAGES)
  ((nats, _),) = model.loglikelihood([request(context, "no")])
  turns = [roles.turn_of(m["role"], m["content"]) for m in MESSAGES]
  prompt = roles.encode_prompt(turns)
  assert [b for b in prompt if b >= 0xF8] == [*b"\xf8\xf9\xfa\xfb\xf9\xfa"]
  (expected,) = score.score(
    talker.model.config, talker.params, talker.splitter, [(prompt, b"no\xfb")]
  )
  assert nats == pytest.approx(expected.nats, rel=1e-5)
  assert expected.num_bytes == 3


def test_an_answer_that_is_begun_stays_open(talker, mesh):
  model = HarnessModel(talker, mesh, None, 16, as_chat=True)
  begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
  context = model.apply_chat_template(begun, add_generation_prompt=False)
  assert context == model.apply_chat_template(MESSAGES) + "It is"


def test_an_answer_is_written_up_to_its_end(talker, mesh):
  asked = []

  def write(prompts, writing):
    asked.append((prompts, writing.stop))
    return [b"done" for _ in prompts]

  model = HarnessModel(talker, mesh, write, 16, as_chat=True)
  context = model.apply_chat_template(MESSAGES[:2])
  assert model.generate_until([request(context, {"until": ["\n"]})]) == ["done"]
  assert asked == [([b"\xf8brief\xf9a \xc3\xa9?\xfa"], (b"\n", b"\xfb"))]


def test_a_conversation_past_the_row_forgets_its_oldest_turns(talker, mesh):
  asked = []

  def write(prompts, writing):
    asked.extend(prompts)
    return [b"" for _ in prompts]

  model = HarnessModel(talker, mesh, write, 16, as_chat=True)
  long = [
    {"role": "user", "content": "a" * 60},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c" * 70 + "é"},
  ]
  options = {"max_gen_toks": 1}  # 5 bytes of the 127
  model.generate_until([request(model.apply_chat_template(long), options)])
  assert asked == [b"\xf9" + b"c" * 70 + b"\xc3\xa9\xfa"]
  assert model.truncated == 1


def test_a_model_without_roles_is_not_asked_as_a_user(loaded, mesh):
  with pytest.raises(ValueError, match="tuned on conversations"):
    HarnessModel(loaded, mesh, None, 16, as_chat=True)


def test_a_model_of_tokens_scores_as_one_of_bytes_does(mesh):
  tokens = toy_tokens.loaded()
  model = harness.HarnessModel(tokens, mesh, None, batch_size=4)
  pairs = [("the cat", " sat"), ("", "on the mat"), ("a", "a")]
  long = "the zebra crossed a road " * 4
  found = model.loglikelihood([request(*p) for p in [*pairs, (long, "mat")]])
  assert model.truncated == 1
  text = (long + "mat").encode()
  while len(tokens.tokenizer.encode(text)) > toy_tokens.LENGTH - 1:
    text = text[1:]
  cut = (text[:-3], b"mat")
  expected = score.score(
    tokens.model.config, tokens.params, tokens.splitter,
    [*((a.encode(), b.encode()) for a, b in pairs), cut],
    tokenizer=tokens.tokenizer,
  )  # fmt: skip
  for (nats, greedy), one in zip(found, expected, strict=True):
    assert nats == pytest.approx(one.nats, rel=1e-5)
    assert greedy == one.is_greedy
  model.loglikelihood([request("the", long)])
  assert (model.truncated, model.in_parts) == (2, 1)
  (nats,) = model.loglikelihood_rolling([request("the cat sat on the mat")])
  (one,) = score.score(
    tokens.model.config, tokens.params, tokens.splitter,
    [(b"", b"the cat sat on the mat")], tokenizer=tokens.tokenizer,
  )  # fmt: skip
  assert nats == pytest.approx(one.nats, rel=1e-5)
  # th|e and its like fill a row; cat|h|e is longer, and goes with a "t".
  full = "the" + " the" * (toy_tokens.LENGTH - 3)
  (one,) = model.loglikelihood([request("ca", full)])
  (other,) = model.loglikelihood([request("", full)])
  assert one == other and model.truncated == 3


def test_prompts_in_eight_scripts_are_those_of_score_and_generate(mesh):
  writer, tokens = toy_tokens.generator(), toy_tokens.loaded()
  tokens = tokens._replace(params=writer.params)

  def write(prompts, writing):
    settings = harness_settings(writing)
    found = writer.generate(
      prompts, max_bytes=writing.max_bytes, stop=writing.stop,
      settings=settings,
    )  # fmt: skip
    return [one.data for one in found]

  model = HarnessModel(tokens, mesh, write, batch_size=4)
  pairs = [(text[:3], text[3:]) for text in TEXTS]
  found = model.loglikelihood([request(*pair) for pair in pairs])
  expected = score.score(
    tokens.model.config, tokens.params, tokens.splitter,
    [(a.encode(), b.encode()) for a, b in pairs], tokenizer=tokens.tokenizer,
  )  # fmt: skip
  for (nats, greedy), one in zip(found, expected, strict=True):
    assert nats == pytest.approx(one.nats, rel=1e-5)
    assert greedy == one.is_greedy
  options = {"until": ["t "], "max_gen_toks": 4, "do_sample": False}
  # Of 31 tokens of a row a prompt keeps 16.
  texts = [*TEXTS, "the cat sat on " * 4]
  written = model.generate_until([request(text, options) for text in texts])
  for text, data in zip(texts, written, strict=True):
    kept = text.encode()
    while len(tokens.tokenizer.encode(kept)) > 16:
      kept = kept[1:]
    (one,) = write([kept], Writing(20, (b"t ",)))
    assert data == one.decode(errors="replace")
  assert len(set(written)) > 1


def test_a_conversation_in_tokens_is_cut_to_the_row(mesh):
  tokens = toy_tokens.loaded()
  tokens = tokens._replace(splitter=Splitter((), has_roles=True))
  asked = []

  def write(prompts, writing):
    asked.extend(prompts)
    return [b"" for _ in prompts]

  model = HarnessModel(tokens, mesh, write, 16, as_chat=True)
  context = model.apply_chat_template(
    [{"role": "user", "content": "the cat sat " * 20}]
  )
  model.generate_until([request(context, {})])
  model.loglikelihood([request(context, "the mat")])
  assert model.truncated == 2
  (prompt,) = asked
  assert prompt.startswith(b"\xf9") and prompt.endswith(b"at \xfa")
  assert len(tokens.tokenizer.encode(prompt)) == 16
