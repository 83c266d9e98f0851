"""A program's time by part, measured: out of a profile of its runs.

`train --profile` records steps into WORKDIR/profile, with the text of the
program beside them. The profile names the program's instructions, the text
says where in the model each comes from, and `step_time.place` gives both the
measured and the predicted ones their part.

What a profile holds (`jax.profiler.ProfileData`):

  TPU   a plane "/device:TPU:0" for each core, whose line "XLA Ops" has an
        event for every run of an instruction, loops around their bodies, and
        "XLA Modules" one for every run of a program.
  GPU   a plane "/device:GPU:0", whose lines "Stream …" have an event for every
        kernel, with the instruction's name as `hlo_op`.
  CPU   the threads of "/host:CPU", with `hlo_op` too. Their times are added up,
        so they are not those of a clock.

An event's time is without that of the events inside it. Loops, conditionals
and calls are left out: what they run has events of its own.
"""

import collections
import gzip
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from aunet_jax.compile import collectives, step_time
from aunet_jax.compile import hlo as hlo_lib
from aunet_jax.train.profile import PROGRAM_FILE

_AROUND = ("while", "conditional", "call")  # run other instructions


class Total(NamedTuple):
  """Of one instruction on one device."""

  count: int  # events
  seconds: float


# ----- the profile ----------------------------------------------------------


def find(path: Path) -> tuple[list[Path], str | None]:
  """The newest recording's files, one of each host, and the program's text.

  Args: path: a workdir, its profile folder, or one .xplane.pb file.
  Returns: the text is None where it was not kept.
  Raises: ValueError where there is no recording, or the text is damaged.
  """
  if path.is_file():
    found, folders = [path], path.parents[:4]
  else:
    folders = [path / "profile", path]
    found = sorted(path.rglob("*.xplane.pb"))
    newest = max((p.parent for p in found), default=None)
    found = [p for p in found if p.parent == newest]
  if not found:
    raise ValueError(
      f"--profile={path} holds no *.xplane.pb; record one with "
      f"python -m aunet_jax.train --profile=FIRST:LAST."
    )
  for folder in folders:
    program = folder / PROGRAM_FILE
    if program.exists():
      try:
        return found, gzip.decompress(program.read_bytes()).decode()
      except (OSError, EOFError, ValueError) as error:
        raise ValueError(
          f"{program} is damaged ({error}); delete it, and the program is "
          f"compiled again instead."
        ) from None
  return found, None


def _alone(events: Iterable) -> Iterator[tuple]:
  """(event, seconds without the events inside it) of one line."""
  events = sorted(events, key=lambda e: (e.start_ns, -e.duration_ns))
  inside = [0.0] * len(events)
  around: list[int] = []  # those that the present one may be inside of
  for i, event in enumerate(events):
    while around and events[around[-1]].end_ns <= event.start_ns:
      around.pop()
    if around:
      inside[around[-1]] += event.duration_ns
    around.append(i)
  for event, covered in zip(events, inside, strict=True):
    yield event, max(0.0, event.duration_ns - covered) / 1e9


def _name(event, stats: dict) -> str | None:
  """The instruction of an event; a TPU gives its whole text as a name."""
  if "hlo_op" in stats:
    return str(stats["hlo_op"])
  found = re.match(r"%?([\w.\-]+)(?: = |$)", event.name)
  return found[1] if found else None


def _of_module(line, module: str) -> list:
  """Events of a program, named "jit_step(123)", of a line "XLA Modules"."""
  return [e for e in line.events if e.name.partition("(")[0] == module]


class Device:
  """What one device did for one program."""

  def __init__(self):
    self.totals: dict[str, Total] = {}
    self.runs: list[float] = []  # seconds of each, where the profile says it

  def add(self, name: str, seconds: float) -> None:
    count, sum_seconds = self.totals.get(name, (0, 0.0))
    self.totals[name] = Total(count + 1, sum_seconds + seconds)


