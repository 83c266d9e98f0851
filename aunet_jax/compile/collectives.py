"""What a compiled program sends between devices, read from its HLO text.

A collective's bytes are those of the largest array one device holds in it:
what all-gather gives, what reduce-scatter takes. A ring moves (n - 1) / n of
that over each device's links, and twice as much for all-reduce.

A loop's body runs as often as its trip count says. One collective may appear
many times, when the compiler starts it early and fuses its steps into the work
it hides behind: it counts once (`identity`).
"""

import collections
import dataclasses
import math
import re

from aunet_jax.compile import hlo as hlo_lib

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "collective-permute",
  "all-to-all",
  "send",  # what TPU slices send each other
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
    return self.times * sum(hlo_lib.num_bytes(*shape) for shape in self.shapes)


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


def of_instruction(
  comp_name, comp, name, times, num_devices
) -> Collective | None:
  """The collective that an instruction is, if it is one."""
  opcode, line = comp.opcode[name], comp.line[name]
  kind = opcode.removesuffix("-start")
  if kind not in KINDS:
    return None
  shapes = hlo_lib.shapes(comp.kind_of[name])
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
  where = hlo_lib.op_name(line)
  return Collective(kind, tuple(shapes), times, group_size, where)


def identity(comp_name: str, line: str, name: str, fused: bool) -> str:
  """What all steps of one collective have in common, and no other has.

  Steps carry their collective's chain, or of other compilers only its channel;
  but layers that are no loop share the channels of their collectives.

  Args: fused: whether the instruction is inside a fusion.
  """
  chain = re.search(r'chain_id="(\d+)"', line)
  if chain:
    return f"chain {chain[1]}"
  channel = re.search(r"channel_id=(\d+)", line)
  # A fusion that sums and slices is one whole collective.
  if fused and channel and not comp_name.startswith("all-reduce-scatter"):
    return f"channel {channel[1]}"
  return f"{comp_name} {name}"


def find(hlo: str) -> tuple[list[Collective], list[str]]:
  """Every collective of a program, and its loops of unknown length.

  The bodies of the latter are counted once; of a conditional's branches, all.

  Args: hlo: `compiled.as_text()`.
  Raises: ValueError where the text is something else.
  """
  computations, entry = hlo_lib.parse(hlo)
  partitions = re.search(r"num_partitions=(\d+)", hlo)
  num_devices = int(partitions[1]) if partitions else 1
  found: dict[tuple, Collective] = {}
  unknown: list[str] = []

  def visit(comp_name: str, owner: str, times: int, fused: bool) -> None:
    """owner: the computation whose control flow this one is part of."""
    comp = computations[comp_name]
    for name, opcode in comp.opcode.items():
      line = comp.line[name]
      collective = of_instruction(comp_name, comp, name, times, num_devices)
      if collective is not None:
        found.setdefault(
          (owner, identity(comp_name, line, name, fused)), collective
        )
        continue
      called = hlo_lib.called(line)
      trips = 1
      if opcode == "while":
        count = hlo_lib.trip_count(line, computations)
        if count is None:
          unknown.append(name)
        trips = 1 if count is None else count
      for callee in called:
        apart = opcode in ("while", "conditional")
        inside = fused or opcode == "fusion"
        visit(callee, callee if apart else owner, times * trips, inside)

  visit(entry, entry, 1, False)
  return list(found.values()), unknown


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
  """{kind: {"count": runs, "bytes": of all of them}}."""
  result = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
  for collective in found:
    result[collective.kind]["count"] += collective.times
    result[collective.kind]["bytes"] += collective.bytes
  return dict(result)
