"""What a run will need, measured on its compiled programs."""

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from aunet_jax.aunet import attention, counts, devices, sharding
from aunet_jax.aunet.block import mixer_of
from aunet_jax.aunet.devices import GIB
from aunet_jax.compile import (
  collectives,
  measured,
  programs,
  step_time,
  turns,
)
from aunet_jax.config import Config
from aunet_jax.generate.generator import MAX_TURNS
from aunet_jax.train import optimizer, state

# ----- what was compiled ----------------------------------------------------


def flops_per_device(config: Config, mesh) -> dict:
  """Of one training step, from `counts`; rows taken to be full."""
  model = config.model
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = config.train.batch_size // shards // config.train.grad_accumulation
  where = (rows, sharding.platform(mesh))
  share = config.train.batch_size / shards / mesh.shape["tensor"]
  useful = counts.useful_train_flops(model, model.capacities)
  return {
    "useful": useful * share,
    "padded": counts.train_flops_per_row(model, *where) * share,
    "repeated_by_remat": counts.remat_flops_per_row(model, where[1]) * share,
  }


def _parameter_sizes(config: Config, mesh) -> set[int]:
  """Elements that the arrays of a gather or a gradient's sum may have."""
  tx = optimizer.make_optimizer(config)
  abstract, shardings = state.abstract_state(config.model, tx, mesh)
  sizes = set()
  leaves = jax.tree.leaves_with_path(abstract.params)
  for (path, leaf), where in zip(
    leaves, jax.tree.leaves(shardings.params), strict=True
  ):
    stacked = leaf.shape[0] if "'blocks'" in str(path[1:2]) else 1
    # Whole but for `tensor`, and as a device keeps it.
    own = int(np.prod(where.shard_shape(leaf.shape)))
    axes = [axis for part in where.spec if part for axis in np.atleast_1d(part)]
    fsdp = mesh.shape["fsdp"] if "fsdp" in axes else 1
    for layers in {1, stacked}:
      sizes |= {own // layers, own * fsdp // layers}
  return sizes


def traffic(config: Config, mesh, hlo: str, *, training: bool) -> dict:
  """The program's collectives, sorted into expected ones and others."""
  found, unknown_loops = collectives.find(hlo)
  sizes = np.array(sorted(_parameter_sizes(config, mesh)))

  def is_parameter(shape):
    """As many elements as one, or as one padded to whole tiles."""
    dtype, dims = shape
    elements = int(np.prod(dims))
    return dtype[0] in "bf" and bool(
      ((sizes <= elements) & (elements <= 1.15 * sizes)).any()
    )

  sums = {"parameter_gathers": 0, "gradient_reductions": 0}
  others = {}
  for collective in found:
    kind = {"all-gather": "parameter_gathers"}.get(
      collective.kind,
      "gradient_reductions" if training else None,
    )
    known = kind and collective.kind in (
      "all-gather",
      "all-reduce",
      "reduce-scatter",
    )
    mine = [s for s in collective.shapes if known and is_parameter(s)]
    rest = [s for s in collective.shapes if s not in mine]
    for shapes, name in ((mine, kind), (rest, None)):
      if not shapes:
        continue
      part = dataclasses.replace(collective, shapes=tuple(shapes))
      if name:
        sums[name] += part.bytes
        continue
      key = (part.kind, part.shapes, part.op_name.rpartition("/")[0][-60:])
      entry = others.setdefault(key, {"times": 0, "bytes": 0})
      entry["times"] += part.times
      entry["bytes"] += part.bytes
  listed = [
    {
      "kind": kind,
      "arrays": [f"{dtype}{list(dims)}" for dtype, dims in shapes][:4],
      "where": where,
      **entry,
    }
    for (kind, shapes, where), entry in others.items()
  ]
  listed.sort(key=lambda entry: -entry["bytes"])
  result = {"by_kind": collectives.by_kind(found), **sums, "others": listed}
  result["loops_counted_once"] = len(unknown_loops)
  if training:
    result["expected"] = counts.collective_bytes(
      config.model,
      **dict(mesh.shape),
      grad_accumulation=config.train.grad_accumulation,
    )
  return result


def _advice(config: Config, mesh) -> str:
  tries = []
  if mesh.shape["fsdp"] < mesh.size:
    tries.append("raise mesh.fsdp, which splits the parameters further")
  rows = config.train.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
  accumulation = config.train.grad_accumulation
  if rows > accumulation:
    tries.append(
      f"raise train.grad_accumulation={accumulation}: a device computes "
      f"{rows // accumulation} rows at once"
    )
  if any(stage.remat != "full" for stage in config.model.stages):
    tries.append('set remat="full" for the largest stages (model.stages[i])')
  unrolled = config.model.unroll_layers
  if unrolled or unrolled is None and sharding.platform(mesh) == "tpu":
    tries.append(
      "set model.unroll_layers=False, which needs less on v5e and more on v6e"
    )
  tries.append("raise mesh.tensor, or take more devices")
  return "; ".join(tries) + "."


def check_flops(config: Config, mesh) -> dict:
  """FLOPs of a device by XLA's count, extrapolated, and what they should be.

  XLA counts the body of a loop once, so layers are unrolled: one program with
  one layer in every stack, and for each stage one with two. It sees no kernel
  inside (attention's and the grouped product of upsampling), so those are
  left out of what is expected too. One microbatch, no remat.
  """
  model = config.model
  rows = config.train.batch_size // config.train.grad_accumulation
  rows //= mesh.shape["data"] * mesh.shape["fsdp"]

  def program(num_layers):
    stages = tuple(
      dataclasses.replace(stage, num_layers=n, remat="none")
      for stage, n in zip(model.stages, num_layers, strict=True)
    )
    return dataclasses.replace(
      config,
      model=dataclasses.replace(model, stages=stages, unroll_layers=True),
      train=dataclasses.replace(
        config.train,
        batch_size=config.train.batch_size // config.train.grad_accumulation,
        grad_accumulation=1,
      ),
    )

  def counted(num_layers):
    compiled = programs.compile_train(program(num_layers), mesh)
    return compiled.cost_analysis()["flops"]

  ones = (1,) * model.num_stages
  base = total = counted(ones)
  for i, stage in enumerate(model.stages):
    if stage.num_layers > 1:
      twos = tuple(2 if j == i else 1 for j in range(model.num_stages))
      total += (stage.num_layers - 1) * (counted(twos) - base)
  platform = sharding.platform(mesh)
  seen = again = 0
  for stage, kinds in zip(
    model.stages,
    counts.padded_forward_flops(model, rows, platform),
    strict=True,
  ):
    unseen = ["upsample"]
    if attention.pick(stage.attention, platform) != "xla":
      unseen.append("scores")
    else:
      again += counts.SCORES_AGAIN * kinds["scores"]
    seen += sum(n for kind, n in kinds.items() if kind not in unseen)
  for fine, coarse in zip(model.stages, model.stages[1:], strict=False):
    if model.parametric:
      seen += 2 * coarse.capacity * fine.dim * coarse.dim
  expected = rows * (3 * seen + again) / mesh.shape["tensor"]
  accumulation = config.train.grad_accumulation
  return {
    "counted_by_xla": total * accumulation,
    "expected": expected * accumulation,
  }


def predict_time(
  config: Config, mesh, hlo: str, decode_rows: int | None = None
) -> dict:
  """A program's `step_time.predict`, with what it means for the model.

  Args: decode_rows: that decode together, and the program is their loop, of
    which a turn is predicted; None: it is a training step.
  """
  device, model = mesh.devices.flat[0], config.model
  known = _known_device(mesh)
  rates = step_time.calibrate(device, known)
  if decode_rows is not None:
    schedule = programs.decode_schedule(config, mesh, decode_rows)
    average = turns.expected(model, schedule, decode_rows)
    time = step_time.predict(
      hlo,
      rates,
      known,
      model.num_stages,
      shares=average.shares,
      turns=MAX_TURNS,
      training=False,
    )
    named = zip(turns.names(model), average.shares, average.rows, strict=True)
    time["phases"] = [
      {"phase": name, "share": share, "rows": rows}
      for name, share, rows in named
    ]
    time["bytes_per_turn"] = average.bytes
    time["bytes_per_second"] = average.bytes / time["seconds"] / mesh.size
    return time

  rows = config.train.batch_size // config.train.grad_accumulation
  rows /= mesh.shape["data"] * mesh.shape["fsdp"]
  # Forward, an attention kernel forms two products. Backward it forms five, or
  # seven in two kernels that both make the scores and their gradients again.
  products = {
    "_dq": 3, "_dkv": 4 if "_dq_" in hlo else 5, "_query_gradient": 3,
    "_key_gradient": 4,
  }  # fmt: skip

  def kernel_flops(stage, name):
    found = re.search("|".join(products), name)
    stage = model.stages[stage - 1]
    platform = sharding.platform(mesh)
    forward = mixer_of(stage).flops(stage, stage.capacity, platform)
    forward *= rows / mesh.shape["tensor"]
    return forward * (products[found[0]] / 2 if found else 1)

  time = step_time.predict(hlo, rates, known, model.num_stages, kernel_flops)
  useful = flops_per_device(config, mesh)["useful"]
  time["predicted_useful_mfu"] = useful / (time["seconds"] * known.flops)
  positions = config.train.batch_size * model.capacities[0] / mesh.size
  time["bytes_per_second"] = positions / time["seconds"]
  return time


def _known_device(mesh) -> devices.Device:
  known = devices.find(mesh.devices.flat[0])
  if known is None:
    raise ValueError(
      f"--time knows no rates of {mesh.devices.flat[0].device_kind!r}; name a "
      f"device that it knows, as --topology=v5e:4x4."
    )
  return known


# ----- the report -----------------------------------------------------------


def report(
  config: Config,
  mesh,
  *,
  what: Sequence[str] = ("train",),
  decode_rows: int = 8,
  decode_bytes: int | None = None,
  check: bool = False,
  time_parts: bool = False,
  say=lambda line: None,
) -> dict:
  """Compiles and measures the named programs; JSON-able.

  Args: what: of "train" and "decode". decode_bytes: history in the caches;
    None: a whole row. time_parts: predict the time of each program by part.
  Raises: ValueError where a device's rates are not known, to predict with.
  """
  if time_parts:
    _known_device(mesh)
  limit = devices.memory_limit(mesh.devices.flat[0])
  if decode_bytes is None:
    decode_bytes = config.model.capacities[0]
  result = {
    "device": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "programs": {},
  }
  for name in what:
    say(f"compiling {name} …")
    began = time.perf_counter()
    program = {"fits": True}
    try:
      if name == "train":
        compiled = programs.compile_train(config, mesh)
      else:
        compiled = programs.compile_decode(
          config, mesh, decode_rows, decode_bytes
        )
    except programs.DoesNotFit as error:
      needed = error.needed_bytes
      program = {
        "fits": False,
        "memory": {"needed": needed, "available": limit},
        "advice": _advice(config, mesh),
      }
      result["programs"][name] = program
      continue
    program["compile_seconds"] = round(time.perf_counter() - began, 1)
    program["memory"] = programs.memory(compiled, limit)
    if limit is not None and program["memory"]["needed"] > limit:
      program |= {"fits": False, "advice": _advice(config, mesh)}
    if name == "train":
      program["flops_per_device"] = flops_per_device(config, mesh)
      if check:
        say("compiling unrolled programs to check FLOPs …")
        program["check"] = check_flops(config, mesh)
    else:
      program |= {"rows": decode_rows, "history_bytes": decode_bytes}
    hlo, training = compiled.as_text(), name == "train"
    program["collectives"] = traffic(config, mesh, hlo, training=training)
    if time_parts:
      rows = None if training else decode_rows
      program["time"] = predict_time(config, mesh, hlo, rows)
    result["programs"][name] = program
  result["fits"] = all(p["fits"] for p in result["programs"].values())
  return result


def profiled(
  config: Config,
  mesh,
  path: Path,
  *,
  time_parts: bool = False,
  say=lambda line: None,
) -> dict:
  """A recorded training step's time by part, as `report` gives programs.

  Args: path: see `measured.find`. time_parts: also the prediction for the same
    program.
  Raises: ValueError where nothing is recorded there, or a device's rates are
    not known.
  """
  if time_parts:
    _known_device(mesh)
  recordings, text = measured.find(path)
  kept = text is not None
  if not kept:
    say(f"compiling the step: {path} holds recordings without their program …")
    text = programs.compile_train(config, mesh).as_text()
  stages = config.model.num_stages
  program = {"program_kept": kept, "profile": [str(p) for p in recordings]}
  program["measured"] = measured.of_files(recordings, text, stages)
  if time_parts:
    program["time"] = predict_time(config, mesh, text)
  return program


def _gib(size: float | None) -> str:
  return "?" if size is None else f"{size / GIB:.2f} GiB"


def _memory_lines(program: dict) -> list[str]:
  sizes = program["memory"]
  if "arguments" not in sizes:
    return [f"  needed     {_gib(sizes['needed'])}: the compiler refused it"]
  new = sizes["outputs"] - sizes["outputs_in_place"]
  return [
    f"  arguments  {_gib(sizes['arguments'])}  state and batch, or caches",
    f"  temporary  {_gib(sizes['temporary'])}  saved for backward, gathered "
    f"matrices, gradients",
    f"  outputs    {_gib(new)}  that do not overwrite arguments",
    f"  needed     {_gib(sizes['needed'])}  at once",
  ]


def _ratio(found: float, expected: float) -> str:
  if expected == 0:
    return f"{found / 1e6:,.1f} MB, expected none"
  return (
    f"{found / 1e6:,.1f} MB, expected {expected / 1e6:,.1f} "
    f"({found / expected - 1:+.1%})"
  )


def table(result: dict) -> str:
  """A report as text to read."""
  mesh = " x ".join(f"{axis}={n}" for axis, n in result["mesh"].items())
  lines = [f"{result['devices']} x {result['device']}, mesh {mesh}"]
  for name, program in result["programs"].items():
    title = "training step" if name == "train" else "decoding, one turn"
    if name == "decode":
      title += (
        f": {program.get('rows')} rows, {program.get('history_bytes')} bytes "
        f"of history"
      )
    seconds = program.get("compile_seconds")
    lines += ["", title + (f" (compiled in {seconds} s)" if seconds else "")]
    lines += ["memory of a device", *_memory_lines(program)]
    sizes = program["memory"]
    if sizes["available"] is None:
      lines.append("  available  unknown for this device")
    else:
      lines.append(f"  available  {_gib(sizes['available'])}")
    if not program["fits"]:
      lines += [f"  DOES NOT FIT. Try: {program['advice']}"]
    elif sizes["margin"] is not None:
      lines.append(f"  margin     {sizes['margin']:.1%}")
    if "collectives" not in program:
      continue
    if "flops_per_device" in program:
      flops = program["flops_per_device"]
      lines += ["FLOPs of a device (full rows)"]
      lines += [
        f"  useful     {flops['useful'] / 1e12:.2f} T  real positions and "
        f"unmasked keys",
        f"  padded     {flops['padded'] / 1e12:.2f} T  what kernels multiply",
        f"  repeated   {flops['repeated_by_remat'] / 1e12:.2f} T  by the "
        f"backward pass",
      ]
    if "check" in program:
      check = program["check"]
      lines.append(
        f"  check      {check['counted_by_xla'] / 1e12:.2f} T by XLA without "
        f"kernels, expected {check['expected'] / 1e12:.2f} T "
        f"({check['counted_by_xla'] / check['expected'] - 1:+.1%})"
      )
    lines += _traffic_lines(program["collectives"])
    if "time" in program:
      lines += step_time.lines(program["time"])
  return "\n".join(lines)


def _traffic_lines(sent: dict) -> list[str]:
  lines = ["sent between devices: bytes of the largest array a device holds"]
  for kind, entry in sorted(
    sent["by_kind"].items(), key=lambda item: -item[1]["bytes"]
  ):
    lines.append(
      f"  {kind:<18}  {entry['bytes'] / 1e6:>10,.1f} MB  {entry['count']:,} x"
    )
  if not sent["by_kind"]:
    lines.append("  nothing")
  if "expected" in sent:
    for key, expected in sent["expected"].items():
      text = _ratio(sent[key], expected)
      lines.append(f"  {key.replace('_', ' ')}: {text}")
    # XLA gathers some matrices by summing them with zeros.
    both = [
      sum(sums[key] for key in sent["expected"])
      for sums in (sent, sent["expected"])
    ]
    lines.append(f"  both together: {_ratio(*both)}")
  if sent["others"]:
    lines.append("  others, largest first")
  for entry in sent["others"][:8]:
    lines.append(
      f"    {entry['bytes'] / 1e6:>8,.2f} MB  {entry['times']:,} x "
      f"{entry['kind']} {' '.join(entry['arrays'])}  {entry['where']}"
    )
  if sent["loops_counted_once"]:
    lines.append(
      f"  {sent['loops_counted_once']} loops of unknown length are counted "
      f"once: a turn of decoding is one"
    )
  return lines
