"""A program's time by part, from the estimates its compiler wrote into it.

The TPU compiler gives most instructions of the program that it schedules an
estimate in cycles. Summed with the loops' trip counts they are a step's time
without a chip: deterministic, free of noise. What carries no estimate is
modelled, and listed:

  kernels (custom calls) and all else  the larger of FLOPs over the rate of one
      large product and bytes over the rate of one large copy, both estimated
      by the same compiler (`Rates`). A kernel's FLOPs are those that
      `counts` says its stage multiplies.
  copies that are started and waited for later  bytes over that rate, less the
      estimates of what the schedule runs meanwhile: what is left is exposed.
  collectives  a ring's bytes over half the links' bandwidth (it sends and
      receives), less the estimates of what the schedule runs between start and
      done: what is left is exposed.
  conditionals  the dearest branch, or each as often as the caller says it is
      taken (a turn of decoding). Loops of unknown length count once.

These are estimates of a compiler, not measurements: compare shares and ratios.
A program without any estimate (GPUs) is a *roofline*: every instruction is the
larger of its FLOPs and bytes over the device's rates, a cycle a nanosecond.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from aunet_jax.aunet.devices import Device
from aunet_jax.compile import collectives
from aunet_jax.compile import hlo as hlo_lib

# Calls that cost nothing: they name memory, or are halves of a collective.
_FREE_CALLS = frozenset(
  "ConcatBitcast AllocateBuffer AssumeGatherIndicesInBound "
  "AsyncCollectiveStart AsyncCollectiveDone Sharding".split()
)
# A copy or slice that moves while other instructions run.
_MOVES = ("copy", "slice", "dynamic-slice")
# Cost nothing by themselves: names for arrays, and ends of what was started.
_FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast after-all partition-id "
  "replica-id iota domain opt-barrier async-done async-update "
  "send-done recv recv-done add-dependency".split()
)
_INSIDE = ("call", "async-start")  # run a computation once
_SENDS = (*collectives.KINDS, *(f"{kind}-done" for kind in collectives.KINDS))
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction as often as a call of the program runs it.

  `cycles` is the compiler's estimate of all its runs; None where it has none.
  """

  name: str
  opcode: str
  op_name: str
  times: float  # 0 in a branch that is taken never
  cycles: float | None
  flops: float
  bytes: float
  group_size: int = 1  # devices of a collective
  hidden_cycles: float = 0  # of all runs: run between its start and its done


@dataclasses.dataclass(frozen=True)
class Rates:
  """Of a device, as its compiler estimates one large product and one copy."""

  flops_per_cycle: float
  bytes_per_cycle: float


# ----- what an instruction computes and moves -------------------------------


def _size(comp, name: str) -> int:
  return sum(hlo_lib.num_bytes(*s) for s in hlo_lib.shapes(comp.kind_of[name]))


def _elements(comp, name: str) -> int:
  return sum(math.prod(d) for _, d in hlo_lib.shapes(comp.kind_of[name])[:1])


def _dims(comp, name: str) -> tuple[int, ...]:
  return hlo_lib.shapes(comp.kind_of[name])[0][1]


def _product_flops(comp, name: str) -> float:
  """2 per multiplication of a dot, or of the convolution TPUs make of it."""
  line, inputs = comp.line[name], hlo_lib.operands(comp, name)
  if comp.opcode[name] == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    dims = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    width = math.prod(_dims(comp, inputs[0])[i] for i in dims)
  else:  # every output feature sums over the rest of the kernel
    labels = re.search(r"dim_labels=\w+_(\w+)->", line)[1]
    kernel = _dims(comp, inputs[1])
    width = math.prod(kernel) / kernel[labels.index("o")]
  return 2.0 * _elements(comp, name) * width


