"""What the benchmarks count and draw; their times are nobody's business."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import counts
from aunet_jax.data import parts
from aunet_jax.scaling import draw
from benchmarks import (
  attention,
  compare_models,
  indexing,
  options,
  page,
  recipes,
  suite,
  upsample,
  where_time_goes,
)


def test_products_in_loops_are_counted_as_often_as_they_run():
  def function(x, w):
    x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)
    return jax.jit(lambda x: x @ w)(x)

  x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
  jaxpr = jax.make_jaxpr(function)(x, w).jaxpr
  assert upsample.product_flops(jaxpr) == 6 * 2 * 3 * 4 * 4


def test_tiles_are_visited_once_for_each_offset_in_them():
  offset_BL = np.array([[0, 0, 0, 1, 1, 17, 3, 3], [0, 1, 2, 2, 2, 2, 2, 2]])
  order = np.sort(offset_BL.reshape(-1) % 16)
  for tile in (1, 2, 4, 16):
    tiles = [set(part) for part in order.reshape(-1, tile)]
    expected = sum(len(groups) for groups in tiles)
    assert upsample.visited_tiles(offset_BL, tile) == expected


@pytest.mark.parametrize(
  ("op_name", "part"),
  [
    (
      "jit(f)/transpose(jvp(AUNet))/contract_1/blocks/ffn/dot_general",
      "stage 1: feed-forward",
    ),
    (
      "jit(f)/jvp(AUNet)/deepest/blocks/attention/BGNRCK,BGNMK->BGNRCM/dot",
      "deepest: attention kernel",
    ),
    (
      "jit(f)/jvp(AUNet)/expand_2/blocks/attention/dot_general",
      "stage 2: attention projections, RoPE",
    ),
    ("jit(f)/jvp(AUNet)/upsample_1/shard_map/while", "stage 1: upsampling"),
    ("jit(f)/jvp(AUNet)/dot_general", "head and loss"),
    ("jit(f)/mul", "optimizer and rest"),
    ("", "copies and others"),
  ],
)
def test_operations_belong_to_parts_of_the_model(op_name, part):
  assert where_time_goes.part(op_name) == part


def test_operations_of_a_compiled_program_know_where_they_come_from():
  def function(x):
    with jax.named_scope("here"):
      return jnp.tanh(x @ x)

  x = jnp.ones((64, 64))
  sources = where_time_goes.sources(
    jax.jit(function).lower(x).compile().as_text()
  )
  assert any("here/dot_general" in name for name in sources.values())


def test_every_committed_result_has_a_section(tmp_path):
  paths = sorted(page.RESULTS.glob("*.json*"))
  assert paths
  for path in paths:
    for result in page.read(path):
      for name, part in result.get("results", {path.stem: result}).items():
        if "curves" in part:
          lines = page.numerics_section(part, tmp_path / "curve.svg")
        else:
          lines = page.section(part, name)
        assert lines and all(isinstance(line, str) for line in lines)


def test_a_kernel_whose_gradients_are_no_numbers_is_wrong():
  right, nan = jnp.ones(3), jnp.full(3, jnp.nan)
  assert np.isnan(attention.error([right, nan], [right, right]))
  assert attention.error([right, 2 * right], [right, right]) == 1


def test_a_suite_cut_short_keeps_the_parts_that_were_done(
  tmp_path, monkeypatch
):
  parts = {"one": (60, "upsample --shapes=none"), "two": (60, "")}
  monkeypatch.setattr(suite, "PARTS", {"cpu": parts})
  run = suite.run

  def cut_short(name, limit, arguments):
    if name == "two":
      raise KeyboardInterrupt
    return run(name, limit, arguments)

  monkeypatch.setattr(suite, "run", cut_short)
  written = tmp_path / "out.json"
  monkeypatch.setattr("sys.argv", ["suite", "--device=cpu", f"--out={written}"])
  with pytest.raises(KeyboardInterrupt):
    suite.main()
  results = json.loads(written.read_text())["results"]
  assert results["one"]["failed"] == "exit status 2"


def test_a_large_index_is_written_as_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
  assert indexing.write_index(tmp_path, 3000) == 3
  found = indexing.start(tmp_path)
  assert found["documents"] == 3000 and found["heldout_documents"] == 1000


def test_models_are_compared_with_what_needs_no_model():
  value, low, high = compare_models.interval([0, 1] * 50, compare_models.mean)
  assert value == 0.5 and 0.38 < low < 0.43 and 0.57 < high < 0.62
  assert compare_models.bits([(np.log(2), 1), (np.log(2) * 3, 1)]) == 2
  rows = [
    {
      "prompt": "\ufffdA cat. The dog ate a bone!\nWhat ate a bone?\ufffd",
      "expected": "the dog",
    }
  ]
  found = compare_models.trivial("squad", rows)
  assert found == {
    "the paragraph": pytest.approx(2 / 5),
    "its first sentence": 0,
    "its sentence with most words of the question": pytest.approx(2 / 4),
  }
  rows = [{"expected": "negative"}] * 3 + [{"expected": "positive"}]
  assert compare_models.trivial("sst2", rows) == {"always negative": 0.75}


@pytest.mark.parametrize("name", compare_models.MODELS)
def test_compared_models_cost_the_same_a_byte(name):
  """Useful FLOPs of a kilobyte of English, where words have 5.3 bytes."""
  flag = f"--config={compare_models.__file__}:{name}@data"
  model = config_lib.parse_flags([flag]).model
  positions = {
    "aunet2": (1004, 190), "aunet3": (1004, 190, 105), "bytes": (1004,),
    "bpe": (366,),
  }[name]  # fmt: skip
  flops = counts.useful_train_flops(model, positions) / 1004
  assert flops == pytest.approx(3.37e6, rel=0.02)


@pytest.mark.parametrize("name", recipes.LADDERS)
def test_models_of_a_ladder_spend_the_same_compute(name):
  for size, budget in enumerate(recipes.BUDGETS):
    flag = f"--config={recipes.__file__}:{name}/{size}"
    c = config_lib.parse_flags([flag])
    units = recipes.ROW_BYTES / (recipes.TOKEN_BYTES if name == "bpe" else 1)
    words = recipes.ROW_BYTES / recipes.WORD_BYTES
    positions = [units, words, words / 2][: c.model.num_stages]
    assert all(
      n <= k for n, k in zip(positions, c.model.capacities, strict=True)
    )
    step = counts.useful_train_flops(c.model, positions) * c.train.batch_size
    assert step * c.train.num_steps == pytest.approx(budget, rel=0.005)


def test_the_share_of_bytes_that_a_recipe_needs():
  curve = [(0.1, 3.0), (0.2, 2.0), (0.3, 1.0)]
  assert recipes.share_needed(curve, 2.5) == pytest.approx(0.15)
  assert recipes.share_needed(curve, 4) == 0.1
  assert recipes.share_needed(curve, 0.5) == np.inf
  assert recipes.mean_interval([1.0, 2.0, 3.0]) == {
    "mean": 2, "half_width": pytest.approx(2.4841, abs=1e-3)
  }  # fmt: skip
  assert recipes.mean_interval([1.0])["half_width"] is None


def test_a_ladder_is_shown_from_the_runs_that_are_done():
  cell = {
    "model": "bytes", "recipe": "paper", "size": 0, "rate": 0.1, "seeds": 2,
    "bits": {"mean": 2.5, "half_width": 0.1}, "useful_flops": 1e9,
    "share_of_bytes": {"mean": 1.0, "half_width": None},
  }  # fmt: skip
  faster = {**cell, "recipe": "muon", "share_of_bytes": cell["bits"]}
  sweep = {"model": "bytes", "recipe": "paper", "rate": 4e-3, "bits": 2.5}
  result = {"cells": [cell, faster], "sweeps": [sweep]}
  text = recipes.shown(result)
  assert "| 1.25e+11 | paper | 2.500 ± 0.100 |" in text
  assert text.count("2.500 ± 0.100") == 3  # and muon's bits and share
  assert "| bytes, paper | **2.500** | – | – | – |" in text
  assert draw.svg(recipes.chart(result)).startswith("<svg")


def test_options_cost_their_own_flops_and_train_as_many_steps_as_are_equal():
  named = options.configs(list(options.OPTIONS))
  plain = options.flops(named[options.PLAIN])
  assert options.flops(named["heads"]) > plain
  assert options.flops(named["zero_head"]) == plain
  cost = options.Cost(flops=1.1, seconds=1.12)
  assert options.equal_steps(440, cost) == {"flops": 400, "time": 400}
  cost = options.Cost(flops=1.1, seconds=1.5)
  assert options.equal_steps(440, cost) == {"flops": 400, "time": 293}


def test_an_option_gains_what_the_same_seeds_lack_without_it(
  tmp_path, monkeypatch
):
  costs = {"none": [1.0, 1.0], "conv": [1.0, 2.0]}
  (tmp_path / "costs.json").write_text(json.dumps(costs))
  bits = {"none": (3.0, 3.2), "conv": (2.9, 3.1)}

  def run(args, parts, option, steps, seed):
    return bits[option][seed] + (0.5 if steps < 10 else 0)

  monkeypatch.setattr(options, "run", run)
  args = argparse.Namespace(
    output=tmp_path, options=["none", "conv"], steps=10, seeds=2
  )
  result = options.measure(args)
  conv = result["cells"][1]
  assert conv["equal_flops"]["gain"]["mean"] == pytest.approx(0.1)
  assert conv["equal_flops"]["gain"]["half_width"] == pytest.approx(0)
  assert conv["equal_time"]["gain"]["mean"] == pytest.approx(-0.4)
  assert "| `conv` | 2.00 | 1.00 | 3.000 |" in options.shown(result)
