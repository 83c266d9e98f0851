"""Reports of a run: its FLOPs, traffic and memory."""

import json
import re
import shlex
from pathlib import Path

import pytest

from aunet_jax.aunet import counts, sharding
from aunet_jax.aunet.devices import Device
from aunet_jax.compile import collectives, programs
from aunet_jax.compile import report as report_lib
from aunet_jax.compile.report import check_flops, table, traffic
from tests.compile.test_programs import tiny

# No activation as large as a matrix, and loops over layers that stay loops.
DISTINCT = (
  "--config.model.stages[0].capacity=88",
  "--config.model.stages[1].capacity=24",
  "--config.model.stages[0].num_layers=2",
  "--config.model.stages[1].num_layers=3",
)


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
  chip = Device("cpu", 100e9, 10e9, 2e9)  # its rates, for a roofline
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(report_lib.devices, "find", lambda device: chip)
    result = report_lib.report(
      config, mesh, what=("train", "decode"), time_parts=True
    )
  return config, mesh, result


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


def test_a_turn_of_decoding_is_predicted_by_part(split_run):
  _, mesh, result = split_run
  train, decode = (result["programs"][x]["time"] for x in ("train", "decode"))
  assert train.keys() - {"predicted_useful_mfu"} <= decode.keys()
  parts = {(part["stage"], part["part"]) for part in decode["parts"]}
  for stage in (1, 2):
    for part in ("attention with cache", "feed-forward", "cache updates"):
      assert (stage, part) in parts
  assert {(1, "pool"), (1, "upsample"), (None, "head")} <= parts
  assert (None, "sampling") in parts and (None, "optimizer") not in parts
  byte, deep = decode["phases"]
  assert byte["share"] + deep["share"] == pytest.approx(1)
  assert decode["bytes_per_turn"] == byte["share"] * byte["rows"]
  per_second = decode["bytes_per_turn"] / decode["seconds"] / mesh.size
  assert decode["bytes_per_second"] == pytest.approx(per_second)
  # The product of the deepest stage runs in its phase alone.
  rows = [x for x in decode["unestimated"] if x["flops"]]
  deepest = [x for x in rows if "/deepest/ffn/" in x["op_name"]]
  assert deepest
  for x in deepest:
    assert x["times"] == pytest.approx(deep["share"])
  assert "bytes a turn" in table(result)


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


@pytest.mark.parametrize(
  "platform,unroll,advised",
  [("tpu", None, True), ("tpu", False, False), ("gpu", None, False)],
)
def test_a_loop_over_layers_is_advised_where_there_is_none(
  monkeypatch, platform, unroll, advised
):
  monkeypatch.setattr(sharding, "platform", lambda mesh: platform)
  config = tiny(f"--config.model.unroll_layers={unroll}")
  advice = report_lib._advice(config, sharding.make_mesh(config.mesh))
  assert ("unroll_layers=False" in advice) == advised


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
