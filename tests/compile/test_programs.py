"""Ahead-of-time reports: on this machine's devices, and for TPU slices."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from aunet_jax import config as config_lib
from aunet_jax.aunet import counts, sharding
from aunet_jax.compile import __main__ as compile_main
from aunet_jax.compile import collectives, programs
from aunet_jax.compile import report as report_lib
from aunet_jax.compile.report import check_flops, table, traffic
from aunet_jax.data import packing
from aunet_jax.train import step

TINY = "--config=tests/tiny.py"
# No activation as large as a matrix, and loops over layers that stay loops.
DISTINCT = (
  "--config.model.stages[0].capacity=88",
  "--config.model.stages[1].capacity=24",
  "--config.model.stages[0].num_layers=2",
  "--config.model.stages[1].num_layers=3",
)


def tiny(*flags):
  return config_lib.parse_flags([TINY, *flags])


def run_cli(capsys, *args):
  status = compile_main.main([TINY, *args])
  out, err = capsys.readouterr()
  return status, out, err


@pytest.fixture(scope="module")
def split_run():
  """The report of a 2 x 2 x 2 mesh, two microbatches a step."""
  config = tiny(
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
    "--config.train.grad_accumulation=2",
    *DISTINCT,
  )
  mesh = sharding.make_mesh(config.mesh)
  return config, mesh, report_lib.report(config, mesh, what=("train", "decode"))


def test_it_reports_the_program_the_trainer_compiles(split_run):
  config, mesh, result = split_run
  compiled = programs.compile_train(config, mesh)
  sizes = compiled.memory_analysis()
  memory = result["programs"]["train"]["memory"]
  assert memory["arguments"] == sizes.argument_size_in_bytes
  assert memory["temporary"] == sizes.temp_size_in_bytes
  # All of the state but the batch and the metrics is written in place.
  assert memory["outputs"] - memory["outputs_in_place"] < 4096
  assert result["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
  found, _ = collectives.find(compiled.as_text())
  by_kind = collectives.by_kind(found)
  assert result["programs"]["train"]["collectives"]["by_kind"] == by_kind


def test_flops_of_all_devices_are_those_of_the_batch(split_run):
  config, mesh, result = split_run
  flops = result["programs"]["train"]["flops_per_device"]
  rows = config.train.batch_size
  model = config.model
  useful = counts.useful_train_flops(model, model.capacities)
  assert flops["useful"] * mesh.size == pytest.approx(rows * useful)
  padded = counts.train_flops_per_row(model, 1)  # rows at once on a device
  assert flops["padded"] * mesh.size == pytest.approx(rows * padded)
  assert flops["padded"] > flops["useful"]


def test_a_table_says_what_the_numbers_mean(split_run):
  *_, result = split_run
  text = table(result)
  for word in ("needed", "padded", "all-reduce", "gradient reductions"):
    assert word in text
  assert "decoding, one turn: 8 rows" in text
  assert "available  unknown" in text  # a CPU does not say


def test_a_mesh_costs_what_counts_says(split_run):
  *_, result = split_run
  assert_expected(result["programs"]["train"]["collectives"])


def assert_expected(sent):
  for key, expected in sent["expected"].items():
    assert sent[key] == pytest.approx(expected, rel=0.15), key


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags",
  [
    ("--config.mesh.data=8",),
    ("--config.mesh.fsdp=8",),
    ("--config.mesh.fsdp=4", "--config.mesh.tensor=2"),
  ],
)
def test_other_meshes_too(flags):
  config = tiny(*flags, *DISTINCT)
  mesh = sharding.make_mesh(config.mesh)
  hlo = programs.compile_train(config, mesh).as_text()
  assert_expected(traffic(config, mesh, hlo, training=True))


@pytest.mark.slow
def test_flops_agree_with_what_xla_counts():
  config = tiny(
    "--config.mesh.fsdp=8",
    "--config.model.stages[1].num_layers=3",
    "--config.model.stages[0].dim=128",
    "--config.model.stages[1].dim=256",
  )
  check = check_flops(config, sharding.make_mesh(config.mesh))
  assert check["counted_by_xla"] == pytest.approx(check["expected"], rel=0.15)


# ----- the command ----------------------------------------------------------


def test_the_last_line_is_json(capsys):
  status, out, _ = run_cli(capsys, "--json", "--config.mesh.fsdp=8")
  assert status == 0
  result = json.loads(out.splitlines()[-1])
  assert result["fits"] and result["devices"] == 8
  assert result["command"].startswith("python -m aunet_jax.compile --config=")
  assert result["versions"]["jax"] == jax.__version__
  assert result["programs"]["train"]["compile_seconds"] >= 0


def test_what_does_not_fit_is_said_with_what_to_try(capsys, monkeypatch):
  monkeypatch.setattr(report_lib.devices, "memory_limit", lambda device: 1e5)
  status, out, err = run_cli(capsys, "--json", "--config.mesh.fsdp=8")
  assert status == 1 and "does not fit" in err
  assert "DOES NOT FIT" in out and "mesh.tensor" in out and "remat" in out
  program = json.loads(out.splitlines()[-1])["programs"]["train"]
  assert not program["fits"] and program["memory"]["margin"] < 0


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


def test_a_late_error_is_one_line(capsys, monkeypatch):
  def refuse(*arguments):
    raise ValueError("stage 1: attention='splash' needs tpu devices.")

  monkeypatch.setattr(step, "compile_step", refuse)
  status, out, err = run_cli(capsys, "--config.mesh.fsdp=8")
  assert status == 2 and out == "" and "Traceback" not in err
  assert err.splitlines()[-1].startswith("error: stage 1: attention=")


def test_help_tells_how_to_call_it(capsys):
  with pytest.raises(SystemExit):
    compile_main.main(["--help"])
  assert "--topology=v5e:4x4" in capsys.readouterr().out


def test_other_errors_of_the_compiler_are_not_hidden(monkeypatch):
  def fail(*arguments):
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

  monkeypatch.setattr(step, "compile_step", fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    compile_main.main([TINY])


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--config.mesh.fsdp=3"], ["fsdp", "3", "8"]),
    (["--config.mesh.fspd=8"], ["mesh.fsdp"]),
    (["--rows=0"], ["--rows=0", "positive"]),
    (["--slices=2"], ["--slices", "--topology"]),
    (["--topology=h100:x"], ["h100:N"]),
    (["--config.train.grad_accumulation=2"], ["batch_size"]),
  ],
)
def test_bad_input_is_named(args, words, capsys):
  status, out, err = run_cli(capsys, *args)
  assert status == 2 and out == "" and err.startswith("error: ")
  for word in words:
    assert word in err


def test_a_missing_tpu_compiler_names_the_extra(capsys, monkeypatch):
  def missing(**options):
    raise RuntimeError("JAX TPU support not installed; cannot generate TPU …")

  monkeypatch.setattr(programs.topologies, "get_topology_desc", missing)
  status, _, err = run_cli(capsys, "--topology=v5e:4x4")
  assert status == 2 and "pip install -e '.[tpu]'" in err
  status, _, err = run_cli(capsys, "--topology=h100:8")
  assert status == 2 and "pip install -e '.[cuda]'" in err


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
    "--config.mesh.fsdp=4",
    "--config.mesh.tensor=2",
    "--config.model.dtype=bfloat16",
  )
  assert status == 0 and result["device"] == "TPU v5 lite"
  for program in result["programs"].values():
    assert 0 < program["memory"]["margin"] < 1
  assert result["programs"]["train"]["collectives"]["by_kind"]


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

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "benchmarks/results/aot").glob("*.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_committed_report_is_of_its_job_which_fits(path):
  job = ROOT / "launch/jobs" / f"{path.stem.replace('-', '_')}.env"
  text = job.read_text()
  flags = re.findall(r"--config\.(?:mesh|model|train)\.\S+", text)
  config = re.search(r"^CONFIG=(\S+)$", text, re.M)[1]
  report = json.loads(path.read_text())
  words = shlex.split(report["command"])
  given = [word for word in words if word.startswith("--config")]
  assert sorted(given) == sorted([f"--config={config}", *flags])
  train = report["programs"]["train"]
  assert report["fits"] and train["memory"]["margin"] > 0.03
  sent = train["collectives"]
  both = sum(sent[key] for key in sent["expected"])
  expected = sum(sent["expected"].values())
  assert both == pytest.approx(expected, rel=0.15)
  if "check" in train:  # made with --check
    check = train["check"]
    assert check["counted_by_xla"] == pytest.approx(check["expected"], rel=0.15)


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
