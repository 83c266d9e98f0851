"""The splitting function: its laws and its drivers, for every kind of rule.

The same question is answered in three ways that must agree: by the tables in
their two drivers, by `plain_splitter`, and in test_rules.py by the meaning of
each rule written down a second time.
"""

import pathlib
import threading
import zipfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from plain_splitter import walk

from aunet_jax.config import BOS, EOS
from aunet_jax.splitting import rules, unicode_table
from aunet_jax.splitting.splitter import Splitter
from benchmarks import split_reference

HERE = pathlib.Path(__file__).parents[1]
SHARED = HERE.parents[1] / "shared"


def every_third_letter() -> rules.Rule:
  """A user's rule that counts characters of one class."""

  def step(count, character):
    if character not in unicode_table.LETTERS:
      return count, False
    return (count + 1) % 3, count == 2

  return rules.Rule(0, step)


def alphabet() -> rules.Rule:
  """A rule that tells too many characters apart."""
  return rules.Rule(
    0, lambda state, character: (0, False), apart="abcdefghijklmnopqrstu"
  )


def lists() -> rules.Rule:
  """A user's rule that tells characters apart, of one byte and of three."""

  def step(inside, character):
    if character == "(":
      return True, True
    return inside and character != ")", inside and character in {",", "、"}

  return rules.Rule(False, step, apart="(),、")


TOKENS = f"tokens@{HERE / 'golden' / 'vocabulary.json'}"
ENTROPY = [
  f"entropy@{HERE / 'golden' / name}"
  for name in ("entropy_threshold.npz", "entropy_rise.npz")
]
SPLITTERS = {
  names: Splitter(names.split(",") if names else [])
  for names in (
    "",
    "word@1",
    "word@3",
    "word@1,word@2,word@4",
    "pretok",
    "punct",
    "anyscript@1",
    "anyscript@1,anyscript@2,anyscript@4",
    "bytes",
    "stride@4,stride@16",
    "stride@3,word@1",
    "pretok,punct,word@2,stride@7",
    f"{__name__}:every_third_letter,word@1",
    TOKENS,
    f"word@1,{TOKENS},stride@8,{TOKENS}",
    ENTROPY[0],
    f"{ENTROPY[1]},word@2,{TOKENS}",
    f"{__name__}:lists,anyscript@1,{__name__}:lists",
  )
}
every_splitter = pytest.mark.parametrize(
  "splitter", SPLITTERS.values(), ids=SPLITTERS
)
# Compilation makes first examples slow; time is not what these tests are about.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Few symbols, so that the edge cases meet; then all there is.
TEXT = st.one_of(
  st.text(" \n\ta1²., é中ก\u0301\u2028👍(、)", max_size=24).map(str.encode),
  st.text(" thexon.1é", max_size=24).map(str.encode),
  st.text(max_size=20).map(lambda text: text.encode(errors="surrogatepass")),
)
PIECES = st.sampled_from(
  [b"a", b" ", b"\n", b"1", b".", "é".encode(), "中".encode(), b"\x80", b"\xc3"]
  + [b"(", b",", "、".encode(), b")", b"\xe3\x80"]
  + [b"\xe4\xb8", b"\xf0\x9f\x91", b"\xe0\x80", b"\xed\xa0", b"\xf4\x90"]
  + [b"\xc0\xaf", b"\xff", "👍".encode(), "กิ".encode()]
)
DATA = st.one_of(
  TEXT,
  st.lists(PIECES, max_size=10).map(b"".join),
  st.binary(max_size=24),
)


def scripts() -> list[bytes]:
  """Starts of the Universal Declaration in as many scripts as there are."""
  path = SHARED / "data" / "multilingual" / "udhr2.zip"
  if not path.exists():
    pytest.skip(f"no {path.name}: the shared data is not on this machine")
  with zipfile.ZipFile(path) as archive:
    names = [n for n in sorted(archive.namelist()) if n.endswith(".txt")]
    assert len(names) > 300
    return [archive.read(name)[:600] for name in names]


# ----- the laws -------------------------------------------------------------


def assert_later_text_moves_no_level(levels, data: bytes) -> None:
  whole = levels(data)
  assert len(whole) == len(data)
  for cut in range(len(data)):
    np.testing.assert_array_equal(whole[:cut], levels(data[:cut]))


@every_splitter
@hypothesis.given(data=DATA)
def test_later_text_moves_no_level(splitter, data):
  assert_later_text_moves_no_level(splitter.levels, data)


@pytest.mark.parametrize("rule", ["word@1", "word@2", "pretok", "punct"])
def test_the_law_catches_a_rule_that_looks_ahead(rule):
  @hypothesis.settings(database=None)
  @hypothesis.given(text=st.text(" \n.a1", max_size=12))
  def law(text):
    assert_later_text_moves_no_level(
      lambda data: split_reference.whole_text_levels(data.decode(), [rule]),
      text.encode(),
    )

  with pytest.raises(AssertionError):
    law()


