"""A program's time against small ones whose answer is worked out by hand."""

import json
import re
from pathlib import Path

import pytest

from aunet_jax.aunet.devices import Device
from aunet_jax.compile import __main__ as compile_main
from aunet_jax.compile import hlo, step_time

# A byte a cycle over the links in each direction; the rest in round numbers.
DEVICE = Device("chip", 100e9, 10e9, 2e9, clock=1e9)
RATES = step_time.Rates(flops_per_cycle=100.0, bytes_per_cycle=10.0)

GOLDEN = Path(__file__).parents[1] / "golden"
# A loop of 3 with a fusion of 40 cycles and a kernel without an estimate; a
# branch of 7 cycles and one of 70; a call of 5; a gather without an estimate.
PROGRAM = (GOLDEN / "loop_and_branch.hlo").read_text()


def predict(kernel_flops=lambda stage, name: 0.0):
  return step_time.predict(PROGRAM, RATES, DEVICE, 2, kernel_flops)


def by_part(time):
  return {
    (entry["stage"], entry["part"], entry["pass"]): entry["cycles"]
    for entry in time["parts"]
  }


def test_loops_calls_and_branches_multiply_by_hand():
  parts = by_part(predict())
  # Three runs of 40; the dearer branch and what hides the gather; the call.
  assert parts[1, "projections", "forward"] == 120
  assert parts[None, "optimizer", "update"] == 70 + 11
  assert parts[None, "copies and layout", "update"] == 5
  # 2 * 16 bytes of 4 rows moved at 10 a cycle.
  assert parts[None, "embedding", "forward"] == 2 * 4 * 4 / 10
  # Reads 8 x 16 and 8 x 4, writes 8 x 16 numbers of two bytes, three times.
  kernel = 3 * 2 * (8 * 16 + 8 * 4 + 8 * 16) / 10
  assert parts[2, "attention kernel", "backward"] == pytest.approx(kernel)


def test_a_collective_costs_what_the_schedule_does_not_hide():
  # 32 floats, three quarters of them over the links, a byte a cycle; between
  # start and done: 11 cycles (what branches and calls take is not known).
  exposed = by_part(predict())[None, "collectives", "update"]
  assert exposed == 32 * 4 * 3 / 4 - 11


def test_parts_sum_to_the_total_and_nothing_is_dropped():
  time = predict()
  parts = by_part(time)
  assert time["total_cycles"] == pytest.approx(sum(parts.values()))
  assert time["seconds"] == pytest.approx(time["total_cycles"] / 1e9)
  names = {row["name"] for row in time["unestimated"]}
  assert names == {"kernel.1", "ags", "rows"}
  for share in ("flops_share", "bytes_share"):
    assert all(0 <= row[share] <= 1 for row in time["unestimated"])
  assert len(step_time.lines(time)) > len(parts)


def test_products_and_kernels_count_their_flops():
  time = predict(lambda stage, name: 1e4 if name[:8] == "kernel.1" else 0.0)
  (product,) = [x for x in time["largest"] if x["name"] == "fusion.1"]
  assert product["flops"] == 3 * 2 * 8 * 4 * 16
  # 10,000 FLOPs at 100 a cycle outweigh the bytes.
  assert by_part(time)[2, "attention kernel", "backward"] == 3 * 100
  (kernel,) = [x for x in time["unestimated"] if x["name"] == "kernel.1"]
  assert kernel["flops_share"] == 3e4 / (3e4 + product["flops"])


def test_branches_count_as_often_as_they_are_taken():
  text = PROGRAM.replace(
    "true_computation=%cheap, false_computation=%dear",
    "branch_computations={%cheap, %dear}",
  )
  parts = by_part(step_time.predict(text, RATES, DEVICE, 2, shares=(0.9, 0.1)))
  assert parts[None, "optimizer", "update"] == pytest.approx(0.1 * 70 + 11)
  cheap = 0.9 * 7 + 5  # its branch has no path: copies and layout
  assert parts[None, "copies and layout", "update"] == pytest.approx(cheap)
  # A conditional of another number of branches: the dearest.
  same = step_time.predict(text, RATES, DEVICE, 2, shares=(0.5, 0.3, 0.2))
  assert by_part(same) == by_part(predict())


