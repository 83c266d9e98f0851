"""Decoding byte by byte gives the logits of the parallel pass.

Small widths, windows shorter than the texts, and every part that could differ:
number of stages, upsampling, skip connections, grouped heads, schedules.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from aunet_jax.aunet import network, sharding
from aunet_jax.aunet.network import AUNet, abstract_params
from aunet_jax.config import BOS, EOS, MeshConfig, ModelConfig, StageConfig
from aunet_jax.data.rows import make_rows
from aunet_jax.generate import decode, generator, prefill, sampling
from aunet_jax.splitting.splitter import Splitter

# float32 sums in another order; the logits are of order 1.
TOLERANCE = 1e-4
PREC = "highest"
FAST_COMPILE = {"xla_backend_optimization_level": 0}  # each runs once or twice
PROMPTS = [
  b"The cat sat on the mat, 12 times.",
  "déjà vé".encode()[:-1],  # ends inside a character
  "自回归模型 從字節".encode()[:-2],
  "السلام عليكم".encode(),
  b"def f(x):\n    return x\n",
  b"",
  b"          ",
  b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",  # one word, many offsets
]
CONTINUATION = " and the dog, à 7 h.\nЕщё раз".encode()


make_splitter = functools.cache(Splitter)  # one `step` to compile for


def make_model(num_stages, rules=("word@1", "word@2", "word@4"), **changes):
  """A model whose norms and tables are not at their initial values."""
  kv_heads, skips = changes.pop("num_kv_heads", None), changes.pop("skip", True)
  if isinstance(skips, bool):
    skips = [skips] * num_stages
  widths, windows = [32, 32, 64, 64], [7, 5, 4, 3]
  config = ModelConfig(
    stages=tuple(
      StageConfig(
        dim=widths[i],
        num_layers=2 if i == 0 else 1,
        head_dim=8,
        window=windows[i],
        capacity=64,
        ffn_dim=48,
        rule=None if i == 0 else rules[i - 1],
        num_kv_heads=kv_heads,
        skip=skips[i],
      )
      for i in range(num_stages)
    ),
    dtype="float32",
    num_offsets=4,
    head_norm_eps=0.1,
    **changes,
  )

  return config, random_params(config)


def random_params(config):
  """Drawn by NumPy: compiling the model's own initialisers takes seconds."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    if path[-1].key == "scale":
      return 1 + 0.2 * rng.normal(size=x.shape).astype(np.float32)
    return 0.2 * rng.normal(size=x.shape).astype(np.float32)

  boxed = abstract_params(config)
  shapes = sharding.unbox(boxed)
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(
  jax.jit, static_argnames="config", compiler_options=FAST_COMPILE
)
def apply(params, bytes_BL, levels_BL, documents_BL, config):
  with jax.default_matmul_precision(PREC):
    return AUNet(config).apply(
      {"params": params}, bytes_BL, levels_BL, documents_BL
    )


@functools.partial(
  jax.jit, static_argnames="config", compiler_options=FAST_COMPILE
)
def apply_level_head(params, bytes_BL, levels_BL, targets_BL, config):
  with jax.default_matmul_precision(PREC):
    return AUNet(config).apply(
      {"params": params}, bytes_BL, levels_BL, None, targets_BL
    )


def follow(carry, logits_CV, count_C, rows_C):
  """Chooses given bytes and keeps the logits."""
  forced_BT, logits_BTV = carry
  byte_C = forced_BT.at[rows_C, count_C].get(mode="clip")
  logits_BTV = logits_BTV.at[rows_C, count_C].set(logits_CV, mode="drop")
  zero_C = jnp.zeros(byte_C.shape, jnp.float32)
  return (forced_BT, logits_BTV), byte_C, zero_C, zero_C > 0


