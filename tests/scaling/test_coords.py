"""The coordinate check: what is measured, and that the scaling flattens it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding
from aunet_jax.scaling import __main__ as scaling_main
from aunet_jax.scaling import coords

ROOT = Path(__file__).parents[2]
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"
PARTS = {
  f"{stack}{part}"
  for stack in ("contract_1", "deepest", "expand_1")
  for part in ("", " attention", " feed-forward")
} | {"logits"}


def test_stages_widen_in_proportion():
  model = coords.small().model
  wide = coords.widened(model, 256, base=128)
  first, second = wide.stages
  assert (first.dim, first.base_dim, first.head_dim) == (256, 128, 32)
  assert second.ffn / second.dim == model.stages[1].ffn / model.stages[1].dim
  assert coords.widened(model, 128, None).stages[1].base_dim is None
  with pytest.raises(ValueError, match="byte stage of 80 makes stage 1 80"):
    coords.widened(model, 80, None)


def test_activations_are_those_of_the_parts():
  config = config_lib.parse_flags([TINY])
  model = dataclasses.replace(config.model)
  init = jax.jit(network.init_params, static_argnums=0)
  params = sharding.unbox(init(model, jax.random.key(0)))
  batch = coords.first_batch(config)
  found = coords.activations(params, model, batch)
  assert found.keys() == PARTS
  B, L = batch["bytes"].shape
  assert found["expand_1"].shape == (B, L, 32)
  assert found["deepest attention"].shape == (1, B, 32, 64)  # a layer
  # The last block of a one-block stack adds both parts to its input.
  embedded = params["embed"][batch["bytes"]]
  inside = (
    found["contract_1 attention"][0] + found["contract_1 feed-forward"][0]
  )
  np.testing.assert_allclose(found["contract_1"], embedded + inside, atol=1e-5)


def test_text_that_is_too_short_is_named(tmp_path):
  (tmp_path / "a.txt").write_text("too short")
  flag = f"--config.data.train={tmp_path / 'a.txt'}"
  config = config_lib.parse_flags([TINY, flag])
  with pytest.raises(ValueError, match="need more text than the 9 bytes"):
    coords.first_batch(config)


def fake(growth) -> coords.Check:
  """Sizes over widths 8, 16, 32 without and with scaling."""

  def sizes(power):
    x = np.ones((3, 2, 2))
    x[:, 1] = np.array([[1.0], [2.0], [4.0]]) ** power
    return {"logits": x}

  config = coords.small()
  steps = dataclasses.replace(config.train, num_steps=1)
  config = dataclasses.replace(
    config,
    train=steps,
    optimizer=dataclasses.replace(config.optimizer, warmup_steps=0),
  )
  cases = {"without": sizes(1.0), "with": sizes(growth)}
  return coords.Check((8, 16, 32), 1, config, cases)


def test_the_spread_is_stated_and_drawn(tmp_path):
  shown = coords.show(fake(0.05))
  assert "without base_dim: sizes differ by at most 300%" in shown
  assert "with base_dim: sizes differ by at most 7%" in shown
  coords.write(fake(0.05), tmp_path / "coords.svg")
  drawn = (tmp_path / "coords.svg").read_text()
  assert drawn.count("<svg") == 5 and drawn.count("</svg>") == 5


@pytest.mark.slow  # four models to compile
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_scaling_flattens_what_grows(name, tmp_path, capsys):
  output = tmp_path / "coords.svg"
  args = ["coords", "--widths=64,256", "--steps=4", "--json"]
  args += [f"--output={output}", f"--config.optimizer.name={name}"]
  args += ["--config.model.zero_head=True"]
  assert scaling_main.main(args) == 0
  parts = json.loads(capsys.readouterr().out)["parts"]
  assert output.exists() and parts["with"].keys() == PARTS

  def worst(case):
    return max(part["change_spread"] for part in parts[case].values())

  assert worst("with") < 0.5
  assert worst("without") > (1.0 if name == "adamw" else worst("with"))


def test_bad_arguments_are_named(tmp_path, capsys):
  widths = "--widths=64,128"
  assert scaling_main.main(["coords", widths, "--output=a.png"]) == 2
  assert "must end with .svg" in capsys.readouterr().err
  assert scaling_main.main(["coords", widths, "--models=byte"]) == 2
  assert "unknown arguments: --models=byte" in capsys.readouterr().err
  assert scaling_main.main(["coords", "--widths=48,64"]) == 2
  assert "use multiples of" in capsys.readouterr().err
