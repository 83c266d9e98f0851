"""Generation as a program uses it: rows, samples, limits, scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax.aunet import network, sharding
from aunet_jax.config import EOS, MeshConfig
from aunet_jax.evaluate import score
from aunet_jax.generate import utf8
from aunet_jax.generate.generator import Generator
from aunet_jax.generate.sampling import Sampling
from aunet_jax.splitting.splitter import Splitter
from tests import toy_tokens
from tests.toy_generator import generator, make_config, make_params

# ----- rows are independent -------------------------------------------------


def test_a_row_does_not_depend_on_its_batch():
  prompts = [b"one", b"two words and more", b"", b"\xff\xfe 3"]
  together = generator().generate(prompts, max_bytes=24, seed=[5, 6, 7, 8])
  for seed, prompt, row in zip([5, 6, 7, 8], prompts, together, strict=True):
    (alone,) = generator().generate([prompt], max_bytes=24, seed=seed)
    assert alone.data == row.data
    np.testing.assert_allclose(alone.logprobs, row.logprobs, atol=1e-4)
    np.testing.assert_array_equal(alone.levels, row.levels)


def test_samples_differ_and_are_numbered():
  four = generator().generate([b"a b"], max_bytes=24, seed=1, num_samples=4)
  two = generator().generate(
    [b"a b", b"a b"], max_bytes=24, seed=1, num_samples=2
  )
  assert len({row.data for row in four}) == 4
  assert [row.data for row in two] == [four[0].data, four[1].data] * 2


@pytest.mark.parametrize("schedule", ["any", "sync", "half", "pack"])
def test_every_schedule_writes_the_same(schedule):
  prompts = [b"one", b"two words", b"", b"4 4 4"]
  expected = generator().generate(prompts, max_bytes=24)
  stats = []
  rows = generator().generate(
    prompts, max_bytes=24, schedule=schedule, on_stats=stats.append
  )
  assert [row.data for row in rows] == [row.data for row in expected]
  (stats,) = stats
  assert stats.num_bytes == 4 * 24
  assert stats.needed[0] == 4 * 24
  assert stats.slots[1] >= stats.needed[1] > 0


def test_the_state_does_not_depend_on_the_turns_of_a_call():
  # Streaming makes calls of fewer turns; text and bytes stay the same.
  whole = generator().generate([b"x y"], max_bytes=80, seed=2)[0]
  pieces = []
  streamed = generator().generate(
    [b"x y"],
    max_bytes=80,
    seed=2,
    on_text=lambda row, text: pieces.append((row, text)),
  )[0]
  assert streamed.data == whole.data
  assert len(pieces) > 2
  assert "".join(text for _, text in pieces) == whole.text


def test_logprobs_are_the_scores_of_what_was_written():
  (row,) = generator().generate([b"abc de"], max_bytes=30, seed=4)
  config = make_config()
  scores = score.score(
    config,
    make_params(config),
    Splitter(config.rules),
    [(row.prompt, row.data), (b"", row.prompt), (b"", b"zz")],
    batch_size=2,
  )
  assert scores[0].nats == pytest.approx(float(row.logprobs.sum()), abs=1e-3)
  assert scores[1].nats == pytest.approx(
    float(row.prompt_logprobs.sum()), abs=1e-3
  )
  assert scores[0].num_bytes == 30


def test_greedy_is_the_most_likely_text():
  greedy = Sampling(temperature=0)
  (row,) = generator().generate([b"hi "], max_bytes=20, settings=greedy, seed=9)
  (same,) = generator().generate([b"hi "], max_bytes=20, settings=greedy)
  assert row.data == same.data
  config = make_config()
  (result,) = score.score(
    config,
    make_params(config),
    Splitter(config.rules),
    [(b"hi ", row.data)],
    batch_size=2,
    with_eos=row.reason == "eos",
  )
  assert result.is_greedy


@pytest.mark.slow
def test_int8_is_close_and_is_one_model():
  config = make_config()
  params = make_params(config)
  int8 = Generator(config, params, Splitter(config.rules), int8=True)
  (row,) = int8.generate([b"some text"], max_bytes=20, seed=3)
  # The parallel pass over the rounded parameters scores the same bytes alike.
  rounded, exact = (
    score.score(
      config, p, Splitter(config.rules), [(row.prompt, row.data)], batch_size=2
    )[0].nats
    for p in (int8.params, params)
  )
  assert rounded == pytest.approx(float(row.logprobs.sum()), abs=1e-3)
  assert rounded != exact
  assert rounded == pytest.approx(exact, rel=0.05)


def test_a_sharded_model_writes_the_same():
  config = make_config()
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  boxed = network.abstract_params(config)
  params = jax.tree.map(
    jax.device_put, make_params(config), sharding.tree_shardings(boxed, mesh)
  )
  sharded = Generator(config, params, Splitter(config.rules), mesh=mesh)
  prompts = [b"one", b"two words", b"", b"3"]
  expected = generator().generate(prompts, max_bytes=16)
  rows = sharded.generate(prompts, max_bytes=16)
  assert [row.data for row in rows] == [row.data for row in expected]
  spread = sharded.weights["deepest"][0]["ffn"]["gate_up"]
  assert not spread.sharding.is_fully_replicated


# ----- where a row ends ------------------------------------------------------


def test_a_stop_string_ends_the_row_and_is_cut_off():
  free = generator().generate([b"q"], max_bytes=60, seed=3)[0]
  stop = free.data[20:23]
  at = free.data.index(stop)
  (row,) = generator().generate([b"q"], max_bytes=60, seed=3, stop=[stop])
  assert row.reason == "stop"
  assert row.data == free.data[:at]
  assert len(row.logprobs) == len(row.levels) == at


def test_eos_ends_the_row():
  config = make_config()
  params = make_params(config)
  params["head"] = np.array(params["head"])
  params["head"][:, EOS] = 0
  params["head"] *= 0.0  # all bytes alike, so EOS comes by chance
  flat = Generator(config, params, Splitter(config.rules))
  rows = flat.generate([b"x"], max_bytes=100, seed=0, num_samples=64)
  ended = [row for row in rows if row.reason == "eos"]
  assert ended and all(len(row.data) < 100 for row in ended)
  assert all(len(row.data) == 100 for row in rows if row.reason == "length")


def test_ctrl_c_keeps_what_was_written():
  def interrupt(row, text):
    raise KeyboardInterrupt

  (row,) = generator().generate([b"x"], max_bytes=5000, on_text=interrupt)
  assert row.reason == "interrupted"
  assert 0 < len(row.data) < 5000


def test_every_part_of_choosing_works_together():
  """UTF-8, several stop strings and the most likely bytes, in one batch."""
  prompts = [b"one", "é".encode()[:1], "😀".encode()[:2], b"\xff"]
  pieces = [[] for _ in range(16)]

  def generate(stop, seed):
    return generator().generate(
      prompts,
      num_samples=4,
      max_bytes=40,
      seed=seed,
      stop=stop,
      settings=Sampling(temperature=2, utf8=True, no_repeat=4),
      top_logprobs=3,
      on_piece=lambda row, piece: pieces[row].append(piece),
    )

  # Stop strings that come: one inside a character, one of its last bytes.
  stop = [b"\x80", "ü".encode(), b"\x01\x02"]
  rows = generate(stop, np.int64(3))
  assert {row.reason for row in rows} >= {"stop", "length"}
  for row, shown in zip(rows, pieces, strict=True):
    open_bytes = utf8.unfinished(row.prompt)
    assert not any(text in row.data for text in stop)
    if row.data or not open_bytes:
      assert (open_bytes + row.data).decode() == row.text
    assert b"".join(piece.data for piece in shown) == row.data
    assert "".join(piece.text for piece in shown) == row.text
    assert len(row.logprobs) == len(row.top_logprobs) == len(row.data)
    for byte, logprob, top in zip(
      row.data, row.logprobs, row.top_logprobs, strict=True
    ):
      values = list(top.values())
      assert len(top) == 3 and values == sorted(values, reverse=True)
      assert top.get(byte, logprob) == pytest.approx(logprob, abs=1e-5)
      assert byte in top or logprob <= values[-1] + 1e-5
  # The parallel pass over what was written finds the same bytes likely.
  whole = rows[0].prompt + rows[0].data
  (again,) = generator().generate([whole], max_bytes=1, top_logprobs=3)
  for ours, theirs in zip(
    rows[0].prompt_top_logprobs + rows[0].top_logprobs,
    again.prompt_top_logprobs,
    strict=True,
  ):
    assert list(ours) == list(theirs)
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], atol=1e-4)


def test_numbers_of_numpy_are_numbers():
  plain = generator().generate([b"x", b"y"], max_bytes=9, seed=[2, 3])
  for seed in (np.array([2, 3]), (np.uint8(2), np.int64(3))):
    rows = generator().generate([b"x", b"y"], max_bytes=np.int32(9), seed=seed)
    assert [row.data for row in rows] == [row.data for row in plain]
  for seed in (np.int64(2), np.array(2), np.uint32(2), jnp.int32(2)):
    (row,) = generator().generate(
      [b"x"], max_bytes=9, seed=seed, num_samples=np.int64(1)
    )
    assert row.data == plain[0].data


# ----- models of tokens -----------------------------------------------------

OF_TOKENS = [b"the cat", b"", "ät".encode() + b"\xff", b"that mat, the cat sat"]


def test_greedy_tokens_are_those_of_the_forward_pass():
  writer, tokenizer = toy_tokens.generator(), toy_tokens.tokenizer()
  rows = writer.generate(
    OF_TOKENS, max_bytes=40, settings=Sampling(temperature=0)
  )
  L = toy_tokens.LENGTH
  apply = jax.jit(network.AUNet(writer.config).apply)
  for prompt, row in zip(OF_TOKENS, rows, strict=True):
    ids = tokenizer.encode(prompt).tolist()
    start, data, nats = len(ids), b"", []
    while len(data) < 40 and len(ids) < L - 1:
      padded = np.array([[tokenizer.bos, *ids] + [0] * (L - 1 - len(ids))])
      levels, real = np.zeros((2, 1, L), np.int32)
      real[:, : len(ids) + 1] = 1
      logits = apply({"params": writer.params}, padded, levels, real)
      logprobs = np.array(jax.nn.log_softmax(logits[0, len(ids)]))
      best = int(np.delete(logprobs, tokenizer.bos).argmax())
      best += best >= tokenizer.bos
      if best == tokenizer.eos:
        break
      ids.append(best)
      nats.append(logprobs[best])
      data = tokenizer.decode(ids[start:])
    assert row.data == data[:40] and len(row.logprobs) == len(row.data)
    np.testing.assert_allclose(row.logprobs[row.logprobs < 0], nats, rtol=1e-4)
    assert len(nats) < len(row.data)  # tokens of several bytes are among them
  scores = score.score(
    writer.config, writer.params, writer.splitter,
    [(b"", prompt) for prompt in OF_TOKENS], tokenizer=tokenizer,
  )  # fmt: skip
  for row, one in zip(rows, scores, strict=True):
    assert len(row.prompt_logprobs) == len(row.prompt) == len(row.prompt_levels)
    assert one.nats == pytest.approx(row.prompt_logprobs.sum(), abs=1e-4)


def test_tokens_of_a_row_do_not_depend_on_its_batch():
  writer, hot = toy_tokens.generator(), Sampling(temperature=1.5, top_p=0.9)
  together = writer.generate(
    OF_TOKENS, max_bytes=24, seed=[5, 6, 7, 8], settings=hot
  )
  assert len({row.data for row in together}) == 4
  for seed, row in zip([5, 6, 7, 8], together, strict=True):
    pieces = []
    (alone,) = writer.generate(
      [row.prompt], max_bytes=24, seed=seed, settings=hot,
      on_text=lambda _, text, pieces=pieces: pieces.append(text),
    )  # fmt: skip
    assert alone.data == row.data and alone.reason == row.reason
    np.testing.assert_allclose(alone.logprobs, row.logprobs, atol=1e-4)
    # An open character of the prompt is the text's; "\xff" is none.
    assert "".join(pieces) == row.data.decode(errors="replace")


def test_a_text_of_tokens_ends_inside_one_where_it_has_to():
  writer = toy_tokens.generator()
  (whole,) = writer.generate([b"the"], max_bytes=60, seed=3)
  inside = np.flatnonzero((whole.logprobs == 0) & (np.arange(60) > 4))[0]
  (cut,) = writer.generate([b"the"], max_bytes=inside + 1, seed=3)
  assert cut.data == whole.data[: inside + 1] and cut.reason == "length"
  stop = whole.data[inside - 1 : inside + 1]  # its end is inside a token
  (stopped,) = writer.generate([b"the"], max_bytes=60, seed=3, stop=[stop])
  assert stopped.data == whole.data[: whole.data.index(stop)]
  assert stopped.reason == "stop"


def test_what_tokens_cannot_do_is_refused():
  writer = toy_tokens.generator()
  for change, message in (
    (dict(settings=Sampling(utf8=True)), "utf8 is of bytes"),
    (dict(top_logprobs=2), "top_logprobs is of bytes"),
    (dict(drafts=True), "drafts need a model of bytes"),
    (dict(levels="head"), "level_loss_weight=0"),
  ):
    with pytest.raises(ValueError, match=message):
      writer.generate([b"the"], max_bytes=4, **change)
  with pytest.raises(ValueError, match="40 tokens is longer than the 30"):
    writer.generate([b"z" * 40], max_bytes=4)
  (row,) = writer.generate([b"z" * 30], max_bytes=400)
  assert row.reason in ("length", "eos") and len(row.data) < 8  # one token
  (row,) = writer.generate([b"z" * 40], max_bytes=4, max_positions=64)
  assert len(row.data) == 4 or row.reason == "eos"


# ----- requests that cannot be met ------------------------------------------


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(prompts=[]), "no prompt"),
    (dict(prompts=["text"]), "bytes"),
    (dict(max_bytes=0), "max_bytes=0"),
    (dict(num_samples=0), "num_samples=0"),
    (dict(num_samples=10**9), "num_samples=1000000000"),
    (dict(prompts=[b"x"] * 2**17), "num_samples=1"),
    (dict(seed=[1, 2]), "2 seeds for 1"),
    (dict(seed=-1), "seed=-1"),
    (dict(seed=2**32), "seed=4294967296"),
    (dict(seed=1.5), "seed must be an integer, not a float"),
    (dict(seed="1"), "seed must be an integer, not a str"),
    (dict(seed=[[1]]), "seed must be an integer, not a list"),
    (dict(max_bytes=2.5), "max_bytes must be an integer"),
    (dict(max_bytes=10**12), "max_bytes=1000000000000 is more"),
    (dict(num_samples=1.0), "num_samples must be an integer"),
    (dict(max_positions=0), "max_positions=0"),
    (dict(top_logprobs=21), "top_logprobs=21"),
    (dict(prompts=b"text"), "bytes"),
    (dict(stop=b"ab"), "list"),
    (dict(stop=["ab"]), "is a str"),
    (dict(stop=[b""]), "stop string"),
    (dict(schedule="fast"), "schedule='fast'"),
    (dict(levels="rules"), "levels='rules'"),
    (dict(levels="head"), "level_loss_weight=0"),
  ],
)
def test_requests_out_of_range_are_refused(change, message):
  arguments = dict(prompts=[b"x"], max_bytes=4) | change
  with pytest.raises(ValueError, match=message):
    generator().generate(arguments.pop("prompts"), **arguments)


def test_a_stage_that_sees_everything_limits_the_length():
  assert make_config().position_limit is None
  config = make_config(window=None)
  assert config.position_limit == 128
  limited = Generator(config, make_params(config), Splitter(config.rules))
  with pytest.raises(ValueError, match="longer than the 127"):
    limited.generate([b"x" * 200], max_bytes=4)
  with pytest.raises(ValueError, match="max_bytes to at most 27"):
    limited.generate([b"x" * 100], max_bytes=50)
  (row,) = limited.generate([b"x" * 100], max_bytes=50, max_positions=200)
  assert len(row.data) == 50 or row.reason == "eos"
  with pytest.raises(ValueError, match="cut the context"):
    score.score(
      config, limited.params, Splitter(config.rules), [(b"x" * 200, b"y")]
    )