@every_splitter
@hypothesis.given(data=DATA, cuts=st.lists(st.integers(0, 24), max_size=3))
def test_scanning_in_chunks_is_scanning_at_once(splitter, data, cuts):
  whole, last = splitter.scan(data, splitter.start)
  state, parts, edges = splitter.start, [], [0, *sorted(cuts), len(data)]
  for start, end in zip(edges, edges[1:], strict=False):
    levels, state = splitter.scan(data[start:end], state)
    parts.append(levels)
  np.testing.assert_array_equal(np.concatenate(parts)[: len(data)], whole)
  if max(cuts, default=0) <= len(data):
    np.testing.assert_array_equal(state, last)


def run_steps(splitter: Splitter, tokens_BL: np.ndarray):
  """The jit driver over rows of tokens: levels and the last states."""

  @jax.jit
  def run(tokens_BL):
    def body(state_BK, byte_B):
      return splitter.step(state_BK, byte_B)

    first = splitter.init_state(tokens_BL.shape[0])
    last, levels_LB = jax.lax.scan(body, first, tokens_BL.T)
    return levels_LB.T, last

  return run(jnp.asarray(tokens_BL, jnp.int32))


@pytest.mark.parametrize(
  "splitter",
  [*SPLITTERS.values(), Splitter(["word@1", "word@2"], has_roles=True)],
  ids=[*SPLITTERS, "roles"],
)
def test_steps_in_jit_agree_with_the_host(splitter):
  rng = np.random.default_rng(0)
  symbols = [" ", "\n", "a", "1", ".", "é", "中", "ก", "👍", "\u0301", "\t"]
  rows = []
  for _ in range(64):
    text = "".join(rng.choice(symbols, 64)).encode()
    row = np.frombuffer(text[:64], np.uint8).copy()
    broken = rng.random(64) < rng.choice([0.0, 0.1, 1.0], p=[0.5, 0.4, 0.1])
    row[broken] = rng.integers(0, 256, broken.sum())
    rows.append(row)
  tokens_BL = np.array(rows)
  levels_BL, states_BK = run_steps(splitter, tokens_BL)
  assert levels_BL.dtype == jnp.int32 and states_BK.dtype == jnp.int32
  for row, levels, state in zip(rows, levels_BL, states_BK, strict=True):
    expected, last = splitter.scan(row, splitter.start)
    np.testing.assert_array_equal(levels, expected)
    np.testing.assert_array_equal(state, last)


@every_splitter
@hypothesis.settings(max_examples=30)
@hypothesis.given(data=DATA)
def test_tables_agree_with_the_rules_themselves(splitter, data):
  np.testing.assert_array_equal(
    splitter.levels(data), walk(splitter.rules, data)
  )


# ----- any byte string ------------------------------------------------------

rng = np.random.default_rng(1)
ODD = {
  "empty": b"",
  "one byte": b"a",
  "one broken byte": b"\xff",
  "end of a character": b"\x80\x80\x80\x80",
  "start of a character": "👍".encode()[:3],
  "every byte": rng.permutation(256).astype(np.uint8).tobytes(),
  "overlong": b"a\xc0\xaf \xe0\x80\x80 \xf0\x80\x80\x80 b",
  "surrogates": b"\xed\xa0\x80\xed\xb0\x80 a",
  "past U+10FFFF": b"\xf4\x90\x80\x80 \xf5\x80 a",
  "one letter": b"a" * 100_000,
  "white": b" " * 10_000 + b"\n" * 10_000,
  "nul": b"\0" * 1000,
}


@every_splitter
@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_any_bytes_work(splitter, data):
  levels, state = splitter.scan(data, splitter.start)
  assert levels.dtype == np.int8 and levels.shape == (len(data),)
  assert state.dtype == np.int32 and state.shape == splitter.start.shape
  assert not len(data) or 0 <= levels.min() <= levels.max()
  assert not len(data) or levels.max() <= splitter.num_levels
  np.testing.assert_array_equal(levels[:300], walk(splitter.rules, data[:300]))


@pytest.mark.slow
def test_a_hundred_megabytes_without_a_space():
  levels = SPLITTERS["word@1,word@2,word@4"].levels(b"a" * 100_000_000)
  assert not levels.any()


@every_splitter
def test_many_scripts(splitter):
  for data in scripts()[:: 10 if splitter.num_levels else 40]:
    levels = splitter.levels(data)
    np.testing.assert_array_equal(
      levels[:200], walk(splitter.rules, data[:200])
    )
    for cut in (1, 57, 333, len(data) - 1):
      np.testing.assert_array_equal(splitter.levels(data[:cut]), levels[:cut])


def test_arrays_memory_maps_and_read_only_views(tmp_path):
  splitter, data = SPLITTERS["word@1"], b"one two, three 12\n" * 50
  expected = splitter.levels(data)
  (tmp_path / "text").write_bytes(data)
  array = np.frombuffer(data, np.uint8)
  for given_data in (
    bytearray(data),
    memoryview(data),
    array,
    array.copy(),
    np.repeat(array, 2)[::2],
    np.memmap(tmp_path / "text", np.uint8, "r"),
  ):
    np.testing.assert_array_equal(splitter.levels(given_data), expected)
  assert array.copy().flags.writeable  # the caller's array stays writeable


