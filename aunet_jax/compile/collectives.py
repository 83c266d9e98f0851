"""What a compiled program sends between devices, read from its HLO text.

A collective's bytes are those of the largest array one device holds in it:
what all-gather gives, what reduce-scatter takes. A ring moves (n - 1) / n of
that over each device's links, and twice as much for all-reduce.

A loop's body runs as often as its trip count says. One collective may appear
many times, when the compiler starts it early and fuses its steps into the work
it hides behind: all of them carry one channel, and it counts once.
"""

import collections
import dataclasses
import math
import re

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "collective-permute",
  "all-to-all",
  "send",  # what TPU slices send each other
)

_BITS = {"pred": 8, "bf16": 16}  # others carry their width: f32, s8, f8e4m3fn

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")

_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z\-]*)\(")

_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")

_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
)

_CALLED_LIST = re.compile(
  r"\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of one computation."""

  kind: str  # one of KINDS
  shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, dims) it counts
  times: int  # how often a call of the program runs it
  group_size: int  # devices that take part together
  op_name: str  # where in the model, as JAX names it

  @property
  def bytes(self) -> int:
    """Of all its runs."""
    return self.times * sum(_num_bytes(*shape) for shape in self.shapes)


def _num_bytes(dtype: str, dims: tuple[int, ...]) -> int:
  bits = _BITS.get(dtype) or int(re.match(r"[a-z]+(\d+)", dtype)[1])
  return math.prod(dims) * bits // 8


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
  return [
    (dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in _SHAPE.findall(text)
  ]


class _Computation:
  def __init__(self):
    self.opcode: dict[str, str] = {}
    self.kind_of: dict[str, str] = {}  # "type opcode" text before the bracket
    self.line: dict[str, str] = {}
    self.root: str | None = None


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
  """Computations by name, and the entry's name."""
  computations, entry, current = {}, None, None
  for line in hlo.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations[header[2]] = _Computation()
      entry = header[2] if header[1] else entry
      continue
    match = _INSTRUCTION.match(line)
    opcode = _OPCODE.search(match[2]) if match and current else None
    if opcode is None:
      continue
    name = match[1]
    current.opcode[name] = opcode[1]
    current.kind_of[name] = match[2][: opcode.start()]
    current.line[name] = match[2]
    if line.lstrip().startswith("ROOT "):
      current.root = name
  if entry is None:
    raise ValueError("this text is not the HLO of a compiled program.")
  return computations, entry


def _trip_count(line: str, computations: dict[str, _Computation]) -> int | None:
  """Times a loop runs; None where only the data decide."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  condition = computations[re.search(r"condition=%?([\w.\-]+)", line)[1]]
  root = condition.line[condition.root]
  compared = re.search(r"compare\(([^)]*)\), direction=LT", root)
  if compared is None:
    return None
  limit = compared[1].split("%")[-1].strip()
  value = re.search(r"constant\((\d+)\)", condition.line.get(limit, ""))
  return int(value[1]) if value else None


def _group_size(line: str, num_devices: int) -> int:
  """Devices of one group, however the text writes the groups."""
  named = re.search(r"replica_groups=mesh\[(.*?)\].*? \{([^}]*)\}", line)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", named[2]))
  iota = re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", line)
  if iota:
    return int(iota[1])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
  return listed[1].count(",") + 1 if listed else num_devices


def _collective(comp_name, comp, name, times, num_devices):
  opcode, line = comp.opcode[name], comp.line[name]
  kind = opcode.removesuffix("-start")
  if kind not in KINDS:
    return None
  shapes = _shapes(comp.kind_of[name])
  # (operands, results)
  if opcode in ("all-gather-start", "reduce-scatter-start", "all-to-all-start"):
    shapes = shapes[len(shapes) // 2 :]
  elif opcode == "collective-permute-start":  # (operand, result, contexts)
    shapes = shapes[1:2]
  elif opcode == "send":  # (array, context, token)
    shapes = shapes[:1]
  group_size = _group_size(line, num_devices)
  if group_size == 1:  # nothing is sent
    return None
  # TPUs: a fusion that sums and keeps the device's own slice.
  if kind == "all-reduce" and comp_name.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  elif kind == "reduce-scatter":
    shapes = [(dtype, (group_size, *dims)) for dtype, dims in shapes]
  op_name = re.search(r'op_name="([^"]*)"', line)
  return Collective(
    kind, tuple(shapes), times, group_size, op_name[1] if op_name else ""
  )


def find(hlo: str) -> tuple[list[Collective], list[str]]:
  """Every collective of a program, and its loops of unknown length.

  The bodies of the latter are counted once; of a conditional's branches, all.

  Args: hlo: `compiled.as_text()`.
  Raises: ValueError where the text is something else.
  """
  computations, entry = _parse(hlo)
  partitions = re.search(r"num_partitions=(\d+)", hlo)
  num_devices = int(partitions[1]) if partitions else 1
  found: dict[tuple, Collective] = {}
  unknown: list[str] = []

  def visit(comp_name: str, owner: str, times: int) -> None:
    """owner: the computation whose control flow this one is part of."""
    comp = computations[comp_name]
    for name, opcode in comp.opcode.items():
      line = comp.line[name]
      collective = _collective(comp_name, comp, name, times, num_devices)
      if collective is not None:
        channel = re.search(r"channel_id=(\d+)", line)
        key = (owner, channel[1] if channel else name)
        # A fused reduce-scatter also shows its plain all-reduce.
        if key not in found or collective.kind == "reduce-scatter":
          found[key] = collective
        continue
      called = _CALLED.findall(line)
      for names in _CALLED_LIST.findall(line):
        called += re.findall(r"%?([\w.\-]+)", names)
      trips = 1
      if opcode == "while":
        count = _trip_count(line, computations)
        if count is None:
          unknown.append(name)
        trips = 1 if count is None else count
      for callee in called:
        apart = opcode in ("while", "conditional")
        visit(callee, callee if apart else owner, times * trips)

  visit(entry, entry, 1)
  return list(found.values()), unknown


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
  """{kind: {"count": runs, "bytes": of all of them}}."""
  result = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
  for collective in found:
    result[collective.kind]["count"] += collective.times
    result[collective.kind]["bytes"] += collective.bytes
  return dict(result)
