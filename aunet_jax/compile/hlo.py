"""The text of a compiled program: computations, instructions, loops."""

import math
import re

# Others carry their width: f32, s8, f8e4m3fn.
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")

OPCODE = re.compile(r"(?:^|\s)([a-z][a-z\-]*)\(")

SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")

CALLED = re.compile(
  r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
)

CALLED_LIST = re.compile(
  r"\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)


def num_bytes(dtype: str, dims: tuple[int, ...]) -> int:
  bits = BITS.get(dtype)
  if bits is None:
    bits = int(re.match(r"[a-z]+(\d+)", dtype)[1])
  return math.prod(dims) * bits // 8


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
  return [
    (dtype, tuple(int(n) for n in dims.split(",") if n))
    for dtype, dims in SHAPE.findall(text)
  ]


class Computation:
  def __init__(self):
    self.opcode: dict[str, str] = {}
    self.kind_of: dict[str, str] = {}  # "type opcode" text before the bracket
    self.line: dict[str, str] = {}
    self.root: str | None = None


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
  """Computations by name, and the entry's name."""
  computations, entry, current = {}, None, None
  for line in hlo.splitlines():
    header = HEADER.match(line)
    if header:
      current = computations[header[2]] = Computation()
      entry = header[2] if header[1] else entry
      continue
    match = INSTRUCTION.match(line)
    opcode = OPCODE.search(match[2]) if match and current else None
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


def trip_count(line: str, computations: dict[str, Computation]) -> int | None:
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


def operands(comp: Computation, name: str) -> list[str]:
  """Names of what an instruction reads, in order."""
  text = re.sub(r"/\*.*?\*/", "", comp.line[name])  # TPUs number long lists
  begin = OPCODE.search(text).end()
  depth, end = 1, begin
  while depth and end < len(text):
    depth += {"(": 1, ")": -1}.get(text[end], 0)
    end += 1
  return [
    part.split()[-1].lstrip("%")
    for part in re.split(r",(?![^\[{(]*[\]})])", text[begin : end - 1])
    if part.strip()
  ]


def called(line: str) -> list[str]:
  """Computations that an instruction runs, a loop's condition left out."""
  names = CALLED.findall(line)
  for listed in CALLED_LIST.findall(line):
    names += re.findall(r"%?([\w.\-]+)", listed)
  return names


def op_name(line: str) -> str:
  """Where in the model an instruction comes from, as JAX names it."""
  found = re.search(r'op_name="([^"]*)"', line)
  return found[1] if found else ""