@pytest.mark.parametrize(
  "data", [np.zeros(3, np.int32), np.zeros((2, 2), np.uint8), "text"]
)
def test_what_is_not_bytes_is_refused(data):
  with pytest.raises(ValueError, match="a splitter reads bytes"):
    SPLITTERS["word@1"].levels(data)


@every_splitter
@hypothesis.settings(max_examples=30)
@hypothesis.given(data=st.data())
def test_a_state_that_no_text_leads_to_is_refused(splitter, data):
  """Or it is one that the tables hold: no other number reaches the loops."""
  state = splitter.start.copy()
  number = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 300)
  for place in data.draw(st.sets(st.integers(0, len(state) - 1), min_size=1)):
    state[place] = data.draw(number)
  text = data.draw(DATA)
  try:
    levels, after = splitter.scan(text, state)
  except ValueError as error:
    assert "is no state of" in str(error)
    return
  assert len(text) == 0 or 0 <= levels.min() <= levels.max() <= (
    splitter.num_levels
  )
  splitter.scan(text, after)


def test_a_state_of_another_splitter_is_refused():
  splitter = SPLITTERS[TOKENS]
  for state in (splitter.start[:2], np.zeros((1, 3), np.int32), 0, []):
    with pytest.raises(ValueError, match="is no state of"):
      splitter.scan(b"text", np.array(state, np.int32))
  rows = SPLITTERS["pretok"].tables
  for state in ([0, 1], [0, len(rows.rule_table)], [-1, 0], [1 << 20, 0]):
    with pytest.raises(ValueError, match="is no state of"):
      SPLITTERS["pretok"].scan(b"text", np.array(state, np.int32))


def test_threads_scan_in_parallel_without_harm():
  splitter = SPLITTERS["word@1,word@2,word@4"]
  texts = [bytes([65 + i]) * i * 7 + b" ab. 12\n" * 4000 for i in range(8)]
  expected = [splitter.levels(text) for text in texts]
  results = [None] * len(texts)

  def work(index):
    for _ in range(5):
      results[index] = splitter.levels(texts[index])

  threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for result, levels in zip(results, expected, strict=True):
    np.testing.assert_array_equal(result, levels)


# ----- the step in jit ------------------------------------------------------


@every_splitter
def test_bos_starts_afresh_and_eos_is_level_0(splitter):
  first, second = b"one two thr", b"1 a\n\xe4\xb8"
  row = [BOS, *first, EOS, BOS, *second, BOS, *second]
  levels_BL, states_BK = run_steps(splitter, np.array([row]))
  deepest = [splitter.num_levels]
  a, b = splitter.levels(first).tolist(), splitter.levels(second).tolist()
  assert levels_BL[0].tolist() == (
    deepest + a + [0] + deepest + b + deepest + b
  )
  _, last = splitter.scan(second, splitter.start)
  np.testing.assert_array_equal(states_BK[0], last)


def test_a_scanned_prompt_continues_in_jit():
  splitter, text = (
    SPLITTERS["word@1,word@2,word@4"],
    "un café, 2 thés\n".encode(),
  )
  expected = splitter.levels(text)
  step = jax.jit(splitter.step)
  for cut in range(len(text)):
    _, state = splitter.scan(text[:cut], splitter.start)
    _, level = step(jnp.asarray(state)[None], jnp.array([text[cut]]))
    assert level[0] == expected[cut]


def test_a_step_is_at_most_three_look_ups():
  splitter = SPLITTERS["word@1,word@2,word@4"]
  program = jax.make_jaxpr(splitter.step)(
    splitter.init_state(4), jnp.zeros(4, jnp.int32)
  )
  assert 1 <= str(program).count("gather[") <= 3
  assert all(s.tables.nbytes <= 256 * 1024 for s in SPLITTERS.values())


# ----- asking for the wrong thing -------------------------------------------


@pytest.mark.parametrize(
  "names, message",
  [
    (["wrod@1"], "Did you mean 'word'"),
    (["level_head"], "--levels=head"),
    (["word@0"], "a whole number from 1"),
    (["word@two"], "a whole number from 1"),
    (["word@"], "a whole number from 1"),
    (["word@²"], "a whole number from 1"),
    (["pretok@2"], "takes no number"),
    (["stride"], "takes a number"),
    (["no_such_module:rule"], "No module named"),
    (["json:no_such_rule"], "no attribute"),
    (["os:getcwd"], "must return a Rule"),
    (["word@100000"], "count less far"),
    (["word@1"] * 16, "at most 15"),
    ([f"{__name__}:alphabet"], "at most 20"),
    ("word@1,word@2", "one for each stage"),
  ],
)
def test_a_wrong_rule_is_named(names, message):
  with pytest.raises(ValueError, match=message):
    Splitter(names)


def test_tables_that_grow_too_large_are_refused():
  with pytest.raises(ValueError, match="bytes of tables"):
    Splitter(["stride@47", "stride@53"])