@functools.partial(
  jax.jit,
  static_argnames=(
    "config",
    "slots",
    "schedule",
    "splitter_step",
    "use_level_head",
  ),
  compiler_options=FAST_COMPILE,
)
def decode_forced(
  params,
  rows,
  forced_BT,
  config,
  slots,
  schedule,
  splitter_step,
  use_level_head=False,
  num_turns=None,
):
  """Prompt logits (B, L, V) and decoded logits (B, T, V)."""
  B, T = forced_BT.shape
  with jax.default_matmul_precision(PREC):
    weights = network.make_weights(params, config)
    prefilled, prompt_logits = prefill.prefill(
      params,
      weights,
      *rows[:4],
      config=config,
      slots=slots,
    )
    choice = (forced_BT, jnp.zeros((B, T, config.vocab_size)))
    state = decode.start(
      prefilled,
      rows,
      jnp.full((B,), T),
      choice,
      decode.num_phases(config),
    )
    state, output = decode.run(
      weights,
      state,
      jnp.int32(100 * T if num_turns is None else num_turns),
      config=config,
      splitter_step=splitter_step,
      choose=follow,
      schedule=schedule,
      max_turns=T,
      use_level_head=use_level_head,
    )
  return prompt_logits, state.choice[1], output, state


def check(
  config, params, prompts, forced_BT, schedule, capacities=None, bos=BOS
):
  """Compares with the parallel pass over each prompt and what follows it.

  Args: prompts: bytes, or ids of tokens.
  """
  splitter = make_splitter(config.rules)
  N, B, T = config.num_stages, len(prompts), forced_BT.shape[1]
  plan = decode.make_schedule(schedule, B, config)
  rows = make_rows(prompts, splitter, N, bos)
  prompt_logits, logits, output, state = decode_forced(
    params,
    rows,
    forced_BT,
    config=config.with_capacities(capacities or rows.capacities),
    slots=prefill.cache_sizes(config, rows.capacities, T),
    schedule=plan,
    splitter_step=splitter.step,
  )
  texts = [
    prompt + bytes(forced_BT[b].astype(np.uint8))
    if isinstance(prompt, bytes)
    else np.concatenate([prompt, forced_BT[b]])
    for b, prompt in enumerate(prompts)
  ]
  whole = make_rows(texts, splitter, N, bos)
  L = whole.bytes_BL.shape[1]
  expected = apply(
    params,
    *whole[:3],
    config=config.with_capacities(capacities or (L,) * N),
  )
  assert state.done_B.all()
  for b, prompt in enumerate(prompts):
    size = len(prompt)
    np.testing.assert_allclose(
      prompt_logits[b, : size + 1], expected[b, : size + 1], atol=TOLERANCE
    )
    np.testing.assert_allclose(
      logits[b], expected[b, size : size + T], atol=TOLERANCE
    )
    np.testing.assert_array_equal(
      output.level_BT[b], whole.levels_BL[b, size + 1 : size + T + 1]
    )
  return state, plan, whole


CASES = [
  (2, dict(upsampling="simple"), "any"),
  (3, dict(upsampling="repeat", skip=(False, True, True)), "pack"),
  (4, dict(num_kv_heads=2), "half"),
]
SLOW_CASES = [
  (num_stages, dict(upsampling=upsampling, parametric=parametric), schedule)
  for num_stages, schedule in ((2, "sync"), (3, "pack"), (4, "any"))
  for upsampling in ("multi_linear", "repeat", "simple")
  for parametric in (True, False)
]
SLOW_CASES += [
  (1, dict(), "any"),
  (4, dict(skip=False), "any"),
  (2, dict(final_norm=False), "pack"),
]
ALL_CASES = [pytest.param(*case) for case in CASES]
ALL_CASES += [
  pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES
]