def _flops(computations, comp, name: str) -> float:
  if comp.opcode[name] in ("dot", "convolution"):
    return _product_flops(comp, name)
  if comp.opcode[name] != "fusion":
    return 0.0
  return sum(
    _flops(computations, computations[inner], each)
    for inner in hlo_lib.called(comp.line[name])
    for each in computations[inner].opcode
  )


def _written(comp, name: str) -> int:
  """Bytes of a result that are new: of an update in place, the update."""
  if comp.opcode[name] == "tuple":
    return sum(_written(comp, each) for each in hlo_lib.operands(comp, name))
  if comp.opcode[name] == "bitcast":
    return _written(comp, hlo_lib.operands(comp, name)[0])
  if comp.opcode[name] == "dynamic-update-slice":
    return _size(comp, hlo_lib.operands(comp, name)[1])
  return _size(comp, name)


def _read_by_fusion(comp, parameter: str) -> int:
  """Bytes of a fusion's parameter that are read: of slices, the slices."""
  sizes = []
  for user in comp.opcode:
    inputs = hlo_lib.operands(comp, user) if "(" in comp.line[user] else []
    if parameter not in inputs or comp.opcode[user] == "parameter":
      continue
    if comp.opcode[user] in _SLICES and inputs[0] == parameter:
      sizes.append(_size(comp, user))
    elif comp.opcode[user] == "dynamic-update-slice" and (
      inputs[0] == parameter
    ):
      sizes.append(0)
    else:
      return _size(comp, parameter)
  return sum(sizes)


def _bytes(computations, comp, name: str) -> float:
  """Bytes that an instruction reads and writes."""
  opcode, inputs = comp.opcode[name], hlo_lib.operands(comp, name)
  inputs = [each for each in inputs if each in comp.kind_of]
  if opcode in _SLICES:
    return 2 * _size(comp, name)
  if opcode == "dynamic-update-slice":
    return 2 * _written(comp, name)
  if opcode == "scatter":
    return 2 * _size(comp, inputs[-1])
  if opcode != "fusion":
    return sum(_size(comp, each) for each in inputs) + _size(comp, name)
  inner = computations[hlo_lib.called(comp.line[name])[0]]
  read = sum(
    _read_by_fusion(inner, each)
    for each, kind in inner.opcode.items()
    if kind == "parameter"
  )
  return read + _written(inner, inner.root)


def _where(comp, name: str) -> str:
  """The path of an instruction; of one without, its nearest user's.

  The compiler's own instructions have no path, or a name such as "convert.12".
  """
  path = hlo_lib.op_name(comp.line[name])
  if "/" in path:
    return path
  near = {name}
  names = iter(comp.opcode)
  for user in names:
    if user == name:
      break
  for user in names:
    if near.intersection(hlo_lib.operands(comp, user)):
      found = hlo_lib.op_name(comp.line[user])
      if "/" in found:
        return found
      near.add(user)
  return path


# ----- the program ----------------------------------------------------------


def _estimate(line: str) -> float | None:
  found = re.search(r'"estimated_cycles":"?(\d+)', line)
  return float(found[1]) if found else None


def _collectives(computations, comp, comp_name, num_devices):
  """What a computation's schedule sends: {instruction: (Collective, estimates
  of what runs before the last instruction that belongs to it)}.

  A collective may be one instruction, a start and a done, or steps that are
  fused into the work they hide behind (`collectives.identity`).
  """
  first, last, names = {}, {}, list(comp.opcode)
  started = {}  # start -> its key
  for index, name in enumerate(names):
    line = comp.line[name]
    if comp.opcode[name].endswith("-done"):
      for each in hlo_lib.operands(comp, name):
        if each in started:
          last[started[each]] = index
      continue
    inside = [(comp_name, comp, name)]
    if comp.opcode[name] == "fusion":
      for callee in hlo_lib.called(line):
        fused = computations[callee]
        inside += [(callee, fused, each) for each in fused.opcode]
    for where, owner, each in inside:
      sent = collectives.of_instruction(where, owner, each, 1, num_devices)
      if sent is None:
        continue
      key = collectives.identity(
        where, owner.line[each], each, fused=owner is not comp
      )
      first.setdefault(key, (index, sent))
      last[key] = max(index, last.get(key, index))
      started[name] = key
  found: dict[str, list] = {}
  for key, (index, sent) in first.items():
    between = names[index + 1 : last[key] + 1]
    hidden = sum(_estimate(comp.line[name]) or 0.0 for name in between)
    found.setdefault(names[index], []).append((sent, hidden))
  return found


