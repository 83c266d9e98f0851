"""Generation as users meet it: sampling, streaming, scoring, the command."""

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aunet_jax.aunet import network, sharding
from aunet_jax.config import (
  BOS,
  EOS,
  Config,
  MeshConfig,
  ModelConfig,
  StageConfig,
)
from aunet_jax.evaluate import score
from aunet_jax.generate import __main__ as generate_main
from aunet_jax.generate import sampling
from aunet_jax.generate.generator import Generator
from aunet_jax.generate.sampling import Sampling
from aunet_jax.generate.streaming import RowText
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.workdir import load

ROOT = Path(__file__).parents[2]


def make_config(window=16):
  stages = (
    StageConfig(dim=32, num_layers=1, head_dim=16, window=window, capacity=128),
    StageConfig(
      dim=64, num_layers=1, head_dim=16, window=8, capacity=64, rule="word@1"
    ),
  )
  return ModelConfig(stages=stages, dtype="float32", num_offsets=4)


def make_params(config):
  """Drawn by NumPy, wide enough that greedy text varies."""
  rng = np.random.default_rng(1)
  boxed = jax.eval_shape(lambda: network.init_params(config, jax.random.key(0)))

  def draw(path, x):
    values = 0.3 * rng.normal(size=x.shape).astype(np.float32)
    if path[-1].key == "head":
      values[:, EOS] = 0  # documents go on for long
    return 1 + values if path[-1].key == "scale" else values

  return jax.tree_util.tree_map_with_path(draw, sharding.unbox(boxed))


@functools.cache
def generator():
  config = make_config()
  return Generator(config, make_params(config), Splitter(config.rules))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  config = make_config()
  params = jax.tree.map(jnp.asarray, make_params(config))
  load.save_params(path, Config(model=config), params)
  return path


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
  boxed = jax.eval_shape(lambda: network.init_params(config, jax.random.key(0)))
  params = jax.tree.map(
    jax.device_put, make_params(config), sharding.tree_shardings(boxed, mesh)
  )
  sharded = Generator(config, params, Splitter(config.rules), mesh=mesh)
  prompts = [b"one", b"two words", b"", b"3"]
  expected = generator().generate(prompts, max_bytes=16)
  rows = sharded.generate(prompts, max_bytes=16)
  assert [row.data for row in rows] == [row.data for row in expected]
  spread = sharded.weights["deepest"][0]["gate_up"]
  assert not spread.sharding.is_fully_replicated


# ----- choosing a byte ------------------------------------------------------


def draw(logits_V, settings, num=4000):
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
  # 4000 draws: five standard deviations are below 0.04.
  np.testing.assert_allclose(counts[65:69] / 4000, expected, atol=0.04)
  assert counts[65:69].sum() == 4000
  if settings.temperature == 0:
    np.testing.assert_allclose(logprobs, np.log(0.5), atol=1e-5)


def test_bos_is_never_drawn():
  logits = np.zeros(258, np.float32)
  logits[BOS] = 50
  counts, _ = draw(logits, Sampling())
  assert counts[BOS] == 0
  counts, _ = draw(logits, Sampling(temperature=0), num=1)
  assert counts[BOS] == 0


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


# ----- stopping and streaming -----------------------------------------------


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


@given(
  text=st.text("aé中😀", max_size=12),
  cuts=st.lists(st.integers(0, 48), max_size=6),
)
def test_no_character_is_split_on_screen(text, cuts):
  data = text.encode()
  row, shown, position = RowText(), [], 0
  for cut in [*sorted(cuts), len(data)]:
    for byte in data[position:cut]:
      row.add(byte, 0, 0.0)
    position = max(position, min(cut, len(data)))
    shown.append(row.show(done=False))
    assert "\ufffd" not in shown[-1]
  shown.append(row.show(done=True))
  assert "".join(shown) == text


