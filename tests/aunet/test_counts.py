"""Counts against what Flax initialises and what XLA says it compiles."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from aunet_jax.aunet import counts, grouped, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.config import ModelConfig, StageConfig


def make_model(num_stages=2, width=1, **fields):
  shapes = [(32, 2, 96), (64, 2, 48), (128, 1, 24), (256, 1, 16)]
  stages = []
  for i, (dim, layers, capacity) in enumerate(shapes[:num_stages]):
    stages.append(
      StageConfig(
        dim=dim * width,
        num_layers=layers,
        head_dim=16,
        window=32 if i == 0 else None,
        capacity=capacity,
        rule=None if i == 0 else f"word@{2 ** (i - 1)}",
        num_kv_heads=2 if i == 1 else None,
        ffn_dim=3 * dim * width if i == 1 else None,
      )
    )
  fields = {"dtype": "float32"} | fields
  return ModelConfig(stages=tuple(stages), **fields)


def abstract_params(model):
  tokens = jax.ShapeDtypeStruct((1, model.capacities[0]), jnp.int32)
  boxed = jax.eval_shape(AUNet(model).init, jax.random.key(0), tokens, tokens)
  return sharding.unbox(boxed["params"])


@pytest.mark.parametrize(
  ("upsampling", "parametric", "level_weight"),
  list(
    itertools.product(
      ("multi_linear", "repeat", "simple"), (True, False), (0.0, 0.1)
    )
  ),
)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_parameters_are_exactly_those_initialised(
  num_stages, upsampling, parametric, level_weight
):
  model = make_model(
    num_stages,
    upsampling=upsampling,
    parametric=parametric,
    level_loss_weight=level_weight,
    num_offsets=5,
  )
  leaves = jax.tree.leaves(abstract_params(model))
  assert counts.num_parameters(model) == sum(leaf.size for leaf in leaves)


def test_parameters_fall_to_the_stage_and_kind_that_own_them():
  params = abstract_params(make_model(3))
  first, second, third = counts.parameters(make_model(3))

  def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  def norms(tree):
    flat = jax.tree.leaves_with_path(tree)
    return sum(x.size for path, x in flat if "scale" in str(path[-1]))

  assert sum(third.values()) == size(params["deepest"])
  paths = [params[f"{name}_2"] for name in ("contract", "expand")]
  assert second["attention"] + second["ffn"] == size(paths) - norms(paths)
  assert second["pool"] == params["pool_2"]["kernel"].size
  assert second["upsample"] + second["norms"] - norms(paths) == size(
    params["upsample_2"]
  ) + norms(params["pool_2"])
  assert first["embedding"] == params["embed"].size
  assert first["head"] == params["head"].size


def xla_flops(model, rows=1):
  tokens = jax.ShapeDtypeStruct((rows, model.capacities[0]), jnp.int32)

  def forward(params, bytes_BL, levels_BL):  # bytes are targets, too
    return AUNet(model).apply(
      {"params": params}, bytes_BL, levels_BL, None, bytes_BL
    )

  params = abstract_params(model)
  lowered = jax.jit(forward).lower(params, tokens, tokens)
  return lowered.compile().cost_analysis()["flops"]


def hidden_in_the_loop(model, rows):
  """FLOPs of the blocks of offset_matmul XLA does not count: it takes the
  body of a loop once, and the blocks of a group are a loop."""
  hidden_flops = 0
  for fine, coarse in zip(model.stages, model.stages[1:], strict=False):
    products = rows * fine.capacity
    multiplied = grouped.rows_multiplied(products, model.num_offsets, "cpu")
    hidden = multiplied - grouped.block_rows(products)
    hidden_flops += hidden * 2 * fine.dim * coarse.dim
  return hidden_flops


@pytest.mark.parametrize(
  ("num_stages", "upsampling", "rows", "heads"),
  [
    *itertools.product(
      (1, 3), ("multi_linear", "repeat", "simple"), (1, 3), [1]
    ),
    (1, "simple", 1, 4),
  ],
)
def test_padded_flops_agree_with_xla(num_stages, upsampling, rows, heads):
  # Widths of some hundreds: elementwise work, which XLA adds and we leave out,
  # stays below 3 percent. Matrix products alone cannot exceed XLA's total.
  model = make_model(
    num_stages, width=4, upsampling=upsampling, unroll_layers=True, heads=heads
  )
  ours = rows * sum(
    sum(kinds.values()) for kinds in counts.padded_forward_flops(model, rows)
  )
  theirs = xla_flops(model, rows)
  if upsampling == "multi_linear":
    theirs += hidden_in_the_loop(model, rows)
  assert 0.97 * theirs < ours <= theirs


def test_windows_cost_what_their_blocks_cost():
  model = make_model(1)
  dense = dataclasses.replace(model.stages[0], window=None)
  L = dense.capacity
  forward = counts.padded_forward_flops(model)[0]
  full = counts.padded_forward_flops(
    dataclasses.replace(model, stages=(dense,))
  )[0]
  # Blocks of 16 see 48 keys each; without a window, all 96.
  assert forward["scores"] * L == full["scores"] * 48
  assert forward["ffn"] == full["ffn"]


def causal_window_pairs(length, window):
  return sum(min(t + 1, window) for t in range(length))


def test_useful_flops_are_linear_in_real_positions_and_below_padded():
  model = make_model(3)
  full = counts.useful_train_flops(model, model.capacities)
  assert full < counts.train_flops_per_row(model)
  half = [n / 2 for n in model.capacities]
  assert counts.useful_train_flops(model, half) == pytest.approx(full / 2)
  byte_stage = counts.useful_forward_flops(model, model.capacities)[0]
  stage = model.stages[0]
  pairs = causal_window_pairs(stage.capacity, stage.window)
  assert byte_stage["scores"] == 4 * pairs * stage.dim * 4  # 2 paths of 2
  with pytest.raises(ValueError, match="2 position counts .* 3 stages"):
    counts.useful_train_flops(model, [1, 2])


def test_remat_repeats_what_its_policy_does_not_keep():
  def with_remat(remat):
    model = make_model(2)
    stages = [dataclasses.replace(s, remat=remat) for s in model.stages]
    return dataclasses.replace(model, stages=tuple(stages))

  none, dots, full = map(with_remat, ("none", "dots", "full"))
  scores = sum(s["scores"] for s in counts.padded_forward_flops(dots))
  assert counts.remat_flops_per_row(none) == scores / 2
  assert counts.remat_flops_per_row(dots) == scores / 2
  assert scores < counts.remat_flops_per_row(full)
  assert counts.remat_flops_per_row(full) < counts.train_flops_per_row(full) / 3
  kept = [sum(counts.activation_bytes(m)) for m in (none, dots, full)]
  assert kept[0] > kept[1] > kept[2]


def test_memory_of_weights_and_cache():
  model = make_model(2)
  memory = counts.report(model)["memory_bytes"]
  leaves = jax.tree.leaves(abstract_params(model))
  sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
  assert memory["parameters"] == memory["gradients"] == sum(sizes)
  assert memory["optimizer"] == 2 * sum(sizes)
  # Stage 1: 4 blocks, 32 wide, 32 positions; stage 2: 2 of 2 heads of 16, 48.
  assert memory["kv_cache_per_row"] == 4 * (4 * 2 * 32 * 32 + 2 * 2 * 32 * 48)


def test_a_mesh_sends_what_it_splits_or_copies():
  model = make_model(3)
  size = 2 if model.dtype == "bfloat16" else 4
  total = counts.num_parameters(model)
  copied = counts.collective_bytes(model, data=8)
  assert copied == {
    "parameter_gathers": 0,
    "gradient_reductions": total * size,
  }
  alone = counts.collective_bytes(model)
  assert set(alone.values()) == {0}
  split = counts.collective_bytes(model, fsdp=8)
  assert split["gradient_reductions"] == total * size
  # Every matrix but those of upsampling is gathered a second time.
  kept = sum(kinds.get("upsample", 0) for kinds in counts.parameters(model))
  whole = sum(
    kinds.get(kind, 0)
    for kinds in counts.parameters(model)
    for kind in ("norms", "embedding", "head")
  )
  gathers = split["parameter_gathers"]
  assert gathers == (2 * (total - whole) - kept) * size
  parts = counts.collective_bytes(model, fsdp=8, grad_accumulation=3)
  assert parts["parameter_gathers"] == 3 * gathers
  both = counts.collective_bytes(model, data=2, fsdp=4, tensor=2)
  assert both["parameter_gathers"] == gathers / 2