def _only_sends(computations, line: str) -> bool:
  """Whether a fusion without an estimate is a collective, or an end of one.

  The collective's own time is all that it takes: its result is its operand's
  memory, or made as it arrives.
  """
  return any(
    opcode.removesuffix("-start") in collectives.KINDS
    for callee in hlo_lib.called(line)
    for opcode in computations[callee].opcode.values()
  )


def read(
  hlo: str, shares: Sequence[float] = (), turns: int = 1
) -> tuple[list[Instruction], list[str]]:
  """Every instruction that takes time, and the loops of unknown length.

  Args:
    hlo: `compiled.as_text()`, whose order is the schedule.
    shares: how often the branches are taken of each conditional that has as
      many, and is inside no other; of the others the dearest always is.
    turns: of a loop of unknown length that is inside no other; what is told is
      then one turn's share of the call.
  Raises: ValueError where the text is something else.
  """
  computations, entry = hlo_lib.parse(hlo)
  partitions = re.search(r"num_partitions=(\d+)", hlo)
  num_devices = int(partitions[1]) if partitions else 1
  unknown: list[str] = []

  def visit(comp_name, times, inside=False, turning=False):
    """Instructions; inside a conditional, or a loop of unknown length."""
    comp, found = computations[comp_name], []
    sends = _collectives(computations, comp, comp_name, num_devices)
    names, spent = list(comp.opcode), []  # cycles of each, in this order

    def add(name, opcode, op_name, num_bytes, cycles=None, flops=0.0, **more):
      found.append(
        Instruction(
          name=name,
          opcode=opcode,
          op_name=op_name,
          times=times,
          cycles=None if cycles is None else cycles * times,
          flops=flops * times,
          bytes=float(num_bytes * times),
          **more,
        )
      )

    for name, opcode in comp.opcode.items():
      spent.append(sum(x.cycles or 0.0 for x in found) / times)
      line = comp.line[name]
      for sent, hidden in sends.get(name, ()):
        add(
          name, sent.kind, sent.op_name, sent.bytes,
          group_size=sent.group_size, hidden_cycles=hidden * times,
        )  # fmt: skip
      if opcode in _FREE or opcode.removesuffix("-start") in _SENDS:
        continue
      target = re.search(r'custom_call_target="([^"]*)"', line)
      if target is not None and target[1] in _FREE_CALLS:
        continue
      inner = hlo_lib.called(line)
      move, _, half = opcode.rpartition("-")
      if move in _MOVES:
        if half == "done":
          (start,) = hlo_lib.operands(comp, name)
          hidden = spent[-1] - spent[names.index(start)]
          add(
            name, opcode, _where(comp, name), _size(comp, name),
            hidden_cycles=hidden * times,
          )  # fmt: skip
      elif opcode == "while":
        trips = hlo_lib.trip_count(line, computations)
        if trips is None:
          unknown.append(name)
        body = re.search(r"body=%?([\w.\-]+)", line)[1]
        if trips is None:
          trips = 1 if turning else turns
          found += visit(body, times * trips, inside, True)
        else:
          found += visit(body, times * trips, inside, turning)
      elif opcode == "conditional":
        branches = [visit(branch, 1, True, turning) for branch in inner]
        taken = shares
        numbered = "branch_computations=" in line  # others are true and false
        if inside or not numbered or len(branches) != len(shares):
          dearest = max(branches, key=_dearness)
          taken = [int(branch is dearest) for branch in branches]
        for branch, share in zip(branches, taken, strict=True):
          found += [_repeated(x, share * times) for x in branch]
      elif opcode in _INSIDE and inner and _estimate(line) is None:
        for callee in inner:
          found += visit(callee, times, inside, turning)
      else:
        cycles, flops = _estimate(line), _flops(computations, comp, name)
        if opcode == "fusion" and cycles is None and not flops:
          if _only_sends(computations, line):
            continue
        add(
          name, opcode, _where(comp, name), _bytes(computations, comp, name),
          cycles, flops,
        )  # fmt: skip
    return found

  found = visit(entry, 1)
  if turns > 1:
    found = [_repeated(x, 1 / turns) for x in found]
  return found, unknown


