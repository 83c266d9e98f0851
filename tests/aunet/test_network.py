"""Laws of the whole network, with the splitting function in the loop.

Letters: B batch, L positions, D width, E width of the next stage, V
vocabulary.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aunet_jax.aunet import sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import BOS, MeshConfig, ModelConfig, StageConfig
from aunet_jax.splitting.splitter import Splitter

B, L = 2, 40
RULES = ("word@1", "word@2", "word@4")
# Few symbols, so that edge cases meet: spaces before newlines, cut characters.
TEXT = st.text(" \n.a1é", min_size=1, max_size=L - 1).map(
  lambda text: text.encode()[: L - 1]
)


def make_config(upsampling="multi_linear", parametric=True, num_stages=2):
  """Windows shorter than the rows, and every stage different."""
  stages = tuple(
    StageConfig(
      dim=(8, 16, 32, 32)[i],
      num_layers=(1, 2, 1, 1)[i],
      head_dim=4,
      window=(6, 5, None, 3)[i],
      capacity=L,
      rule=(None, *RULES)[i],
      num_kv_heads=2 if i % 2 else None,
      ffn_dim=16,
      skip=i != 1,
    )
    for i in range(num_stages)
  )
  return ModelConfig(
    stages=stages,
    upsampling=upsampling,
    parametric=parametric,
    num_offsets=4,  # segments wrap around
    rope_theta=100.0,
    head_norm_eps=0.01,
    dtype="float32",
  )


VARIANTS = [("multi_linear", True, 1)] + [
  (upsampling, parametric, num_stages)
  for num_stages in (2, 3, 4)
  for upsampling, parametric in itertools.product(
    ("multi_linear", "repeat", "simple"), (True, False)
  )
]
# One compiled program a variant: the others are as quick, but there are many.
QUICK = {
  ("multi_linear", True, 1),
  ("multi_linear", True, 2),
  ("simple", False, 2),
  ("repeat", True, 3),
  ("multi_linear", False, 3),
  ("multi_linear", True, 4),
}
each_variant = pytest.mark.parametrize(
  "variant",
  [
    pytest.param(v, marks=() if v in QUICK else pytest.mark.slow)
    for v in VARIANTS
  ],
  ids=lambda v: f"{v[0]}-{'' if v[1] else 'non_'}parametric-{v[2]}",
)


@functools.cache
def init(config, seed=0):
  """Random parameters, larger than at the start of training: all matters."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  model = AUNet(config)
  boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(0.4 * random.normal(size=x.shape) + 0.1, x.dtype),
    sharding.unbox(boxed["params"]),
  )


# Compiling is most of these tests; the arithmetic is the same.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.cache
def forward(variant):
  """(bytes_BL, levels_BL, documents_BL) -> logits_BLV of a variant."""
  config = make_config(*variant)
  params = init(config)
  apply = jit(AUNet(config).apply)

  def run(*batch):
    with jax.default_matmul_precision("highest"):
      return np.asarray(apply({"params": params}, *batch))

  return run


@functools.cache
def splitter(num_stages):
  return Splitter(RULES[: num_stages - 1])


def pack(rows, num_stages):
  """Batch of rows, each a list of (padding before, text, first document)."""
  bytes_BL = np.zeros((B, L), np.int32)
  levels_BL, documents_BL = np.zeros_like(bytes_BL), np.zeros_like(bytes_BL)
  for b, row in enumerate(rows):
    at = 0
    for number, (padding, text) in enumerate(row, start=1):
      at += padding
      end = at + 1 + len(text)
      assert end <= L
      bytes_BL[b, at:end] = [BOS, *text]
      levels_BL[b, at + 1 : end] = splitter(num_stages).levels(text)
      documents_BL[b, at:end] = number
      at = end
  return bytes_BL, levels_BL, documents_BL


# ----- causality ------------------------------------------------------------


@each_variant
@settings(deadline=None, max_examples=12)
@given(
  text=TEXT, where=st.integers(0, L), to=st.sampled_from(b" \n.a1\xc3\xa9\xff")
)
def test_a_byte_changes_no_logit_before_it(variant, text, where, to):
  where %= len(text)
  changed = text[:where] + bytes([to]) + text[where + 1 :]
  run, num_stages = forward(variant), variant[-1]
  before = run(*pack([[(0, text)]] * B, num_stages))
  after = run(*pack([[(0, changed)]] * B, num_stages))
  # Input 0 is BOS, so byte `where` is input where + 1.
  np.testing.assert_array_equal(after[:, : where + 1], before[:, : where + 1])