@pytest.mark.parametrize("num_stages, changes, schedule", ALL_CASES)
def test_decoding_equals_the_forward_pass(num_stages, changes, schedule):
  config, params = make_model(num_stages, **changes)
  forced_BT = np.stack(
    [np.roll(np.frombuffer(CONTINUATION, np.uint8), 5 * b) for b in range(8)]
  ).astype(np.int32)
  state, plan, whole = check(config, params, PROMPTS, forced_BT, schedule)
  # Work: every boundary of a generated byte once (the last byte's stay
  # undone), and no empty row-slot in "pack".
  if num_stages > 1:
    deepest = num_stages - 1
    done = int(state.rows_P[deepest])
    from_prompt = np.array([len(prompt) + 1 for prompt in PROMPTS])
    boundaries = sum(
      int((whole.levels_BL[b, first:] == deepest).sum())
      for b, first in enumerate(from_prompt)
    )
    last = sum(
      int(whole.levels_BL[b, first + forced_BT.shape[1] - 1] == deepest)
      for b, first in enumerate(from_prompt)
    )
    assert boundaries - last <= done <= boundaries
    if schedule == "pack":
      slots = int(state.calls_P[deepest]) * plan.block
      assert slots <= 1.25 * boundaries


def test_tokens_decode_as_the_forward_pass():
  # Ids past those of bytes, and past int16; BOS and EOS of bytes are tokens.
  config, params = make_model(
    1, vocab_size=40_000, ngram_rows=64, ngram_longest=3
  )
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 39_998, size) for size in (9, 0, 4)]
  forced_BT = rng.integers(0, 39_998, (3, 14)).astype(np.int32)
  forced_BT[:, :3] = [BOS, EOS, 39_997]
  check(config, params, prompts, forced_BT, "any", bos=39_998)


def test_a_call_runs_as_many_turns_as_it_is_given():
  config, params = make_model(1)
  rows = make_rows([b"ab", b""], make_splitter(()), 1)
  forced_BT = np.stack([np.frombuffer(CONTINUATION[:8], np.uint8)] * 2)
  _, _, output, state = decode_forced(
    params,
    rows,
    forced_BT.astype(np.int32),
    config=config.with_capacities(rows.capacities),
    slots=prefill.cache_sizes(config, rows.capacities, 8),
    schedule=decode.make_schedule("any", 2, config),
    splitter_step=make_splitter(()).step,
    num_turns=3,
  )
  assert output.count_B.tolist() == state.count_B.tolist() == [3, 3]
  assert state.calls_P.tolist() == [3] and not state.done_B.any()


def test_rings_hold_all_that_a_window_without_limit_sees():
  config, params = make_model(2)
  stages = [dataclasses.replace(x, window=None) for x in config.stages]
  config = dataclasses.replace(config, stages=tuple(stages))
  # A word every second byte: the deeper ring fills as far as it can.
  row_T = np.frombuffer(b"a b c d e f g h i j k l m n o p q r s t ", np.uint8)
  forced_BT = np.stack([np.roll(row_T, b) for b in range(4)]).astype(np.int32)
  check(config, params, PROMPTS[:4], forced_BT, "half")


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
  "rules",
  [
    pytest.param(("pretok", "word@2"), marks=pytest.mark.slow),
    (f"tokens@{GOLDEN / 'vocabulary.json'}", "word@2"),
    pytest.param(("punct", "stride@5"), marks=pytest.mark.slow),
    pytest.param(("stride@3", "word@1", "word@4"), marks=pytest.mark.slow),
    pytest.param(("bytes", "punct"), marks=pytest.mark.slow),
    pytest.param(
      (f"entropy@{GOLDEN / 'entropy_rise.npz'}", "word@2"),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      (f"entropy@{GOLDEN / 'entropy_threshold.npz'}",), marks=pytest.mark.slow
    ),
  ],
  ids=lambda rules: "-".join(Path(rule).stem for rule in rules),
)
def test_every_kind_of_rule_decodes_as_the_forward_pass(rules):
  config, params = make_model(len(rules) + 1, rules=rules)
  forced_BT = np.stack(
    [np.roll(np.frombuffer(CONTINUATION, np.uint8), 5 * b) for b in range(8)]
  ).astype(np.int32)
  check(config, params, PROMPTS, forced_BT, "pack")