def together(first: Instruction, second: Instruction) -> Instruction:
  """One instruction that the program reaches in two ways."""
  return dataclasses.replace(first, times=first.times + second.times)


def untimed(computations, comp, name: str) -> Instruction:
  """An instruction that `read` leaves out, as the end of a collective."""
  opcode = comp.opcode[name]
  inside = [opcode]
  if opcode == "fusion":
    for callee in hlo_lib.called(comp.line[name]):
      inside += computations[callee].opcode.values()
  kinds = [x.removesuffix("-start").removesuffix("-done") for x in inside]
  opcode = next((kind for kind in kinds if kind in collectives.KINDS), opcode)
  return Instruction(name, opcode, _where(comp, name), 0, None, 0.0, 0.0)


def _repeated(x: Instruction, times: float) -> Instruction:
  return dataclasses.replace(
    x,
    times=x.times * times,
    cycles=None if x.cycles is None else x.cycles * times,
    flops=x.flops * times,
    bytes=x.bytes * times,
    hidden_cycles=x.hidden_cycles * times,
  )


def _dearness(branch: list[Instruction]) -> tuple[float, float]:
  return sum(x.cycles or 0 for x in branch), sum(x.bytes for x in branch)


# ----- parts ----------------------------------------------------------------

# The first that is found in a path names the part.
_PARTS = (
  ("norms", r"_norm/|/norm/"),
  ("attention", r"blocks/.*attention/|/attention/"),
  ("feed-forward", r"/ffn/"),
  ("pool", r"pool_\d"),
  ("upsample", r"upsample_\d"),
  # of decoding
  ("cache updates", r"/cache_write/"),
  ("sampling", r"/sampling/"),
  ("splitting", r"/splitting/"),
  ("head", r"/head/"),
)
_LAYOUT = ("copy", "transpose", "reshape", "pad", "concatenate")
_STAGE = re.compile(r"(?:contract|expand|pool|upsample)_(\d)|(deepest)")


def place(
  x: Instruction, num_stages: int, training: bool = True
) -> tuple[int | None, str, str]:
  """(stage, part, pass) of an instruction; stage None: of no stage.

  Args: training: whether the program is a training step, or decodes.
  """
  path = x.op_name
  found = _STAGE.search(path)
  stage = None if found is None else int(found[1] or num_stages)
  in_model = "AUNet" in path or "jvp" in path
  again = "rematted_computation" in path or "_fwd_" in x.name
  if again and "transpose(" in path:
    which = "repeated"
  elif "transpose(" in path:
    which = "backward"
  elif in_model or stage is not None or not training:
    which = "forward"
  else:
    which = "update"
  if x.opcode in collectives.KINDS:
    return stage, "collectives", which
  if x.opcode in _LAYOUT or x.opcode.endswith("-done") or not path:
    return stage, "copies and layout", which
  part = next((name for name, r in _PARTS if re.search(r, path)), None)
  if part == "attention":
    if x.opcode == "custom-call":  # splash on TPUs, ours on GPUs
      part = "attention kernel"
    elif "/with_cache/" in path:
      part = "attention with cache"
    else:
      part = "projections" if x.flops else "attention, around the kernel"
  if part is None and stage is not None:
    part = "residuals and saved activations" if training else "residuals"
  if part is None and not training:
    part = "embedding" if "/embedding/" in path else "schedule and state"
  if part is None and which == "update":
    part = "optimizer"
  if part is None:
    embeds = re.search(r"gather|scatter", path)
    part = "embedding" if embeds else "head and loss"
  return stage, part, which