@each_variant
@settings(deadline=None, max_examples=12)
@given(
  texts=st.lists(TEXT.map(lambda t: t[:11]), min_size=3, max_size=3),
  document=st.integers(0, 2),
  where=st.integers(0, L),
  to=st.sampled_from(b" \n.a1\xc3\xa9\xff"),
)
def test_a_byte_changes_no_logit_before_it_in_a_pack(
  variant, texts, document, where, to
):
  text = texts[document]
  where %= len(text)
  changed = list(texts)
  changed[document] = text[:where] + bytes([to]) + text[where + 1 :]
  run, num_stages = forward(variant), variant[-1]
  before, after = (
    run(*pack([[(1, t) for t in row]] * B, num_stages))
    for row in (texts, changed)
  )
  position = sum(2 + len(t) for t in texts[:document]) + 2 + where
  np.testing.assert_array_equal(after[:, :position], before[:, :position])


# ----- documents ------------------------------------------------------------


@each_variant
@settings(deadline=None, max_examples=12)
@given(
  texts=st.lists(TEXT.map(lambda t: t[:11]), min_size=3, max_size=3),
  paddings=st.lists(st.integers(0, 1), min_size=3, max_size=3),
)
def test_a_piece_gives_what_it_gives_alone(variant, texts, paddings):
  run, num_stages = forward(variant), variant[-1]
  row = list(zip(paddings, texts, strict=True))
  packed = run(*pack([row, row[::-1]], num_stages))
  for b, order in enumerate((row, row[::-1])):
    at = 0
    for padding, text in order:
      at += padding
      alone = run(*pack([[(0, text)], []], num_stages))[0, : len(text) + 1]
      here = packed[b, at : at + len(text) + 1]
      tolerance = 1e-5 * np.abs(alone).max()
      np.testing.assert_allclose(here, alone, rtol=0, atol=tolerance)
      at += len(text) + 1


def test_a_document_number_may_come_again():
  """Pieces are what touches; equal numbers far apart are two pieces."""
  variant = ("multi_linear", True, 2)
  batch = pack([[(0, b"ab c"), (0, b"de f"), (0, b"gh i")]] * B, 2)
  again = batch[2].copy()
  again[again == 3] = 1
  run = forward(variant)
  np.testing.assert_array_equal(run(*batch[:2], again), run(*batch))


def test_documents_are_ignored_where_the_config_says_so():
  config = make_config()
  batch = pack([[(0, b"ab c"), (3, b"de f")]] * B, 2)
  params = {"params": init(config)}
  blind = dataclasses.replace(config, document_mask=False)
  no_documents = jit(AUNet(config).apply)(params, *batch[:2])
  np.testing.assert_array_equal(
    jit(AUNet(blind).apply)(params, *batch), no_documents
  )
  masked = forward(("multi_linear", True, 2))(*batch)
  assert np.abs(masked - no_documents).max() > 1e-3


# ----- the function itself --------------------------------------------------