def read(planes: Iterable, module: str) -> tuple[str, list[Device]]:
  """(TPU, GPU or CPU; what each device did for the program).

  Args: planes: of `ProfileData`. module: the program's name.
  """
  found: dict[tuple, Device] = collections.defaultdict(Device)
  for plane in planes:
    lines = {line.name: line for line in plane.lines}
    if (
      plane.name.startswith("/device:")
      and "XLA Ops" in lines
      and not any(name.startswith("Stream") for name in lines)
    ):
      device = found["TPU", plane.name, id(plane)]
      runs = []
      if "XLA Modules" in lines:
        runs = _of_module(lines["XLA Modules"], module)
        device.runs += [run.duration_ns / 1e9 for run in runs]
      spans = [(run.start_ns, run.end_ns) for run in runs]
      for event, seconds in _alone(lines["XLA Ops"].events):
        within = any(a <= event.start_ns < b for a, b in spans)
        name = _name(event, dict(event.stats))
        if name is not None and (within or "XLA Modules" not in lines):
          device.add(name, seconds)
      continue
    on_gpu = plane.name.startswith("/device:")
    for name, line in lines.items():
      if on_gpu and not name.startswith("Stream"):
        continue
      if not on_gpu and plane.name != "/host:CPU":
        continue
      named = ((e, s) for e, s in _alone(line.events))
      for event, seconds in named:
        stats = dict(event.stats)
        if stats.get("hlo_module") != module or "hlo_op" not in stats:
          continue
        kind = "GPU" if on_gpu else "CPU"
        where = plane.name if on_gpu else stats.get("device_ordinal")
        found[kind, where, id(plane)].add(_name(event, stats), seconds)
  kinds = {kind for kind, *_ in found}
  kind = next((k for k in ("TPU", "GPU", "CPU") if k in kinds), "CPU")
  return kind, [device for key, device in found.items() if key[0] == kind]


# ----- by part --------------------------------------------------------------


class Program:
  """The instructions of a compiled program, by name."""

  def __init__(self, text: str):
    self.module = re.match(r"HloModule ([\w.\-]+)", text)[1]
    self._computations, _ = hlo_lib.parse(text)
    self._timed: dict[str, step_time.Instruction] = {}
    for x in step_time.read(text)[0]:
      known = self._timed.get(x.name)
      # One that is reached twice runs as often as both say; a collective and
      # the fusion that holds it share a name.
      if known is not None and known.opcode == x.opcode:
        x = step_time.together(known, x)
      elif known is not None and x.opcode in collectives.KINDS:
        continue
      self._timed[x.name] = x

  def find(self, name: str) -> step_time.Instruction | None:
    """times 0: how often it runs is not known. None: it is not of this."""
    if name in self._timed:
      return self._timed[name]
    for comp in self._computations.values():
      if name in comp.opcode:
        return step_time.untimed(self._computations, comp, name)
    return None


