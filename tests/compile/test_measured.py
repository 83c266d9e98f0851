"""Measured times by part: of a real CPU profile, and of ones made by hand."""

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aunet_jax.compile import measured, step_time
from tests.compile.test_step_time import DEVICE, PROGRAM, RATES

ProfileData = jax.profiler.ProfileData


def plane(name, lines):
  """A plane as text. lines: name -> [(event, start ns, ns, {stat: value})]."""
  events, stats, text = {}, {}, []
  for number, (line, listed) in enumerate(lines.items()):
    text.append(f'lines {{ id: {number} name: "{line}" timestamp_ns: 1000')
    for event, start, length, more in listed:
      key = events.setdefault(event, len(events) + 1)
      text.append(
        f"events {{ metadata_id: {key} offset_ps: {start * 1000} "
        f"duration_ps: {length * 1000}"
      )
      for stat, value in more.items():
        key = stats.setdefault(stat, len(stats) + 1)
        text.append(f'stats {{ metadata_id: {key} str_value: "{value}" }}')
      text.append("}")
    text.append("}")
  for kind, names in (("event", events), ("stat", stats)):
    for name_, key in names.items():
      text.append(
        f"{kind}_metadata {{ key: {key} value {{ id: {key} "
        f'name: "{name_}" }} }}'
      )
  return f'planes {{ name: "{name}" {" ".join(text)} }}'


def planes(*texts):
  return ProfileData.from_text_proto("\n".join(texts)).planes


def by_part(result):
  return {
    (entry["stage"], entry["part"], entry["pass"]): entry["seconds"]
    for entry in result["parts"]
  }


def tpu(number, fusion):
  """Two runs of the stored program: three turns of its loop each, of which one
  lasts `fusion` ns; another program; and a run's end before the recording."""
  full = "%fusion.1 = bf16[8,4]{1,0} fusion(%x, %w), kind=kOutput"
  ops = [("%rows = f32[4]{0} gather(%hide, %u)", 0, 9, {})]
  modules = [("jit_train_step(7)", 0, 10, {})]
  for start in (100, 1100):
    modules.append(("jit_train_step(7)", start, 900, {}))
    ops.append(("%while.1 = (s32[]) while(%q)", start, 600, {}))
    for turn in range(3):
      ops.append((full, start + 200 * turn, fusion, {}))
      ops.append(
        (
          "%kernel.1 = bf16[8,16] custom-call()",
          start + 200 * turn + fusion,
          20,
          {},
        )
      )
    ops.append(("%n2 = f32[8]{0} negate(%b)", start + 620, 70, {}))
    ops.append(("%ags = (f32[8]) all-gather-start(%g)", start + 700, 1, {}))
    ops.append(("%agd = f32[32] all-gather-done(%ags)", start + 710, 30, {}))
    ops.append(("%rows = f32[4]{0} gather(%hide, %u)", start + 800, 9, {}))
  modules.append(("jit_other(8)", 2100, 100, {}))
  ops.append((full, 2100, 90, {}))
  return plane(f"/device:TPU:{number}", {
    "Steps": [("1", 100, 900, {})], "XLA Modules": modules, "XLA Ops": ops,
  })  # fmt: skip


def test_a_tpus_events_are_summed_by_part_and_run():
  result = measured.measure(planes(tpu(0, 100), tpu(1, 120)), PROGRAM, 2)
  parts = by_part(result)
  assert parts[1, "projections", "forward"] == pytest.approx(3 * 110e-9)
  kernel = parts[2, "attention kernel", "backward"]
  assert kernel == pytest.approx(3 * 20e-9)
  assert parts[None, "optimizer", "update"] == pytest.approx(70e-9)
  assert parts[None, "collectives", "update"] == pytest.approx(31e-9)
  assert parts[None, "embedding", "forward"] == pytest.approx(9e-9)
  assert result["seconds"] == pytest.approx(sum(parts.values()))
  # Loops are left out, and so are other programs.
  assert result["device"] == "TPU" and result["devices"] == 2
  assert result["runs"] == 2 and result["unknown_share"] == 0
  assert result["run_seconds"] == pytest.approx(900e-9)


