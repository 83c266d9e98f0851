"""Time of a compiled step by part of the model, from the profiler.

The profiler knows the compiler's operations; the compiled program says which
line of the model each came from. Threads of a CPU are added up; on a GPU the
time is that of its streams.
"""

import collections
import glob
import re
import tempfile

import jax

# First match names the part; paths look like contract_1/blocks/attention/…
PARTS = (
  (
    "attention kernel",
    r"blocks/attention/.*(BGN|pad|concat|exp|reduce|select|pallas|shard_map)",
  ),
  ("attention projections, RoPE", r"blocks/attention/"),
  ("feed-forward", r"blocks/ffn/"),
  ("norms, residuals", r"blocks"),
  ("upsampling", r"upsample_"),
  ("pooling", r"pool_|cumsum|cummax"),
  ("head and loss", r"jvp\(AUNet\)+/(norm|dot_general)|logsumexp|log_softmax"),
)
_STAGE = re.compile(r"(contract|expand|pool|upsample)_(\d)|(deepest)")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^%?([\w.\-]+) \(")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def sources(hlo: str) -> dict[str, str]:
  """Operation -> where in the model it comes from, of a compiled program."""
  found, inside, called = {}, {}, {}
  computation = ""
  for line in hlo.splitlines():
    opened = _COMPUTATION.match(line)
    if opened:
      computation = opened[1]
    instruction = _INSTRUCTION.match(line)
    if not instruction:
      continue
    name = re.search(r'op_name="([^"]*)"', line)
    if name:
      found[instruction[1]] = name[1]
      # A fused computation is named by its matrix product, if it has one.
      if " dot(" in line or computation not in inside:
        inside[computation] = name[1]
    calls = _CALLED.search(line)
    if calls:
      called[instruction[1]] = calls[1]
  for instruction, target in called.items():
    if target in inside and (
      instruction not in found or "dot" in inside[target]
    ):
      found[instruction] = inside[target]
  return found


def part(op_name: str) -> str:
  """The row of the table an operation belongs to."""
  stage = _STAGE.search(op_name)
  for name, pattern in PARTS:
    if re.search(pattern, op_name):
      if stage is None:
        return name
      number = "deepest" if stage[3] else f"stage {stage[2]}"
      return f"{number}: {name}"
  return "optimizer and rest" if op_name else "copies and others"


def profile(compiled, run) -> dict[str, float]:
  """Part -> share of the time of `run()`, a few calls of `compiled`."""
  where = sources(compiled.as_text())
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      run()
    (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
    planes = jax.profiler.ProfileData.from_file(path).planes
    times = collections.Counter()
    for plane in planes:
      on_device = plane.name.startswith("/device:")
      for line in plane.lines:
        if on_device and not line.name.startswith("Stream"):
          continue
        if not on_device and "XLA" not in line.name:
          continue
        for event in line.events:
          name = event.name
          if on_device:
            name = dict(event.stats).get("hlo_op", name)
          elif re.search(r"[:<>$ ]", name):
            continue  # the runtime itself
          # Loops and calls contain the operations that are counted.
          if re.match(r"(while|call|conditional|end:|tuple)", name):
            continue
          times[part(where.get(name, ""))] += event.duration_ns
  total = sum(times.values())
  return {
    name: round(time / total, 4) for name, time in times.most_common() if total
  }