def reference(config, params, tokens_L, levels_L):
  """Logits of one document by loops, in float64; written from the paper."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x_D, scale_D, eps=config.norm_eps):
    return x_D / np.sqrt((x_D**2).mean() + eps) * scale_D

  def rotate(x_K, t):
    half = len(x_K) // 2
    angle_J = t * config.rope_theta ** (-np.arange(half) / half)
    z_J = (x_K[:half] + 1j * x_K[half:]) * np.exp(1j * angle_J)
    return np.concatenate([z_J.real, z_J.imag])

  def block(x_LD, p, stage):
    h_LD = [norm(x_D, p["attention_norm"]["scale"]) for x_D in x_LD]
    group = stage.num_heads // stage.kv_heads
    y_LD = []
    for t in range(len(x_LD)):
      y_D = x_LD[t].copy()
      first = 0 if stage.window is None else max(0, t - stage.window + 1)
      for head in range(stage.num_heads):
        q_DK, k_DK, v_DK = (
          p["attention"][name][:, head if name == "query" else head // group]
          for name in ("query", "key", "value")
        )
        q_K = rotate(h_LD[t] @ q_DK, t)
        score_M = np.array(
          [
            q_K @ rotate(h_LD[s] @ k_DK, s) / np.sqrt(stage.head_dim)
            for s in range(first, t + 1)
          ]
        )
        weight_M = np.exp(score_M - score_M.max())
        weight_M /= weight_M.sum()
        v_K = sum(w * (h_LD[first + i] @ v_DK) for i, w in enumerate(weight_M))
        y_D += v_K @ p["attention"]["out"][head]
      h_D = norm(y_D, p["ffn_norm"]["scale"])
      gate_F, up_F = h_D @ p["ffn"]["gate"], h_D @ p["ffn"]["up"]
      silu_F = gate_F / (1 + np.exp(-gate_F))
      y_LD.append(y_D + (silu_F * up_F) @ p["ffn"]["down"])
    return y_LD

  def stack(x_LD, name, stage):
    for layer in range(stage.num_layers):
      blocks = params[name]["blocks"]
      p = jax.tree.map(lambda x, n=layer: x[n], blocks)
      x_LD = block(x_LD, p, stage)
    return x_LD

  def widen(x_D, i, width):
    if config.parametric:
      p = params[f"pool_{i + 1}"]
      return norm(x_D, p["norm"]["scale"]) @ p["kernel"]
    D, ratio = len(x_D), width // len(x_D)
    return np.array(
      [
        (c + 1) / ratio * x_D[d] + (1 - (c + 1) / ratio) * x_D[d - 1]
        for d in range(D)
        for c in range(ratio)
      ]
    )

  def narrow(x_E, i, width, offset):
    p = params.get(f"upsample_{i + 1}", {})
    x_E = norm(x_E, p["norm"]["scale"]) if config.parametric else x_E

    def shared(x_E):
      if config.parametric:
        return x_E @ p["kernel"]
      return x_E.reshape(width, -1).mean(axis=1)

    if config.upsampling == "simple":
      return shared(x_E) if offset == 0 else np.zeros(width)
    offset %= config.num_offsets
    if config.upsampling == "repeat":
      return shared(x_E + p["offsets"][offset])
    own_E = x_E if config.parametric else norm(x_E, p["offsets_norm"]["scale"])
    return shared(x_E) + own_E @ p["offsets"][offset]

  def run_stage(i, x_LD, levels_L):
    stage = config.stages[i]
    if i == config.num_stages - 1:
      return stack(x_LD, "deepest", stage)
    x_LD = stack(x_LD, f"contract_{i + 1}", stage)
    kept = [t for t, level in enumerate(levels_L) if level > i]
    width = config.stages[i + 1].dim
    x_SE = run_stage(
      i + 1,
      [widen(x_LD[t], i, width) for t in kept],
      [levels_L[t] for t in kept],
    )
    y_LD = []
    for t, x_D in enumerate(x_LD):
      slot = sum(s <= t for s in kept) - 1
      y_D = narrow(x_SE[slot], i, stage.dim, t - kept[slot])
      y_LD.append(y_D + x_D if stage.skip else y_D)
    return stack(y_LD, f"expand_{i + 1}", stage)

  levels_L = [config.num_stages - 1, *levels_L[1:]]
  x_LD = run_stage(0, [params["embed"][t] for t in tokens_L], levels_L)
  scale_D, eps = params["norm"]["scale"], config.head_norm_eps
  h_LD = [norm(x_D, scale_D, eps) for x_D in x_LD]
  return np.stack(h_LD) @ params["head"]


@each_variant
def test_the_network_is_what_the_paper_says(variant):
  """One stage: a flat Transformer. Row 1: every byte is a boundary."""
  config = make_config(*variant)
  random = np.random.default_rng(3)
  bytes_BL = random.integers(0, 256, size=(B, L)).astype(np.int32)
  bytes_BL[:, 0] = BOS
  chance = [0.75, 0.15, 0.07, 0.03][: config.num_stages]
  chance[0] += 1 - sum(chance)
  levels_BL = random.choice(config.num_stages, size=(B, L), p=chance)
  levels_BL[1] = config.num_stages - 1
  logits_BLV = forward(variant)(bytes_BL, levels_BL, np.ones((B, L), int))
  assert logits_BLV.dtype == np.float32
  for b in range(B):
    expected_LV = reference(config, init(config), bytes_BL[b], levels_BL[b])
    tolerance = 2e-5 * np.abs(expected_LV).max()
    np.testing.assert_allclose(
      logits_BLV[b], expected_LV, rtol=0, atol=tolerance
    )


def test_boundaries_past_the_capacity_are_left_out():
  """As in the official code; the packer never lets it happen."""
  config = make_config()
  coarse = dataclasses.replace(config.stages[1], capacity=4)
  config = dataclasses.replace(config, stages=(config.stages[0], coarse))
  tokens_1L = np.arange(12)[None] + 97
  levels_1L = np.array([[1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1]])
  kept_1L = np.array([[1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0]])
  params = init(config)
  logits_1LV = jit(AUNet(config).apply)(
    {"params": params}, tokens_1L, levels_1L
  )
  expected_LV = reference(config, params, tokens_1L[0], kept_1L[0])
  tolerance = 2e-5 * np.abs(expected_LV).max()
  np.testing.assert_allclose(logits_1LV[0], expected_LV, atol=tolerance)


def test_the_level_head_reads_the_target():
  config = dataclasses.replace(make_config(), level_loss_weight=0.1)
  params = {"params": init(config)}
  batch = pack([[(0, b"ab c de")], [(0, b"f")]], 2)
  apply = jit(AUNet(config).apply)
  targets_BL = np.roll(batch[0], -1, axis=1)
  logits_BLV, level_logits_BLP, _ = apply(params, *batch, targets_BL)
  np.testing.assert_array_equal(logits_BLV, apply(params, *batch))
  assert level_logits_BLP.shape == (B, L, 2)
  assert level_logits_BLP.dtype == jnp.float32
  other_BL = targets_BL.copy()
  other_BL[:, 3] = 65
  changed_BLP = apply(params, *batch, other_BL).level_logits_BLP
  moved_BL = np.abs(changed_BLP - level_logits_BLP).max(axis=-1) > 1e-6
  assert moved_BL[:, 3].all() and moved_BL.sum() == B


# ----- numerics and compilation ---------------------------------------------


def test_bytes_may_have_any_integer_type():
  run = forward(("multi_linear", True, 2))
  batch = pack([[(0, b"ab c"), (1, b"de f")]] * B, 2)
  narrow = (batch[0].astype(np.int16), *(x.astype(np.uint8) for x in batch[1:]))
  np.testing.assert_array_equal(run(*narrow), run(*batch))


def test_bfloat16_trains_finitely_near_float32():
  config = make_config()
  params = init(config)
  batch = pack([[(0, b"ab c de"), (2, b"xyz ")], [(0, b"f")]], 2)
  model = AUNet(dataclasses.replace(config, dtype="bfloat16"))

  def loss(params):
    logits_BLV = model.apply({"params": params}, *batch)
    return jax.nn.log_softmax(logits_BLV)[..., 0].mean(), logits_BLV

  (_, logits_BLV), grads = jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert logits_BLV.dtype == jnp.float32
  for grad in jax.tree.leaves(grads):
    assert grad.dtype == jnp.float32
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0
  expected_BLV = forward(("multi_linear", True, 2))(*batch)
  # bfloat16 has 8 bits of precision; a dozen roundings add up.
  tolerance = 0.05 * np.abs(expected_BLV).max()
  np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=tolerance)


def test_nothing_is_traced_again_when_boundaries_move():
  config = make_config()
  traces = []

  def apply(params, *batch):
    traces.append(batch)
    return AUNet(config).apply({"params": params}, *batch)

  apply = jit(apply)
  for row in ([(0, b"a b c")], [(3, b"abcdef"), (0, b" \n\n ")], []):
    apply(init(config), *(x[:, :16] for x in pack([row] * B, 2)))
  assert len(traces) == 1


@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
    MeshConfig(data=2, fsdp=2, tensor=2),
  ],
  ids=["data8", "fsdp8", "data2_fsdp2_tensor2"],
)
def test_logits_do_not_depend_on_the_mesh(mesh):
  config = make_config()
  bytes_BL, levels_BL, documents_BL = (
    np.concatenate([x] * 4)
    for x in pack([[(0, b"ab c de"), (2, b"xyz ")], [(0, b"a b")]], 2)
  )
  batch = (bytes_BL + np.arange(8)[:, None] % 3, levels_BL, documents_BL)
  model = AUNet(config)
  expected_BLV = np.concatenate(
    [
      forward(("multi_linear", True, 2))(*(x[i : i + B] for x in batch))
      for i in range(0, 8, B)
    ]
  )
  mesh = sharding.make_mesh(mesh)
  tokens = jnp.zeros((1, 4), jnp.int32)
  boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  params = jax.device_put(
    init(config), sharding.tree_shardings(boxed["params"], mesh)
  )
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    logits_BLV = jit(model.apply)({"params": params}, *batch)
  tolerance = 1e-5 * np.abs(expected_BLV).max()
  np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_padding_in_front_of_a_piece_does_not_read_it(num_stages):
  arrays = [np.zeros((B, L), np.int32) for _ in range(3)]
  bytes_BL, levels_BL, documents_BL = arrays
  bytes_BL[:, 2:12], documents_BL[:, 2:12] = np.arange(97, 107), 1
  apply = forward(("multi_linear", True, num_stages))
  before = apply(bytes_BL, levels_BL, documents_BL)
  bytes_BL[:, 2] = 65  # a continued piece: its first input is text
  after = apply(bytes_BL, levels_BL, documents_BL)
  np.testing.assert_array_equal(after[:, :2], before[:, :2])