def test_a_turn_has_its_share_of_what_a_call_does_once():
  text = PROGRAM.replace("constant(3)", "negate(%i)")
  time = step_time.predict(text, RATES, DEVICE, 2, turns=10)
  assert time["loops_counted_once"] == ["while.1"]
  parts = by_part(time)
  assert parts[1, "projections", "forward"] == pytest.approx(40)
  assert parts[None, "optimizer", "update"] == pytest.approx((70 + 11) / 10)


STARTED = """HloModule jit_f, is_scheduled=true

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]) parameter(0)
  %y = f32[8]{0} get-tuple-element(%s), index=1
  %m = f32[8]{0} negate(%y), backend_config={"estimated_cycles":"10"}
  ROOT %r = (s32[], f32[8]) tuple(%s, %m)
}

%cond (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[100], b: f32[400], q: (s32[], f32[8])) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %b = f32[400]{0} parameter(1)
  %q = (s32[], f32[8]) parameter(2)
  %made = f32[9000]{0} custom-call(), custom_call_target="AllocateBuffer"
  %cs = (f32[100]{0}, f32[100]{0}, u32[]) copy-start(%a)
  %ss = ((f32[400]{0}), f32[50]{0}, s32[]) slice-start(%b), slice={[0:50]}
  %w = (s32[], f32[8]) while(%q), condition=%cond, body=%body
  %sd = f32[50]{0} slice-done(%ss)
  %cd = f32[100]{0} copy-done(%cs)
  ROOT %z = f32[100]{0} negate(%cd), metadata={op_name="jit(f)/jvp(AUNet)/deepest/ffn/neg"}, backend_config={"estimated_cycles":"1"}
}
"""  # noqa: E501


def test_a_started_copy_costs_what_the_schedule_does_not_hide():
  time = step_time.predict(STARTED, RATES, DEVICE, 2)
  rows = {row["name"]: row["cycles"] for row in time["largest"]}
  # 100 and 50 floats at 10 bytes a cycle, less three runs of 10 in the loop;
  # a name for memory costs nothing, nor what is not moved of b.
  assert rows == {"cd": 40 - 30, "sd": 0, "m": 30, "z": 1}
  assert by_part(time)[2, "copies and layout", "forward"] == 10  # its reader's


IN_PLACE = (GOLDEN / "in_place.hlo").read_text()


def test_a_roofline_counts_only_what_slices_move():
  time = step_time.predict(IN_PLACE, RATES, DEVICE, 1)
  assert time["method"] == "roofline"
  moved = {row["name"]: row for row in time["largest"]}
  assert moved["row"]["bytes"] == 2 * 8 * 4
  # The update is read and written; the index is one integer.
  assert moved["write"]["bytes"] == 8 * 4 + 4 + 8 * 4
  assert moved["dot"]["flops"] == 2 * 8 * 8 * 64
  by_flops, by_bytes = 2 * 8 * 8 * 64 / 100, (2 * 64 * 8 + 64) * 4 / 10
  assert moved["dot"]["cycles"] == max(by_flops, by_bytes)


def test_operands_are_read_with_and_without_their_types():
  text = PROGRAM.replace("fusion(%x, %w)", "fusion(bf16[8,16]{1,0} %x, %w)")
  for program in (PROGRAM, text):
    computations, _ = hlo.parse(program)
    assert hlo.operands(computations["body"], "fusion.1") == ["x", "w"]