# ----- times ----------------------------------------------------------------


def exposed(x: Instruction, device: Device) -> float:
  """Cycles of a collective that no other work hides."""
  share = (x.group_size - 1) / x.group_size
  share *= 2 if x.opcode == "all-reduce" else 1
  if x.opcode in ("collective-permute", "send"):
    share = 1
  seconds = x.bytes * share / (device.link_bandwidth / 2)
  return max(0.0, seconds * device.clock - x.hidden_cycles)


def predict(
  hlo: str,
  rates: Rates,
  device: Device,
  num_stages: int,
  kernel_flops: Callable[[int, str], float] = lambda stage, name: 0.0,
  shares: Sequence[float] = (),
  turns: int = 1,
  training: bool = True,
) -> dict:
  """The `time` of a program, or of a turn of its loop; JSON-able.

  Args:
    kernel_flops: of one run of a stage's attention kernel, by its name and
      path.
    shares, turns: see `read`.
    training: see `place`.
  """
  instructions, unknown = read(hlo, shares, turns)
  parts: dict[tuple, float] = {}
  rows, unestimated = [], []
  for x in instructions:
    if not x.times:
      continue
    stage, part, which = place(x, num_stages, training)
    if part == "attention kernel" and stage is not None:
      flops = kernel_flops(stage, f"{x.name} {x.op_name}") * x.times
      x = dataclasses.replace(x, flops=flops)
    cycles = x.cycles
    if x.opcode in collectives.KINDS:
      cycles = exposed(x, device)
    elif cycles is None:
      by_flops = x.flops / rates.flops_per_cycle
      by_bytes = x.bytes / rates.bytes_per_cycle - x.hidden_cycles
      cycles = max(by_flops, by_bytes, 0.0)
    key = (stage, part, which)
    parts[key] = parts.get(key, 0.0) + cycles
    row = {
      "name": x.name,
      "opcode": x.opcode,
      "op_name": x.op_name,
      "times": x.times,
      "cycles": cycles,
      "flops": x.flops,
      "bytes": x.bytes,
    }
    rows.append(row)
    if x.cycles is None:
      unestimated.append(row)
  sums = {
    key: sum(row[key] for row in rows) or 1.0 for key in ("flops", "bytes")
  }
  for row in unestimated:
    row |= {f"{key}_share": row[key] / total for key, total in sums.items()}
  listed = [
    {"stage": stage, "part": part, "pass": which, "cycles": cycles}
    for (stage, part, which), cycles in parts.items()
  ]
  listed.sort(key=lambda entry: -entry["cycles"])
  rows.sort(key=lambda row: -row["cycles"])
  unestimated.sort(key=lambda row: -row["cycles"])
  total = sum(entry["cycles"] for entry in listed)
  return {
    "method": "compiler" if len(unestimated) < len(rows) else "roofline",
    "total_cycles": total,
    "seconds": total / device.clock,
    "parts": listed,
    "in_products": _share_in_products(rows, total),
    "unestimated": unestimated,
    "largest": rows[:20],
    "calibration": dataclasses.asdict(rates),
    "loops_counted_once": unknown,
  }


def _share_in_products(rows: Sequence[dict], total: float) -> float:
  return sum(row["cycles"] for row in rows if row["flops"]) / (total or 1.0)