def test_a_prediction_stands_beside_what_was_measured():
  result = measured.measure(planes(tpu(0, 100)), PROGRAM, 2)
  predicted = step_time.predict(PROGRAM, RATES, DEVICE, 2)
  text = "\n".join(measured.lines(result, predicted))
  # Three runs of 40 cycles, a nanosecond each; measured three of 100.
  assert "  2.50  stage 1  projections, forward" in text
  # What was predicted and not measured is a row, too.
  assert "  0.00           copies and layout, update" in text
  assert "predicted" not in "\n".join(measured.lines(result, None))


def test_a_gpus_kernels_are_of_the_instruction_they_name():
  of_step = {"hlo_module": "jit_train_step"}
  stream = [("gemm_fusion", 10 + 50 * i, 40, of_step | {"hlo_op": "fusion.1"})
            for i in range(6)]  # fmt: skip
  stream += [("loop_neg", 400 + i, 1, of_step | {"hlo_op": "n2"})
             for i in range(2)]  # fmt: skip
  stream.append(("MemcpyD2D", 500, 77, {}))
  stream.append(("gone", 600, 5, of_step | {"hlo_op": "gone.1"}))
  stream.append(("other", 700, 5, {"hlo_module": "jit_f", "hlo_op": "n2"}))
  text = plane(
    "/device:GPU:0",
    {"Stream #13(Compute)": stream, "XLA Ops": [("fusion.1", 0, 900, {})]},
  )
  result = measured.measure(planes(text), PROGRAM, 2)
  assert result["device"] == "GPU" and result["runs"] == 2
  assert by_part(result)[1, "projections", "forward"] == pytest.approx(120e-9)
  assert by_part(result)[None, "optimizer", "update"] == pytest.approx(1e-9)
  assert result["unknown_share"] == pytest.approx(5 / (5 + 240 + 2))
  assert "another version" in "\n".join(measured.lines(result, None))


def test_a_real_profile_of_a_cpu_names_its_parts(tmp_path):
  def loss(w, x):
    def layer(x, _):
      with jax.named_scope("ffn"):
        return jnp.tanh(x @ w), None

    with jax.named_scope("contract_1"):
      x, _ = jax.lax.scan(layer, x, None, length=3)
    return (x * x).sum()

  step = jax.jit(jax.grad(loss)).lower(jnp.ones((64, 64)), jnp.ones((64, 64)))
  step = step.compile()
  folder = tmp_path / "profile"
  with jax.profiler.trace(str(folder)):
    for _ in range(4):
      jax.block_until_ready(step(jnp.ones((64, 64)), jnp.ones((64, 64))))
  (folder / measured.PROGRAM_FILE).write_bytes(
    gzip.compress(step.as_text().encode())
  )
  (recording,), text = measured.find(tmp_path)
  assert measured.find(recording) == ([recording], text)
  result = measured.of_files([recording], text, 2)
  parts = by_part(result)
  assert result["device"] == "CPU" and result["runs"] == 4
  assert parts[1, "feed-forward", "forward"] > 0
  assert parts[1, "feed-forward", "backward"] > 0
  assert result["unknown_share"] == 0
  with pytest.raises(ValueError, match="no event of jit_train_step"):
    measured.of_files([recording], PROGRAM, 2)


def test_the_newest_recording_is_taken_and_damage_is_said(tmp_path):
  with pytest.raises(ValueError, match="--profile=FIRST:LAST"):
    measured.find(tmp_path)
  for day in ("2026_01_01", "2026_01_02"):
    folder = tmp_path / "profile" / "plugins" / "profile" / day
    folder.mkdir(parents=True)
    for host in "ab":
      (folder / f"{host}.xplane.pb").write_bytes(b"no profile")
  found, text = measured.find(tmp_path)
  assert {p.parent.name for p in found} == {"2026_01_02"} and text is None
  assert len(found) == 2
  with pytest.raises(ValueError, match="a.xplane.pb is no profile"):
    measured.of_files(found, PROGRAM, 2)
  Path(tmp_path / "profile" / measured.PROGRAM_FILE).write_bytes(b"x")
  with pytest.raises(ValueError, match="is damaged"):
    measured.find(tmp_path)