def test_the_level_head_cuts_what_is_written():
  config, params = make_model(3, level_loss_weight=0.5)
  splitter = make_splitter(config.rules)
  prompts = PROMPTS[:4]
  forced_BT = np.stack(
    [np.roll(np.frombuffer(CONTINUATION, np.uint8), 5 * b) for b in range(4)]
  ).astype(np.int32)
  T = forced_BT.shape[1]
  rows = make_rows(prompts, splitter, 3)
  _, logits, output, _ = decode_forced(
    params,
    rows,
    forced_BT,
    config=config.with_capacities(rows.capacities),
    slots=prefill.cache_sizes(config, rows.capacities, T),
    schedule=decode.make_schedule("pack", 4, config),
    splitter_step=splitter.step,
    use_level_head=True,
  )
  assert len(np.unique(output.level_BT)) == 3
  for b, prompt in enumerate(prompts):
    # The model's parallel pass over the text as the head cut it gives the same
    # logits, and its head the same levels.
    first = len(prompt)
    bytes_L = np.array([*[256], *prompt, *forced_BT[b]], np.int32)
    levels_L = np.array([2, *splitter.levels(prompt), *output.level_BT[b]])
    expected, level_logits, _ = apply_level_head(
      params,
      bytes_L[None, :-1],
      levels_L[None, :-1],
      bytes_L[None, 1:],
      config=config.with_capacities((128,) * 3),
    )
    np.testing.assert_allclose(
      logits[b], expected[0, first : first + T], atol=TOLERANCE
    )
    np.testing.assert_array_equal(
      output.level_BT[b], level_logits[0, first:].argmax(axis=-1)
    )


TEXT = st.text(" \n.a1éя中", max_size=7).map(str.encode)
RAW = st.lists(
  st.sampled_from(list(b" \na1.\xc3\xa9\xe4\xb8\xff")), max_size=15
).map(bytes)


@functools.cache
def three_stages():
  return make_model(3)