@given(text=st.text("ab|", max_size=12), cut=st.integers(0, 12))
def test_no_start_of_a_stop_string_is_shown(text, cut):
  data, stop = text.encode(), b"ab|"
  row, shown = RowText([stop]), ""
  for number, byte in enumerate(data):
    if row.reason is None:
      row.add(byte, 0, 0.0)
    if number == cut:
      shown += row.show(done=row.reason is not None)
  shown += row.show(done=True) if row.reason is None or cut < len(data) else ""
  expected = data.split(stop)[0].decode()
  assert expected.startswith(shown) or shown == expected
  assert bytes(row.data).decode() == expected


def test_ctrl_c_keeps_what_was_written():
  def interrupt(row, text):
    raise KeyboardInterrupt

  (row,) = generator().generate([b"x"], max_bytes=5000, on_text=interrupt)
  assert row.reason == "interrupted"
  assert 0 < len(row.data) < 5000


# ----- requests that cannot be met ------------------------------------------


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
  ],
)
def test_settings_out_of_range_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**change)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(prompts=[]), "no prompt"),
    (dict(prompts=["text"]), "bytes"),
    (dict(max_bytes=0), "max_bytes=0"),
    (dict(num_samples=0), "num_samples=0"),
    (dict(seed=[1, 2]), "2 seeds for 1"),
    (dict(seed=-1), "seed=-1"),
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


# ----- the command ----------------------------------------------------------


def command(*arguments, stdin=""):
  """(exit status, stdout, stderr) of `main`, in this process."""
  out, err = io.StringIO(), io.StringIO()
  old, sys.stdin = sys.stdin, io.StringIO(stdin)
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      status = generate_main.main([str(argument) for argument in arguments])
  finally:
    sys.stdin = old
  return status, out.getvalue(), err.getvalue()


def test_the_command_prints_the_prompt_and_its_continuation(workdir):
  flags = ("--prompt=ab c", "--max_bytes=24", "--temperature=0.7", "--seed=3")
  status, text, _ = command(f"--workdir={workdir}", *flags)
  assert status == 0 and text.startswith("ab c") and len(text) > 10
  status, again, _ = command("--workdir", workdir, *flags, "--top_p", "1")
  assert again == text
  status, line, _ = command(f"--workdir={workdir}", *flags, "--json")
  record = json.loads(line)
  assert "ab c" + record["text"] + "\n" == text
  assert len(record["bytes"]) == len(record["logprobs"]) == 24


def test_an_empty_prompt_is_refused_and_none_starts_a_document(workdir):
  status, _, error = command(f"--workdir={workdir}", "--prompt=")
  assert status == 2 and error.startswith("error: --prompt is empty")
  status, text, _ = command(f"--workdir={workdir}", "--max_bytes=8")
  assert status == 0 and text.strip()


def test_interactive_goes_on_until_the_input_ends(workdir):
  status, text, _ = command(
    f"--workdir={workdir}",
    "--max_bytes=8",
    "--interactive",
    stdin="first\n\nsecond\n",
  )
  assert status == 0
  assert text.count("> ") >= 4 and "(new document)" in text


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--temperature=-1",), "temperature=-1"),
    (("--top_p=2",), "top_p=2"),
    (("--max_bytes=0",), "max_bytes=0"),
    (("--samples=0",), "num_samples=0"),
  ],
)
def test_bad_flags_are_errors_without_a_traceback(workdir, flags, message):
  status, _, error = command(f"--workdir={workdir}", "--prompt=x", *flags)
  assert status == 2 and message in error and "Traceback" not in error


def test_a_workdir_without_a_model_is_an_error(tmp_path):
  for path in (tmp_path, tmp_path / "nowhere"):
    status, _, error = command(f"--workdir={path}", "--prompt=x")
    assert status == 2 and str(path) in error


@pytest.mark.slow
def test_ctrl_c_ends_the_command_cleanly(workdir):
  process = subprocess.Popen(
    [sys.executable, "-m", "aunet_jax.generate", f"--workdir={workdir}"]
    + ["--prompt=abc ", "--max_bytes=100000000"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert process.stdout.read(40)  # it writes
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 130
  assert b"Traceback" not in err
