"""Ahead-of-time reports: on this machine's devices, and for TPU slices."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import sharding
from aunet_jax.compile import __main__ as compile_main
from aunet_jax.compile import programs
from aunet_jax.data import packing
from aunet_jax.train import step

TINY = "--config=tests/tiny.py"


def tiny(*flags):
  return config_lib.parse_flags([TINY, *flags])


def run_cli(capsys, *args):
  status = compile_main.main([TINY, *args])
  out, err = capsys.readouterr()
  return status, out, err


# ----- the command ----------------------------------------------------------


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (512.00G) exceeds available HBM (15.75G).",
      512 * 2**30,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.50G "
      "of 15.75G hbm. Exceeded hbm capacity by 6.75G.",
      22.5 * 2**30,
    ),
    ("RESOURCE_EXHAUSTED: no room", None),
  ],
)
def test_a_refusal_of_the_compiler_is_read(
  message, needed, capsys, monkeypatch
):
  def refuse(*arguments):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(step, "compile_step", refuse)
  status, out, _ = run_cli(capsys, "--json", "--config.mesh.fsdp=8")
  assert status == 1 and "the compiler refused it" in out
  memory = json.loads(out.splitlines()[-1])["programs"]["train"]["memory"]
  assert memory["needed"] == needed


def test_a_model_of_tokens_is_compiled_with_the_arrays_it_trains_on(
  monkeypatch,
):
  batches = []
  monkeypatch.setattr(step, "compile_step", lambda *args: batches.append(args))
  config = tiny("--config.mesh.fsdp=8")
  stages = config.model.stages[:1]
  tokens = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, stages=stages),
    data=dataclasses.replace(config.data, tokenizer="tokenizer.json"),
  )
  for c in (config, tokens):
    programs.compile_train(c, sharding.make_mesh(c.mesh))
  of_bytes, of_tokens = (args[-1] for args in batches)
  assert of_tokens.keys() - of_bytes.keys() == {"target_bytes"}


def test_other_errors_of_the_compiler_are_not_hidden(monkeypatch):
  def fail(*arguments):
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  monkeypatch.setattr(step, "compile_step", fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    compile_main.main([TINY])


# ----- slices ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as far as meshes look at it."""

  id: int
  slice_index: int
  platform: str = "tpu"
  device_kind: str = "stand-in"
  process_index: int = 0
  core_on_chip: int = 0

  @property
  def coords(self):
    return (self.id % 2, self.id % 4 // 2, 0)


def test_only_data_crosses_slices():
  chips = [Chip(i, i // 4) for i in range(8)]
  config = config_lib.MeshConfig(data=None, fsdp=4)
  mesh = sharding.make_mesh(config, chips)
  slices = [[chip.slice_index for chip in row] for row in mesh.devices[:, :, 0]]
  assert slices == [[0] * 4, [1] * 4]


def test_parameters_split_over_slices_are_refused():
  chips = [Chip(i, i // 4) for i in range(8)]
  config = config_lib.MeshConfig(data=1, fsdp=8)
  with pytest.raises(ValueError, match="multiple of the 2 slices"):
    sharding.make_mesh(config, chips)


# ----- TPU slices -----------------------------------------------------------


def compile_for(topology, *flags):
  """In a process of its own: the TPU compiler's settings are the process's."""
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "aunet_jax.compile",
      TINY,
      f"--topology={topology}",
      "--json",
      *flags,
    ],
    capture_output=True,
    text=True,
    timeout=900,
  )
  if "pip install -e '.[tpu]'" in done.stderr:
    pytest.skip("the TPU compiler (libtpu) is not installed")
  assert done.returncode in (0, 1), done.stderr
  return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_tpu_slice_is_compiled_for_without_one():
  status, result = compile_for(
    "v5e:2x4",
    "--what=both",
    "--time",
    "--config.mesh.fsdp=4",
    "--config.mesh.tensor=2",
    "--config.model.dtype=bfloat16",
  )
  assert status == 0 and result["device"] == "TPU v5 lite"
  for program in result["programs"].values():
    assert 0 < program["memory"]["margin"] < 1
  assert result["programs"]["train"]["collectives"]["by_kind"]
  train, decode = (result["programs"][x]["time"] for x in ("train", "decode"))
  assert train.keys() - {"predicted_useful_mfu"} <= decode.keys()
  assert decode["method"] == "compiler" and decode["bytes_per_second"] > 0
  assert sum(phase["share"] for phase in decode["phases"]) == pytest.approx(1)
  parts = {(part["stage"], part["part"]) for part in decode["parts"]}
  for stage in (1, 2):
    for part in ("attention with cache", "feed-forward", "cache updates"):
      assert (stage, part) in parts
  assert {(1, "pool"), (None, "head"), (None, "sampling")} <= parts


@pytest.mark.slow
def test_tensor_may_take_part_of_an_axis_of_the_chips():
  status, result = compile_for(
    "v6e:16x16", "--config.mesh.tensor=2", "--config.train.batch_size=128"
  )
  assert status == 0
  assert result["mesh"] == {"data": 128, "fsdp": 1, "tensor": 2}


@pytest.mark.slow
def test_two_slices_sum_gradients_across_and_gather_within():
  status, result = compile_for("v5e:2x2", "--slices=2", "--config.mesh.fsdp=4")
  assert status == 0 and result["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.slow
def test_what_no_chip_can_hold_is_refused():
  status, result = compile_for(
    "v5e:2x2",
    "--config.model.stages[1].dim=8192",
    "--config.model.stages[1].num_layers=24",
    "--config.mesh.data=4",
  )
  assert status == 1
  memory = result["programs"]["train"]["memory"]
  assert memory["needed"] is None or memory["needed"] > memory["available"]


# ----- what is shipped ------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [None, "tokenizer.json"])
def test_the_batch_of_the_compiled_step_has_every_array(monkeypatch, tokenizer):
  config = config_lib.parse_flags([TINY])
  if tokenizer is not None:
    model = dataclasses.replace(config.model, stages=config.model.stages[:1])
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    config = dataclasses.replace(config, data=data, model=model)
  mesh = sharding.make_mesh(config_lib.MeshConfig())
  monkeypatch.setattr(programs.step, "compile_step", lambda *args: args[-1])
  monkeypatch.setattr(programs, "_compile", lambda make: make())
  batch = programs.compile_train(config, mesh)
  assert set(batch) == set(packing.field_names(tokenizer is not None))
  rows = (config.train.batch_size, config.model.capacities[0])
  for array in batch.values():
    assert array.shape == rows
    assert array.sharding == sharding.batch_sharding(mesh)