@given(
  prompts=st.lists(
    st.tuples(st.one_of(TEXT, RAW), st.integers(0, 15)), min_size=3, max_size=3
  ),
  forced=st.binary(min_size=48, max_size=48),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_bytes_decode_as_the_forward_pass(prompts, forced):
  config, params = three_stages()
  texts = [(text * 8)[:size] for text, size in prompts]
  # One shape, so one program: prompts in rows of 16, whole texts in 32.
  forced_BT = np.frombuffer(forced, np.uint8).reshape(3, 16).astype(np.int32)
  forced_BT[forced_BT > 200] = ord(" ")  # words end often
  check(config, params, texts, forced_BT, "pack", capacities=(64, 64, 64))


def abstract_state(config, batch, size):
  """The shapes of a loop's state, with every part that sampling may carry."""
  rows = make_rows([b"a"] * batch, make_splitter(config.rules), 2)
  setting = sampling.Sampling(no_repeat=4)
  choice = sampling.make_choice(
    setting, [b"a"] * batch, [0] * batch, range(batch), [b"stop"]
  )
  params = random_params(config)

  def start(params):
    weights = network.make_weights(params, config)
    prefilled, _ = prefill.prefill(
      params,
      weights,
      *rows[:4],
      config=config,
      slots=prefill.cache_sizes(config, rows.capacities, size),
    )
    P = decode.num_phases(config)
    return decode.start(prefilled, rows, np.full(batch, size), choice, P)

  return jax.eval_shape(start, params)


def test_a_state_is_placed_by_what_its_fields_are_called():
  config, _ = make_model(2, num_kv_heads=2)
  state = abstract_state(config, 2, 8)  # as many rows as phases
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  placed = generator.state_shardings(state, mesh)
  for path, x in jax.tree.leaves_with_path(state):
    (*_, field) = [key.name for key in path if hasattr(key, "name")]
    dims = field.rpartition("_")[2]
    assert x.ndim == (len(dims) if dims.isupper() else 0), field
  choice, ring = placed.choice, placed.caches["deepest"][0]
  heads, rows = PartitionSpec("data", "tensor"), PartitionSpec("data")
  assert ring.keys_BGWK.spec == ring.values_BGWK.spec == heads
  for field in (placed.done_B, placed.up_BOD[0], choice.key_B):
    assert field.spec == choice.memory.history.byte_BH.spec == rows
  for field in (placed.calls_P, choice.settings.stop_QS, choice.settings.top_k):
    assert field.spec == PartitionSpec()


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_pack_always_finds_a_full_block(batch, num_stages):
  config, _ = make_model_config(num_stages), None
  block = decode.make_schedule("pack", batch, config).block
  # However rows spread over the deeper phases, one has at least `block`.
  assert -(-batch // (decode.num_phases(config) - 1)) >= block


def make_model_config(num_stages):
  stage = dict(dim=8, num_layers=1, head_dim=8, window=4, capacity=8)
  return ModelConfig(
    stages=(
      StageConfig(**stage),
      *(StageConfig(**stage, rule="word@1") for _ in range(num_stages - 1)),
    )
  )


class Waiting(NamedTuple):
  """What choosing the next phase looks at."""

  phase_B: jax.Array
  done_B: jax.Array
  count_B: jax.Array


@pytest.mark.parametrize(
  ("phases", "done", "wait", "expected"),
  [
    ([0, 0, 1, 2], [0, 0, 0, 0], 1, 2),  # the last that is ready
    ([0, 0, 1, 2], [0, 0, 0, 1], 1, 1),  # rows that are done do not wait
    ([0, 0, 1, 2], [0, 0, 0, 0], 2, 0),
    ([0, 1, 1, 2], [0, 0, 0, 0], 3, 0),  # none is ready: choose a byte
    ([1, 1, 2, 3], [0, 0, 0, 0], 4, 1),  # nor can one be chosen: the most rows
    ([1, 1, 3, 3], [0, 0, 0, 0], 4, 1),
    ([1, 0, 0, 0], [0, 1, 1, 1], 4, 1),  # as many as are left
  ],
)
def test_the_phase_that_brings_rows_back_to_bytes_soonest_runs(
  phases, done, wait, expected
):
  phase_B, done_B = jnp.array(phases), jnp.array(done, bool)
  state = Waiting(phase_B, done_B, jnp.zeros(4, jnp.int32))
  schedule = decode.Schedule(byte_block=4, block=2, wait=wait)
  phase, waits_B = decode.next_phase(state, schedule, 4)
  assert phase == expected
  assert waits_B.tolist() == ((phase_B == phase) & ~done_B).tolist()


def test_a_block_takes_the_rows_with_fewest_bytes():
  count_B = jnp.array([5, 1, 3, 0], jnp.int32)
  state = Waiting(jnp.zeros(4, jnp.int32), jnp.zeros(4, bool), count_B)
  waits_B = jnp.array([True, True, True, False])
  assert decode.block_rows(state, waits_B, 2).tolist() == [1, 2]
  assert decode.block_rows(state, waits_B, 4).tolist() == [0, 1, 2, 4]
  few_B = jnp.array([True, False, False, False])
  assert decode.block_rows(state, few_B, 3).tolist() == [0, 4, 4]


@pytest.mark.parametrize(
  ("name", "expected"),
  [("any", (8, 8, 1)), ("sync", (8, 8, 8)), ("half", (8, 4, 2))],
)
def test_what_a_schedule_is(name, expected):
  schedule = decode.make_schedule(name, 8, make_model_config(3))
  assert dataclasses.astuple(schedule) == expected
  assert schedule.blocks(4) == (expected[0], *[expected[1]] * 3)
  pack = decode.make_schedule("pack", 9, make_model_config(4))
  assert dataclasses.astuple(pack) == (9, 2, 2)
  alone = decode.make_schedule(name, 1, make_model_config(1))
  assert dataclasses.astuple(alone) == (1, 1, 1)


def test_an_unknown_schedule_is_refused():
  with pytest.raises(ValueError, match="any, sync, half, pack"):
    decode.make_schedule("fast", 2, make_model_config(2))
