"""Parity with the official code: recorded logits, losses and gradients.

The cases come from the official implementation run on CPU in float32; three
lie in `golden/official` (its README says how they were made), the whole set is
read from beside the repository where it is present.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aunet_jax.aunet import sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import ModelConfig, OptimizerConfig, StageConfig
from aunet_jax.convert import lingua
from aunet_jax.convert.lingua_arguments import (
  from_arguments,
  to_arguments,
)
from aunet_jax.train.optimizer import learning_rate_schedule

HERE = Path(__file__).parents[1] / "golden" / "official"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
FILES = {path.stem: path for path in sorted(SHARED.glob("g*.npz"))}
FILES |= {path.stem: path for path in sorted(HERE.glob("g*.npz"))}
# The others are slow only because each case compiles its own model.
QUICK = (
  "g01_2st_indexed",
  "g02_2st_repeat_nores",
  "g12_2st_nonparam_samedim",
)

# Compiling is most of these tests; the arithmetic is the same.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}

# Float32 sums in another order; the largest difference seen is five times less.
LOGITS_TOLERANCE = 2e-5  # of the largest absolute logit
LOSS_TOLERANCE = 2e-5  # nats
GRADIENT_TOLERANCE = 1e-4  # of the gradient's norm


@functools.cache
def read_case(name):
  """(arrays, weights, gradients, description) of a recorded case."""
  arrays = dict(np.load(FILES[name]))
  description = json.loads(FILES[name].with_suffix(".json").read_text())

  def named(prefix):
    return {k[2:]: v for k, v in arrays.items() if k.startswith(prefix)}

  return arrays, named("w."), named("g."), description


def nats(logits, targets):
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_probs, targets[..., None], -1).mean()


def losses(params, config, arrays):
  """Total loss as the official code adds it up, and the parts."""
  model = AUNet(config)
  inputs = (arrays["tokens"], arrays["level_mask"])
  targets = arrays["targets"].astype(int)
  if config.level_loss_weight == 0:
    logits = model.apply({"params": params}, *inputs)
    loss = nats(logits, targets)
    return loss, {"logits": logits, "loss": loss}
  logits, level_logits = model.apply({"params": params}, *inputs, None, targets)
  loss = nats(logits, targets)
  level_loss = nats(level_logits, arrays["target_level_mask"].astype(int))
  return loss + config.level_loss_weight * level_loss, {
    "logits": logits,
    "loss": loss,
    "mask_logits": level_logits,
    "mask_loss": level_loss,
  }


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in FILES
  ],
)
def test_logits_losses_and_gradients_are_the_official_ones(name):
  arrays, state_dict, gradients, description = read_case(name)
  config, params = lingua.from_lingua(state_dict, description["model"])
  grad_fn = jax.jit(
    jax.value_and_grad(losses, has_aux=True),
    static_argnums=1,
    compiler_options=COMPILER_OPTIONS,
  )
  inputs = ("tokens", "targets", "level_mask", "target_level_mask")
  with jax.default_matmul_precision("highest"):
    (total, parts), grads = grad_fn(
      params, config, {key: arrays[key] for key in inputs}
    )
  assert ("mask_logits" in parts) == ("mask_logits" in arrays)
  np.testing.assert_allclose(
    total, arrays["total_loss"], rtol=0, atol=LOSS_TOLERANCE
  )
  for part, value in parts.items():
    scale = np.abs(arrays[part]).max() if "logits" in part else 1.0
    np.testing.assert_allclose(
      value, arrays[part], rtol=0, atol=LOGITS_TOLERANCE * scale, err_msg=part
    )
  official = lingua.to_lingua(config, grads)
  assert gradients
  for key, expected in gradients.items():
    error = np.linalg.norm(official[key] - expected)
    assert error <= GRADIENT_TOLERANCE * np.linalg.norm(expected), key


@pytest.mark.slow
def test_training_follows_the_official_losses():
  """Twelve optimizer steps: losses, gradient norms, weights at the end.

  The official first update has a learning rate of 0; ours starts one step
  further on the same schedule.
  """
  name = "g07_3st_indexed_lambda"
  if name not in FILES:
    pytest.skip("the whole set of recorded cases is not beside the repository")
  arrays, state_dict, _, description = read_case(name)
  config, params = lingua.from_lingua(state_dict, description["model"])
  official = description["train"]
  optim, num_steps = official["optim"], official["n_steps"]
  schedule = learning_rate_schedule(
    OptimizerConfig(
      learning_rate=optim["lr"],
      warmup_steps=optim["warmup"],
      final_ratio=optim["lr_min_ratio"],
    ),
    num_steps,
  )
  rates = [0.0, *(float(schedule(count)) for count in range(num_steps - 1))]
  np.testing.assert_allclose(rates, official["lr"], rtol=1e-5)
  optimizer = optax.chain(
    optax.clip_by_global_norm(optim["clip"]),
    optax.adamw(
      lambda count: jnp.asarray(rates)[count],
      b1=optim["beta1"],
      b2=optim["beta2"],
      eps=optim["epsilon"],
      weight_decay=optim["weight_decay"],
    ),
  )
  inputs = ("tokens", "targets", "level_mask", "target_level_mask")
  batch = {key: arrays[key] for key in inputs}

  @jax.jit
  def step(params, opt_state):
    (_, parts), grads = jax.value_and_grad(losses, has_aux=True)(
      params, config, batch
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, parts, optax.tree.norm(grads)

  opt_state = optimizer.init(params)
  with jax.default_matmul_precision("highest"):
    for i in range(num_steps):
      params, opt_state, parts, norm = step(params, opt_state)
      # Adam divides small gradients by their size, so rounding grows a little
      # with every step.
      for part in ("loss", "mask_loss"):
        np.testing.assert_allclose(parts[part], official[part][i], rtol=1e-4)
      np.testing.assert_allclose(norm, official["grad_norm"][i], rtol=1e-3)
  trained = lingua.to_lingua(config, params)
  names = [key[8:] for key in arrays if key.startswith("trained.")]
  assert names
  for key in names:
    moved = np.linalg.norm(arrays[f"trained.{key}"] - state_dict[key])
    error = np.linalg.norm(arrays[f"trained.{key}"] - trained[key])
    assert error < 1e-3 * moved, key


def assert_same_weights(actual, expected):
  assert actual.keys() == expected.keys()
  for key, value in expected.items():
    assert actual[key].dtype == value.dtype, key
    np.testing.assert_array_equal(actual[key], value, err_msg=key)


@pytest.mark.parametrize("name", FILES)
def test_there_and_back_is_exact(name):
  _, state_dict, _, description = read_case(name)
  config, params = lingua.from_lingua(state_dict, description["model"])
  assert_same_weights(lingua.to_lingua(config, params), state_dict)
  assert from_arguments(to_arguments(config), config.vocab_size) == config


def random_config(upsampling, parametric, num_stages, **fields):
  dims = (16, 32, 64, 64)
  stages = tuple(
    StageConfig(
      dim=dims[i],
      num_layers=1 + i % 2,
      head_dim=8,
      window=(None, 4, 3, 7)[i],
      capacity=64 // (i + 1),
      num_kv_heads=1,
      ffn_dim=lingua_ffn(dims[i]),
      skip=i != 1 or i == num_stages - 1,  # the deepest stage has no skip
    )
    for i in range(num_stages)
  )
  return ModelConfig(
    stages=stages,
    upsampling=upsampling,
    parametric=parametric,
    document_mask=False,
    dtype="float32",
    **fields,
  )


def lingua_ffn(dim):
  """The official width with a multiplier of 1.3, to whole multiples of 16."""
  return -(-int(1.3 * int(8 * dim / 3)) // 16) * 16


VARIANTS = [
  (upsampling, parametric, num_stages)
  for upsampling in ("multi_linear", "repeat", "simple")
  for parametric in (True, False)
  for num_stages in (1, 2, 3, 4)
]


@pytest.mark.parametrize("upsampling,parametric,num_stages", VARIANTS)
def test_every_variant_goes_there_and_back(upsampling, parametric, num_stages):
  config = random_config(
    upsampling,
    parametric,
    num_stages,
    level_loss_weight=0.1,
    head_norm_eps=1e-3,
  )
  random = np.random.default_rng(0)
  state_dict = {
    weight.key: random.normal(size=weight.shape).astype(np.float32)
    for weight in lingua.weights(config)
  }
  for i, (fine, coarse) in enumerate(
    zip(config.stages, config.stages[1:], strict=False)
  ):
    if not parametric:
      ratio = coarse.dim // fine.dim
      features = [(j % ratio + 1) / ratio for j in range(coarse.dim)]
      indices = [j // ratio for j in range(coarse.dim)]
      prefix = f"transitions.{i}"
      state_dict[f"{prefix}.features_weight"] = np.float32(features)
      state_dict[f"{prefix}.expand_idx"] = np.array(indices, np.int64)
  back, params = lingua.from_lingua(state_dict, to_arguments(config))
  assert back == config
  assert_same_weights(lingua.to_lingua(config, params), state_dict)


@pytest.mark.parametrize("parametric", [True, False])
@pytest.mark.parametrize("upsampling", ["multi_linear", "repeat", "simple"])
def test_parameters_are_those_the_model_initialises(upsampling, parametric):
  config = random_config(upsampling, parametric, 3, level_loss_weight=0.5)
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  model = AUNet(config)
  boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  expected = sharding.unbox(boxed["params"])
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), expected)
  state_dict = lingua.to_lingua(config, zeros)
  _, params = lingua.from_lingua(state_dict, to_arguments(config))
  shapes = jax.eval_shape(lambda: params)
  assert jax.tree.structure(shapes) == jax.tree.structure(expected)
  assert jax.tree.map(
    lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, expected
  ) == jax.tree.map(lambda _: True, expected)


@pytest.fixture
def checkpoint():
  """A small recorded checkpoint that a test may spoil."""
  _, state_dict, _, description = read_case("g12_2st_nonparam_samedim")
  return dict(state_dict), json.loads(json.dumps(description["model"]))


def all_keys():
  return sorted(read_case("g12_2st_nonparam_samedim")[1])


@pytest.mark.parametrize("key", all_keys())
def test_a_missing_weight_is_named(checkpoint, key):
  state_dict, arguments = checkpoint
  del state_dict[key]
  with pytest.raises(ValueError, match=key):
    lingua.from_lingua(state_dict, arguments)


@pytest.mark.parametrize("key", all_keys())
def test_a_weight_of_the_wrong_shape_is_named(checkpoint, key):
  state_dict, arguments = checkpoint
  state_dict[key] = state_dict[key][:-1]
  with pytest.raises(ValueError, match=key):
    lingua.from_lingua(state_dict, arguments)


def test_an_unknown_weight_is_named(checkpoint):
  state_dict, arguments = checkpoint
  state_dict["trunk.layers.2.ffn_norm.weight"] = np.ones(32, np.float32)
  with pytest.raises(ValueError, match=r"trunk\.layers\.2\.ffn_norm"):
    lingua.from_lingua(state_dict, arguments)


def test_a_weight_that_is_no_float_is_named(checkpoint):
  state_dict, arguments = checkpoint
  state_dict["vocab.weight"] = state_dict["vocab.weight"].astype(np.int32)
  with pytest.raises(ValueError, match="vocab.weight.*int32"):
    lingua.from_lingua(state_dict, arguments)


def test_a_changed_constant_is_named(checkpoint):
  state_dict, arguments = checkpoint
  key = "transitions.0.features_weight"
  state_dict[key] = state_dict[key] * 2
  with pytest.raises(ValueError, match=key):
    lingua.from_lingua(state_dict, arguments)


@pytest.mark.parametrize(
  "name,value",
  [
    ("dimensions", []),
    ("layers", [1]),
    ("head_dims", [16, 16, 16]),
    ("sliding_windows", [8]),
    ("residuals", [True, True]),
    ("pooling_type", "max"),
  ],
)
def test_an_argument_without_counterpart_is_named(checkpoint, name, value):
  state_dict, arguments = checkpoint
  arguments[name] = value
  with pytest.raises(ValueError, match=name):
    lingua.from_lingua(state_dict, arguments)


@pytest.mark.parametrize(
  "name", ["dimensions", "head_dims", "layers", "max_seqlens", "pooling_type"]
)
def test_a_missing_argument_is_named(checkpoint, name):
  state_dict, arguments = checkpoint
  del arguments[name]
  with pytest.raises(ValueError, match=name):
    lingua.from_lingua(state_dict, arguments)


def test_a_missing_parameter_is_named(checkpoint):
  config, params = lingua.from_lingua(*checkpoint)
  del params["expand_1"]["blocks"]["ffn"]["up"]
  with pytest.raises(ValueError, match="expand_1/blocks/ffn/up"):
    lingua.to_lingua(config, params)


def test_a_parameter_of_the_wrong_shape_is_named(checkpoint):
  config, params = lingua.from_lingua(*checkpoint)
  params["head"] = params["head"][:, :-1]
  with pytest.raises(ValueError, match="head.*vocab.weight"):
    lingua.to_lingua(config, params)


def test_half_precision_weights_become_float32(checkpoint):
  state_dict, arguments = checkpoint
  half = np.asarray(jnp.asarray(state_dict["vocab.weight"], jnp.bfloat16))
  state_dict["vocab.weight"] = half
  config, params = lingua.from_lingua(state_dict, arguments)
  assert config.dtype == config.param_dtype == "float32"
  np.testing.assert_array_equal(params["head"], half.astype(np.float32).T)


def test_minus_one_is_no_limit(checkpoint):
  state_dict, arguments = checkpoint
  arguments["max_seqlens"] = [-1, 3200]
  arguments["block"]["max_seqlen"] = 8192
  assert lingua.from_lingua(state_dict, arguments)[0].capacities == (8192, 3200)
  arguments["max_seqlens"] = [128, -1]
  assert lingua.from_lingua(state_dict, arguments)[0].capacities == (128, 128)


def test_a_feed_forward_width_without_official_name_is_refused():
  config = random_config("simple", True, 1)
  stage = dataclasses.replace(config.stages[0], ffn_dim=1_000_003)
  with pytest.raises(ValueError, match="1000003"):
    to_arguments(dataclasses.replace(config, stages=(stage,)))


def test_skipping_the_final_norm_is_the_official_evaluation():
  """Logits of the head on the un-normed state, with the same parameters."""
  _, state_dict, _, description = read_case("g02_2st_repeat_nores")
  state_dict = dict(state_dict)
  inputs = np.zeros((1, 8), np.int32)

  def logits(state_dict, **fields):
    config, params = lingua.from_lingua(state_dict, description["model"])
    model = AUNet(dataclasses.replace(config, **fields))
    apply = jax.jit(model.apply, compiler_options=COMPILER_OPTIONS)
    return apply({"params": params}, inputs, inputs)

  plain = logits(state_dict, final_norm=False)
  assert np.abs(plain - logits(state_dict)).max() > 0.1
  state_dict["vocab_norm.weight"] = 3 * state_dict["vocab_norm.weight"]
  np.testing.assert_array_equal(logits(state_dict, final_norm=False), plain)