def measure(
  planes: Iterable, text: str, num_stages: int, training: bool = True
) -> dict:
  """A program's time by part, of a device and run on average; JSON-able.

  Args: planes: of all hosts. text: the program's, `compiled.as_text()`.
  Raises: ValueError where the profile has no event of that program.
  """
  program = Program(text)
  kind, devices = read(planes, program.module)
  parts: dict[tuple, float] = collections.defaultdict(float)
  rows: dict[str, dict] = {}
  all_runs, unknown, known = [], 0.0, 0.0
  for device in devices:
    mine = {name: program.find(name) for name in device.totals}
    ratios = [
      round(device.totals[name].count / x.times)
      for name, x in mine.items()
      if x is not None and x.times
    ]
    ratios = [ratio for ratio in ratios if ratio]
    runs = statistics.mode(ratios) if ratios else max(1, len(device.runs))
    all_runs.append(runs)
    for name, (count, seconds) in device.totals.items():
      x = mine[name]
      if x is None:
        unknown += seconds / runs
        continue
      if x.opcode in _AROUND:
        continue
      known += seconds / runs
      # The first and last run may be recorded in part, so by its own count.
      per_run = seconds / count * x.times if x.times else seconds / runs
      parts[step_time.place(x, num_stages, training)] += per_run
      row = {"name": name, "opcode": x.opcode, "op_name": x.op_name}
      row = rows.setdefault(name, row | {"seconds": 0.0})
      row["seconds"] += per_run / len(devices)
  if not rows:
    raise ValueError(
      f"the profile has no event of {program.module}; was another program "
      f"recorded?"
    )
  listed = [
    {
      "stage": stage,
      "part": part,
      "pass": which,
      "seconds": seconds / len(devices),
    }
    for (stage, part, which), seconds in parts.items()
  ]
  listed.sort(key=lambda entry: -entry["seconds"])
  clock = [seconds for device in devices for seconds in device.runs]
  return {
    "device": kind,
    "devices": len(devices),
    "runs": statistics.mode(all_runs),
    "seconds": sum(entry["seconds"] for entry in listed),
    "run_seconds": statistics.median(clock) if clock else None,
    "unknown_share": unknown / ((unknown + known) or 1.0),
    "parts": listed,
    "instructions": sorted(rows.values(), key=lambda r: -r["seconds"])[:20],
  }


def of_files(paths: Iterable[Path], text: str, num_stages: int) -> dict:
  """`measure` of recordings. Raises: ValueError where a file is none."""
  planes = []
  for path in paths:
    try:
      planes += jax.profiler.ProfileData.from_file(str(path)).planes
    except RuntimeError as error:
      raise ValueError(f"{path} is no profile: {error}") from None
  return measure(planes, text, num_stages)


# ----- for people -----------------------------------------------------------


def lines(measured: dict, predicted: dict | None) -> list[str]:
  """Both times beside each other, as text to read.

  Args: predicted: `step_time.predict`'s; None = none was asked for.
  """
  threads = ", its threads added up" if measured["device"] == "CPU" else ""
  result = [
    f"time, measured: {measured['seconds'] * 1e3:,.3g} ms in instructions, "
    f"mean of {measured['devices']} x {measured['device']}{threads}, "
    f"{measured['runs']} runs"
  ]
  if measured["run_seconds"] is not None:
    result.append(
      f"  {measured['run_seconds'] * 1e3:,.3g} ms from a run's beginning to "
      f"its end"
    )
  if measured["unknown_share"] > 0.001:
    result.append(
      f"  {measured['unknown_share']:.1%} of the time is in instructions that "
      f"the program does not have: was it compiled by another version?"
    )
  cycle, known = 0.0, {}
  if predicted is not None:
    result[0] += f"; predicted: {predicted['seconds'] * 1e3:,.3g} ms"
    cycle = predicted["seconds"] / (predicted["total_cycles"] or 1.0)
    known = {
      (e["stage"], e["part"], e["pass"]): e["cycles"] * cycle
      for e in predicted["parts"]
    }
    result.append("     measured    predicted   ratio")
  found = {
    (e["stage"], e["part"], e["pass"]): e["seconds"] for e in measured["parts"]
  }
  for key in sorted(
    found | known, key=lambda k: -max(found.get(k, 0.0), known.get(k, 0.0))
  ):
    stage, part, which = key
    where = "" if stage is None else f"stage {stage}"
    text = f"  {found.get(key, 0.0) * 1e3:>8.3f} ms"
    if predicted is not None:
      ratio = found.get(key, 0.0) / known[key] if known.get(key) else None
      text += f" {known.get(key, 0.0) * 1e3:>8.3f} ms"
      text += "       -" if ratio is None else f"  {ratio:>6.2f}"
    result.append(f"{text}  {where:<8} {part}, {which}")
  result.append("  longest instructions")
  for row in measured["instructions"][:10]:
    result.append(
      f"  {row['seconds'] * 1e3:>8.3f} ms  {row['name']} {row['op_name'][-50:]}"
    )
  return result