def test_a_loop_that_data_end_is_named():
  text = PROGRAM.replace("constant(3)", "negate(%i)")
  time = step_time.predict(text, RATES, DEVICE, 2)
  assert time["loops_counted_once"] == ["while.1"]
  assert by_part(time)[1, "projections", "forward"] == 40


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    ("jit(f)/jvp(AUNet)/expand_1/blocks/ffn_norm/mul", (1, "norms", "forward")),
    ("jit(f)/jvp(AUNet)/pool_2/dot_general", (2, "pool", "forward")),
    (
      "jit(f)/transpose(jvp(AUNet))/upsample_1/gmm",
      (1, "upsample", "backward"),
    ),
    (
      "jit(f)/transpose(jvp(AUNet))/deepest/blocks/rematted_computation/ffn/dot",
      (3, "feed-forward", "repeated"),
    ),
    (
      "jit(f)/transpose(jvp(AUNet))/deepest/while/body/checkpoint/blocks/ffn/dot",
      (3, "feed-forward", "backward"),
    ),
    ("jit(f)/jvp(AUNet)/dot_general", (None, "head and loss", "forward")),
    ("jit(f)/add", (None, "optimizer", "update")),
  ],
)
def test_a_path_says_stage_part_and_pass(path, expected):
  x = step_time.Instruction("a", "fusion", path, 1, 1.0, 0.0, 0.0)
  assert step_time.place(x, 3) == expected


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    ("branch_0_fun/expand_1/attention/with_cache/dot", "attention with cache"),
    ("branch_0_fun/expand_1/attention/dot", "attention, around the kernel"),
    ("branch_1_fun/deepest/ffn/dot_general", "feed-forward"),
    ("branch_1_fun/deepest/ffn_norm/mul", "norms"),
    ("branch_1_fun/pool_1/dot_general", "pool"),
    ("branch_1_fun/upsample_1/dot_general", "upsample"),
    ("branch_0_fun/head/dot_general", "head"),
    ("branch_0_fun/sampling/cond/sort", "sampling"),
    ("branch_0_fun/splitting/gather", "splitting"),
    ("branch_0_fun/embedding/gather", "embedding"),
    ("contract_1/cache_write/scatter", "cache updates"),
    ("branch_0_fun/expand_1/add", "residuals"),
    ("branch_0_fun/add", "schedule and state"),
  ],
)
def test_a_path_of_decoding_says_its_part(path, expected):
  path = f"jit(run)/while/body/cond/{path}"
  x = step_time.Instruction("a", "fusion", path, 1, 1.0, 0.0, 0.0)
  assert step_time.place(x, 2, training=False)[1:] == (expected, "forward")


def test_two_reports_are_compared(tmp_path, capsys):
  slower = step_time.predict(PROGRAM.replace('"40"', '"60"'), RATES, DEVICE, 2)
  files = []
  for number, time in enumerate((predict(), slower)):
    files.append(str(tmp_path / f"{number}.json"))
    with open(files[-1], "w") as file:
      report = json.dumps({"programs": {"train": {"time": time}}})
      file.write(f"a table\n{report}\n")
  assert compile_main.main(["--compare", *files]) == 0
  out = capsys.readouterr().out
  assert "+60  stage 1 projections, forward" in out and out.count("\n") == 2
  (tmp_path / "bad.json").write_text("[]")
  assert compile_main.main(["--compare", files[0], str(tmp_path / "bad.json")])
  assert "no report of --time" in capsys.readouterr().err


def test_a_device_without_rates_is_refused_before_anything_compiles(capsys):
  assert compile_main.main(["--config=tests/tiny.py", "--time"]) == 2
  assert "--topology=v5e:4x4" in capsys.readouterr().err


def test_a_kernel_without_a_path_takes_its_users():
  text = PROGRAM.replace(
    "ROOT %t = (s32[], bf16[8,16]) tuple(%s, %kernel.1)",
    """%bitcast.1 = bf16[8,16]{1,0} bitcast(%splash_fwd_1)
  %user = bf16[8,16]{1,0} negate(%bitcast.1), metadata={op_name=
  ROOT %t = (s32[], bf16[8,16]) tuple(%s, %user)""".replace(
      "op_name=",
      'op_name="transpose(jvp(AUNet))/expand_1/blocks/attention/slice"}, '
      'backend_config={"estimated_cycles":"1"}',
    ),
  )
  text = text.replace("%kernel.1", "%splash_fwd_1").split("\n")
  text = [
    line.partition(", metadata")[0] if "tpu_custom_call" in line else line
    for line in text
  ]
  time = step_time.predict("\n".join(text), RATES, DEVICE, 2)
  # A forward kernel in the backward pass is repeated.
  assert (1, "attention kernel", "repeated") in by_part(time)


def test_a_collective_inside_a_fusion_is_not_lost():
  text = PROGRAM.replace(
    "ROOT %dot.1 = bf16[8,4]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf",
    "ROOT %sum = bf16[8,4]{1,0} all-reduce(%p0), channel_id=9, "
    "replica_groups={{0,1,2,3}}, to_apply=%cheap",
  )
  sent = [x for x in step_time.read(text)[0] if x.opcode == "all-reduce"]
  assert [(x.name, x.times, x.bytes) for x in sent] == [
    ("fusion.1", 3, 3 * 8 * 4 * 2)
  ]
  # Without an estimate it is the collective and nothing more.
  text = re.sub(r"(fusion\(.*?), backend_config=.*", r"\1", text)
  assert "fusion.1" not in [
    x.name for x in step_time.read(text)[0] if x.opcode == "fusion"
  ]