def calibrate(device: jax.Device, known: Device) -> Rates:
  """Rates of one large bfloat16 product and one copy, compiled for `device`.

  Where the compiler gives no estimate, those of the data sheet.
  """
  where = jax.sharding.SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=where)

  def cycles(function, *arguments):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = [i.cycles for i in read(text)[0]]
    return sum(found) if found and None not in found else None

  product, copy = cycles(jnp.matmul, x, x), cycles(jnp.copy, x)
  if product is None or copy is None:
    per_cycle = (
      known.flops / known.clock,
      known.memory_bandwidth / known.clock,
    )
    return Rates(*per_cycle)
  return Rates(2 * 8192**3 / product, 2 * 2 * 8192**2 / copy)


# ----- for people -----------------------------------------------------------


def lines(time: dict) -> list[str]:
  """A prediction as text to read."""
  total = time["total_cycles"] or 1.0
  rates = time["calibration"]
  result = [
    f"time, predicted ({time['method']}): {time['seconds'] * 1e3:,.1f} ms",
    f"  {time['in_products']:.0%} in products; one large product "
    f"{rates['flops_per_cycle']:,.0f} FLOPs a cycle, one copy "
    f"{rates['bytes_per_cycle']:,.0f} bytes a cycle",
  ]
  if "predicted_useful_mfu" in time:
    result.append(
      f"  useful MFU {time['predicted_useful_mfu']:.1%}, "
      f"{time['bytes_per_second']:,.0f} bytes/s of text per device"
    )
  if "phases" in time:
    result.append(
      f"  {time['bytes_per_turn']:.3g} bytes a turn, "
      f"{time['bytes_per_second']:,.0f} bytes/s of text per device; of the "
      f"turns"
    )
    for phase in time["phases"]:
      result.append(
        f"  {phase['share']:>6.1%}  {phase['phase']}, for {phase['rows']:.3g} "
        f"rows"
      )
  for entry in time["parts"]:
    stage = "" if entry["stage"] is None else f"stage {entry['stage']}"
    result.append(
      f"  {entry['cycles'] / total:>6.1%}  {stage:<8} {entry['part']}, "
      f"{entry['pass']}"
    )
  modelled = sum(row["cycles"] for row in time["unestimated"]) / total
  result.append(
    f"  {len(time['unestimated'])} instructions carry no estimate and are "
    f"modelled: {modelled:.1%} of the time"
  )
  result.append("  largest instructions")
  for row in time["largest"]:
    result.append(
      f"  {row['cycles'] / total:>6.1%}  {row['times']:,g} x {row['opcode']} "
      f"{row['op_name'][-50:]}"
    )
  return result


def compare(first: str, second: str) -> str:
  """What changed between two files whose last line is a report with times."""

  def load(path):
    with open(path) as file:
      text = file.read().strip()
    try:
      programs = json.loads(text.splitlines()[-1])["programs"]
      return {n: p["time"] for n, p in programs.items() if "time" in p}
    except (IndexError, KeyError, TypeError, AttributeError, ValueError):
      raise ValueError(
        f"{path}: its last line is no report of --time --json."
      ) from None

  before, after = load(first), load(second)
  result = []
  for name in before.keys() & after.keys():
    old, new = before[name], after[name]
    sides = [
      {(e["stage"], e["part"], e["pass"]): e["cycles"] for e in side["parts"]}
      for side in (old, new)
    ]
    ratio = new["total_cycles"] / (old["total_cycles"] or 1.0)
    result.append(
      f"{name}: {old['total_cycles']:,.0f} -> {new['total_cycles']:,.0f} "
      f"cycles ({ratio - 1:+.1%})"
    )
    changes = {
      key: sides[1].get(key, 0.0) - sides[0].get(key, 0.0)
      for key in sides[0] | sides[1]
    }
    for key, change in sorted(changes.items(), key=lambda kv: -abs(kv[1])):
      if change:
        stage, part, which = key
        where = "" if stage is None else f"stage {stage} "
        result.append(f"  {change:>+16,.0f}  {where}{part}, {which}")
  if not result:
    raise ValueError(f"{first} and {second} time no program in common.")
  return "\n".join(result)
