"""Choosing a byte: frequencies, cut-offs, repetition, UTF-8, stop strings."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aunet_jax.config import BOS, EOS
from aunet_jax.generate import sampling, utf8
from aunet_jax.generate.sampling import Sampling


def draw(logits_V, settings, num=1200):
  """How often each byte is drawn, from `num` rows that differ in sample."""
  prompts = [b""] * num
  choice = sampling.make_choice(settings, prompts, [0] * num, range(num))
  logits_CV = jnp.tile(jnp.asarray(logits_V)[None], (num, 1))
  zero_C = jnp.zeros((num,), jnp.int32)
  rows_C = jnp.arange(num, dtype=jnp.int32)
  _, byte_C, logprob_C, _ = jax.jit(sampling.choose)(
    choice, logits_CV, zero_C, rows_C
  )
  return np.bincount(np.asarray(byte_C), minlength=258), np.asarray(logprob_C)


LOGITS = np.full(258, -np.inf, np.float32)
LOGITS[[65, 66, 67, 68]] = np.log([0.5, 0.25, 0.15, 0.1])


@pytest.mark.parametrize(
  "settings, expected",
  [
    (Sampling(), [0.5, 0.25, 0.15, 0.1]),
    (Sampling(temperature=0.5), np.array([25, 6.25, 2.25, 1]) / 34.5),
    (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
    (Sampling(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
    (Sampling(top_p=0.01), [1, 0, 0, 0]),
    (Sampling(min_p=0.25), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
    (Sampling(top_k=3, min_p=0.4), [2 / 3, 1 / 3, 0, 0]),
    (Sampling(temperature=0), [1, 0, 0, 0]),
  ],
)
def test_bytes_come_as_often_as_they_should(settings, expected):
  counts, logprobs = draw(LOGITS, settings)
  # Five standard deviations of 1200 draws are 0.072; nothing draws a 0.
  np.testing.assert_allclose(counts[65:69] / 1200, expected, atol=0.072)
  assert counts[65:69].sum() == 1200
  assert not counts[65:69][np.array(expected) == 0].any()
  if settings.temperature == 0:
    np.testing.assert_allclose(logprobs, np.log(0.5), atol=1e-5)


def test_bos_is_never_drawn():
  logits = np.zeros(258, np.float32)
  logits[BOS] = 50
  counts, _ = draw(logits, Sampling())
  assert counts[BOS] == 0
  counts, _ = draw(logits, Sampling(temperature=0), num=1)
  assert counts[BOS] == 0


@given(seed=st.integers(0, 2**16), ties=st.booleans())
@settings(max_examples=20, deadline=None)
def test_many_ids_are_cut_off_as_few_are(seed, ties):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(3, 40)).astype(np.float32)
  if ties:
    logits = np.round(logits)
  logits[:, rng.integers(0, 40, 5)] = -np.inf
  chosen = sampling.make_choice(
    Sampling(
      top_k=int(rng.integers(1, 45)), top_p=rng.uniform(0.1, 1),
      min_p=rng.uniform(0, 0.2),
    ),
    [b""], [0], [0],
  ).settings  # fmt: skip
  compared = sampling._passes_cutoffs(logits, chosen)
  with mock.patch.object(sampling, "FEW", 0):
    ranked = sampling._passes_cutoffs(logits, chosen)
  np.testing.assert_array_equal(compared, ranked)


@pytest.mark.parametrize("length", [2, 3, 5])
@given(
  prompt=st.text("ab", max_size=40).map(str.encode),
  wishes=st.text("ab", min_size=60, max_size=60).map(str.encode),
)
@settings(max_examples=10, deadline=None)
def test_no_run_of_bytes_is_written_twice(length, prompt, wishes):
  settings = Sampling(temperature=0, no_repeat=length)
  choice = sampling.make_choice(settings, [prompt], [0], [0])
  text = bytearray(prompt)
  choose = jit_choose()
  for count, wish in enumerate(wishes):
    logits = np.zeros((1, 258), np.float32)
    logits[0] = -np.arange(258) / 256  # an order without ties; BOS, EOS last
    logits[0, wish] = 5
    choice, byte_C, _, _ = choose(
      choice, logits, np.array([count], np.int32), np.array([0], np.int32)
    )
    seen = {bytes(text[i : i + length]) for i in range(len(text) - length + 1)}
    tail = bytes(text[-(length - 1) :]) if len(text) >= length - 1 else None
    repeats = tail is not None and tail + bytes([wish]) in seen
    assert (int(byte_C[0]) == wish) != repeats
    text.append(int(byte_C[0]))


@functools.cache
def jit_choose():
  return jax.jit(sampling.choose)


def write(settings, prompt, logits_of, limit, seed=0, stop=()):
  """What a model writes whose logits depend on the byte before alone.

  Args: logits_of: float32 (258, 258), by the byte before; BOS before any.
  """
  choice = sampling.make_choice(
    settings, [prompt], [seed], [0], stop, max_bytes=limit
  )
  text, last = [], prompt[-1] if prompt else BOS
  for count in range(limit):
    choice, byte_C, _, stop_C = jit_choose()(
      choice,
      logits_of[last][None],
      np.array([count], np.int32),
      np.array([0], np.int32),
    )
    last = int(byte_C[0])
    text.append(last)
    if stop_C[0]:
      break
  return text


def favour(rng, *texts, strength=6.0):
  """Logits under which mostly bytes come that follow each other in `texts`."""
  logits = rng.normal(size=(258, 258)).astype(np.float32)
  for text in texts:
    for before, byte in zip([BOS, *text], [*text, EOS], strict=True):
      logits[before, byte] += strength
  return logits


def follow(settings, prompt, wishes):
  """What is chosen where each wish is by far the most likely byte."""
  choice = sampling.make_choice(settings, [prompt], [0], [0])
  text = bytearray()
  for count, wish in enumerate(wishes):
    choice, byte_C, _, _ = jit_choose()(
      choice,
      np.eye(1, 258, wish, dtype=np.float32),
      np.array([count], np.int32),
      np.array([0], np.int32),
    )
    text.append(int(byte_C[0]))
  return bytes(text)


def test_a_run_is_no_repetition_once_the_history_has_forgotten_it():
  settings = Sampling(temperature=0, no_repeat=9)
  for period in (sampling.HISTORY - 1, sampling.HISTORY):
    block = np.random.default_rng(0).integers(256, size=period)
    block = bytes(block.tolist())
    text = follow(settings, 3 * block, block[:40])
    assert (text == block[:40]) == (period == sampling.HISTORY)
    assert (text[0] == block[0]) == (period == sampling.HISTORY)


def test_a_text_that_grows_past_the_history_keeps_its_newest_bytes():
  H = sampling.HISTORY
  block = bytes(np.random.default_rng(0).integers(256, size=H + 20).tolist())
  settings = Sampling(temperature=0, no_repeat=9)
  assert follow(settings, block[:-20], block[-20:]) == block[-20:]
  # Written over the oldest bytes, the newest are found there.
  wishes = block[-40:] + block[-20:]
  text = follow(settings, block[:-40], wishes)
  assert text[:48] == wishes[:48] and text[48] != wishes[48]


# ----- UTF-8 ----------------------------------------------------------------

MULTILINGUAL = ["aé中😀 ", "Ελλάδα \n", "नमस्ते", "\ud7ff\ue000\U0010ffff"]


@given(
  seed=st.integers(0, 2**32 - 1),
  text=st.sampled_from(MULTILINGUAL),
  open_bytes=st.integers(0, 4),
  limit=st.integers(4, 24),
  settings=st.sampled_from(
    [
      Sampling(),
      Sampling(temperature=0),
      Sampling(temperature=3, top_k=2),
      Sampling(top_p=0.3, min_p=0.1),
      Sampling(temperature=2, no_repeat=2),
    ]
  ),
)
@settings(max_examples=40, deadline=None)
def test_text_held_to_utf8_is_valid_and_otherwise_the_same(
  seed, text, open_bytes, limit, settings
):
  prompt = text.encode()[:open_bytes]
  logits_of = favour(np.random.default_rng(seed), text.encode(), strength=7.0)
  held, free = (
    write(one, prompt, logits_of, limit, seed)
    for one in (dataclasses.replace(settings, utf8=True), settings)
  )
  written = bytes(byte for byte in held if byte != EOS)
  (prompt + written).decode()  # strictly
  with contextlib.suppress(UnicodeDecodeError):
    (prompt + bytes(byte for byte in free if byte != EOS)).decode()
    assert held == free


def test_eos_ends_a_text_between_characters_alone():
  for prompt, may_end in ((b"", True), (b"a\xff", True), (b"\xe4", False)):
    state_C = jnp.array([utf8.state_after(prompt)])
    valid_CV = sampling._utf8_valid(state_C, jnp.array([9]), 258)
    assert bool(valid_CV[0, EOS]) == may_end
    assert not valid_CV[0, BOS]


@pytest.mark.parametrize(
  "settings, expected",
  [
    (Sampling(utf8=True), {65, 66}),
    # Cut first: 66 is no more among the likely ones than without UTF-8.
    (Sampling(top_k=2, utf8=True), {65}),
    (Sampling(top_p=0.7, utf8=True), {65}),
    # Where only wrong bytes pass, the best of the others do.
    (Sampling(top_k=1, utf8=True), {65}),
    (Sampling(top_p=0.1, utf8=True), {65}),
  ],
)
def test_cut_offs_are_those_of_the_model_where_a_valid_byte_passes(
  settings, expected
):
  logits = np.full(258, -np.inf, np.float32)
  logits[[0x80, 65, 66]] = np.log([0.4, 0.35, 0.25])
  counts, _ = draw(logits, settings, num=200)
  assert set(np.flatnonzero(counts).tolist()) == expected


def test_a_character_is_begun_only_where_it_can_be_finished():
  for lead, size in ((b"\xc3", 2), (b"\xe4", 3), (b"\xf0", 4)):
    logits_of = np.zeros((258, 258), np.float32)
    logits_of[:, lead[0]] = 9
    settings = Sampling(temperature=0, utf8=True)
    for limit in range(1, 9):
      written = bytes(write(settings, b"", logits_of, limit))
      assert len(written) == limit and written.decode()
      assert written.count(lead) == limit // size


def test_a_character_is_finished_even_by_a_byte_that_repeats():
  # All 64 bytes that may follow C3 have followed it.
  prompt = b"".join(b"\xc3" + bytes([byte]) for byte in range(0x80, 0xC0))
  settings = Sampling(temperature=0, no_repeat=2, utf8=True)
  logits_of = np.zeros((258, 258), np.float32)
  logits_of[0xC3, 0x90] = 5
  assert write(settings, prompt + b"\xc3", logits_of, 1) == [0x90]


def test_valid_bytes_of_no_probability_are_drawn_where_no_other_may():
  logits_of = np.full((258, 258), -np.inf, np.float32)
  logits_of[:, 65] = 0
  for cold in (
    Sampling(temperature=0, utf8=True),
    Sampling(utf8=True),
    Sampling(top_k=1, top_p=0.5, min_p=0.5, temperature=1e-20, utf8=True),
  ):
    first, *rest = write(cold, b"\xc3", logits_of, 3)
    assert 0x80 <= first < 0xC0 and rest == [65, 65]


def test_a_character_that_cannot_be_finished_is_refused():
  with pytest.raises(ValueError, match="lacks 2 bytes; max_bytes=1 cannot"):
    sampling.make_choice(Sampling(utf8=True), [b"\xe4"], [0], [0], max_bytes=1)


# ----- stop strings and most likely bytes -----------------------------------


@given(
  data=st.text("ab", min_size=1, max_size=12).map(str.encode),
  stop=st.lists(
    st.text("ab", min_size=1, max_size=4).map(str.encode), max_size=6
  ),
)
@settings(max_examples=30, deadline=None)
def test_a_row_stops_at_the_first_byte_that_completes_a_stop_string(data, stop):
  choice = sampling.make_choice(
    Sampling(temperature=0), [b"ba"], [0], [0], stop
  )
  for count, byte in enumerate(data):
    choice, byte_C, _, stop_C = jit_choose()(
      choice,
      np.eye(1, 258, byte, dtype=np.float32),
      np.array([count], np.int32),
      np.array([0], np.int32),
    )
    assert int(byte_C[0]) == byte
    assert bool(stop_C[0]) == data[: count + 1].endswith(tuple(stop))


def test_other_stop_strings_compile_nothing():
  jit = jax.jit(lambda *arguments: sampling.choose(*arguments))
  for stop in ([b"a"], [b"abc", b"\n\n"], [b"x" * 16] * 4):
    choice = sampling.make_choice(Sampling(), [b""], [0], [0], stop)
    zero = np.array([0], np.int32)
    jit(choice, np.zeros((1, 258), np.float32), zero, zero)
  assert jit._cache_size() == 1


def test_the_most_likely_bytes_are_kept_for_the_newest_places():
  rng = np.random.default_rng(0)
  choice = sampling.make_choice(
    Sampling(), [b"", b""], [0, 1], [0, 0], num_top=3, recent=4
  )
  logits = rng.normal(size=(6, 2, 258)).astype(np.float32)
  for count in range(6):
    choice, _, _, _ = jit_choose()(
      choice,
      logits[count],
      np.array([count, count], np.int32),
      np.array([0, 1], np.int32),
    )
  expected = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
  for count in range(2, 6):
    order = np.argsort(-logits[count])[:, :3]
    top = choice.memory.top
    np.testing.assert_array_equal(top.byte_BTK[:, count % 4], order)
    np.testing.assert_allclose(
      top.logprob_BTK[:, count % 4],
      np.take_along_axis(expected[count], order, axis=1),
      atol=1e-5,
    )


# ----- settings that cannot be ----------------------------------------------


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(temperature=-1), "temperature=-1"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_k=0), "top_k=0"),
    (dict(top_p=0), "top_p=0"),
    (dict(top_p=1.5), "top_p=1.5"),
    (dict(min_p=-0.1), "min_p=-0.1"),
    (dict(no_repeat=1), "no_repeat=1"),
    (dict(temperature=float("inf")), "temperature=inf"),
    (dict(temperature=10**400), "temperature=inf"),
    (dict(temperature=-(10**400)), "temperature=-inf"),
    (dict(temperature=1e-45), "temperature=1e-45"),
    (dict(temperature="0.5"), "temperature='0.5' must be a number"),
    (dict(temperature=None), "temperature=None must be a number"),
    (dict(top_p=float("nan")), "top_p=nan"),
    (dict(top_p=[0.5]), "top_p=.* must be a number"),
    (dict(min_p=10**400), "min_p=inf"),
    (dict(top_k=2.0), "top_k must be an integer, not a float"),
    (dict(no_repeat="8"), "no_repeat must be an integer, not a str"),
  ],
)
def test_settings_out_of_range_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**change)


@pytest.mark.parametrize("kind", [int, np.int8, np.int64, np.uint32, jnp.int32])
def test_integers_of_numpy_are_integers(kind):
  settings = Sampling(top_k=kind(7), no_repeat=kind(5))
  choice = sampling.make_choice(settings, [b"x"], [kind(3)], [kind(0)])
  assert int(choice.settings.top_k) == 7
  assert sampling.whole_number("seed", kind(3)) == 3


@pytest.mark.parametrize("kind", [float, np.float16, np.float64, jnp.float32])
def test_real_numbers_of_numpy_are_real_numbers(kind):
  settings = Sampling(temperature=kind(0.5), top_p=kind(0.5), min_p=kind(0.5))
  choice = sampling.make_choice(settings, [b"x"], [3], [0])
  assert float(choice.settings.temperature) == 0.5


def test_more_than_the_vocabulary_is_all_of_it():
  counts, _ = draw(LOGITS, Sampling(top_k=10**12))
  expected, _ = draw(LOGITS, Sampling())
  np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("temperature", [1e-30, 1e-20, 1e30])
def test_extreme_temperatures_are_the_limits_they_approach(temperature):
  counts, _ = draw(LOGITS, Sampling(temperature=temperature), num=400)
  if temperature < 1:
    assert counts[65] == 400
  else:
    assert (counts[65:69] > 60).all() and counts.sum() == counts[65:69].sum()


@pytest.mark.parametrize(
  "stop, message",
  [
    (b"ab", "must be a list"),
    ("ab", "must be a list"),
    (["ab"], "is a str"),
    ([97], "is a int"),
    ([b""], "is empty"),
    ([b"x" * 1025], "1025 bytes; at most 1024"),
    ([b"x"] * 65, "65 stop strings"),
  ],
)
def test_what_is_no_stop_string_is_refused(stop, message):
  with pytest.raises(ValueError, match=message):
    sampling.make_choice(Sampling(), [b""], [0], [0], stop)
