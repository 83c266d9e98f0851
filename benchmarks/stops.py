"""Stops a run of several processes again and again, at random moments.

  python -m benchmarks.stops --processes=2 --stops=200 --seed=0 --json

The processes, each a CPU device, train tests/tiny.py. At a moment drawn from
--seed (while they start, compile, train or save) one of these happens:

  term      SIGTERM to some of them, or all
  kill_one  kill -9 of one
  kill_all  kill -9 of all
  freeze    SIGSTOP of one, and SIGCONT when the others have ended

Then each process must end by itself, not before, within a stated time (times
--slow, for a busy machine) and with a stated status (see `ends`), and the same
command is started again, until the run has reached its last step; then another
run begins. After every stop metrics.jsonl must hold each step up to now once,
with the loss and the number of bytes of a run that nothing disturbed, equal to
the last bit. --json prints one JSON object as the last line of the output.
"""

import argparse
import collections
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults import Broken, Run, check, write_corpus

KINDS = ("term", "kill_one", "kill_all", "freeze")
HANG_SECONDS = 15  # without a step; the watchdog then ends a process
HEARTBEAT_SECONDS = 40  # of silence; the runtime then ends the others
START_SECONDS = 40  # until all have connected; those that wait then end
MARGIN_SECONDS = 40  # until it has ended
INTERPRETER_SECONDS = 1  # until Python has begun; until then SIGTERM is final
STEPS = 48  # of a run
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"


class Ends(NamedTuple):
  """How the processes that were left alive may end, and how soon."""

  statuses: tuple[int, ...]
  seconds: float


# 0: it had finished just before. Of those whose peer is gone, 1: they noticed,
# or their watchdog did; SIGABRT: the runtime ended them.
_PEER_GONE = (0, 1, -signal.SIGABRT)
_NOTICED = MARGIN_SECONDS + max(HANG_SECONDS, HEARTBEAT_SECONDS, START_SECONDS)


def ends(kind: str, slow: int) -> Ends:
  """Args: slow: how many times as long as on a quiet machine."""
  statuses, seconds = {
    "term": ((0, 75), MARGIN_SECONDS),
    "kill_one": (_PEER_GONE, _NOTICED),
    "kill_all": ((), 0),
    "freeze": (_PEER_GONE, _NOTICED),
  }[kind]
  return Ends(statuses, seconds * slow)


def stop(run: Run, kind: str, rng: random.Random, slow: int) -> dict:
  """Stops the processes; what each ended with, and after how many seconds.

  Raises: Broken where one hangs, or ends in another way or before.
  """
  for number, process in enumerate(run.processes):
    check(
      process.poll() in (None, 0),
      f"a process ended by itself:\n{run.said(number)}",
    )
  everyone, began = run.processes, time.monotonic()
  after = f"{kind}, {began - run.started_at:.1f} s after the start"
  number = {"term": rng.randint(1, len(everyone)), "kill_all": len(everyone)}
  victims = rng.sample(everyone, number.get(kind, 1))
  signals = {"term": signal.SIGTERM, "freeze": signal.SIGSTOP}
  for victim in victims:
    victim.send_signal(signals.get(kind, signal.SIGKILL))
  statuses, seconds = ends(kind, slow)
  if kind == "term" and began - run.started_at < INTERPRETER_SECONDS * slow:
    # It was final for those whose Python had not begun; the others miss them.
    statuses += (-signal.SIGTERM, *_PEER_GONE)
    seconds = _NOTICED * slow
  others = [one for one in everyone if kind == "term" or one not in victims]
  _await_ends(run, others, statuses, began + seconds, after)
  if kind == "freeze":
    victims[0].send_signal(signal.SIGCONT)
    limit = time.monotonic() + seconds
    _await_ends(run, victims, statuses, limit, f"{after}, then SIGCONT")
  run.end(patience=20)
  return {
    "kind": kind,
    "victims": sorted(everyone.index(victim) for victim in victims),
    "statuses": [process.returncode for process in everyone],
    "seconds": round(time.monotonic() - began, 1),
  }


def _await_ends(run, processes, statuses, limit: float, after: str) -> None:
  for process in processes:
    while process.poll() is None:
      if time.monotonic() > limit:
        ended = [one.poll() for one in run.processes]
        process.send_signal(signal.SIGABRT)  # Python shows its stacks
        time.sleep(2)
        said = run.said(run.processes.index(process))
        raise Broken(f"a process hangs after {after} ({ended}):\n{said}")
      time.sleep(0.01)
    said = run.said(run.processes.index(process))
    check(
      process.returncode in statuses,
      f"status {process.returncode} after {after}, not {statuses}:\n{said}",
    )


def reached(run: Run) -> int:
  return (run.rows() or [(0,)])[-1][0]


def await_moment(run: Run, rng: random.Random, start_seconds: float) -> None:
  """Lets a run that has been started get on for a while.

  Args: start_seconds: that starts take until their first step.
  """
  if rng.random() < 0.3:  # while it starts
    time.sleep(rng.uniform(0, start_seconds))
    return
  run.await_step(min(reached(run) + rng.randint(1, 10), STEPS - 1))
  time.sleep(rng.uniform(0, 0.3))  # into the next step, or a save


def undisturbed(folder: Path, corpus: Path, processes: int):
  """(rows, seconds until the first step) of a run that nothing stops."""
  run = Run(corpus, folder / "undisturbed", processes, STEPS)
  began = time.monotonic()
  run.start()
  run.await_step(1)
  start_seconds = time.monotonic() - began
  check(not any(run.end(600)), f"undisturbed:\n{run.said()}")
  rows = run.rows()
  check([row[0] for row in rows] == list(range(1, STEPS + 1)), "steps missing")
  return rows, start_seconds


def inject(
  folder: Path,
  processes: int,
  stops: int,
  seed: int,
  kinds,
  minutes: float,
  slow: int,
) -> dict:
  """Stops runs so many times, or for so long, and lets the last one end."""
  flags = (
    f"--config.train.hang_seconds={HANG_SECONDS * slow}",
    f"--heartbeat_timeout={HEARTBEAT_SECONDS * slow}",
    f"--start_timeout={START_SECONDS * slow}",
  )
  rng, end = random.Random(seed), time.monotonic() + 60 * minutes
  corpus = folder / "corpus"
  write_corpus(corpus)
  expected, start_seconds = undisturbed(folder, corpus, processes)
  done, runs, starts, run = [], 0, 0, None
  while len(done) < stops and time.monotonic() < end or run is not None:
    if run is None:
      runs += 1
      name = folder / f"run-{runs}"
      run = Run(corpus, name, processes, STEPS, flags)
    run.start()
    if len(done) < stops and time.monotonic() < end:
      await_moment(run, rng, start_seconds)
      done.append(stop(run, kinds[rng.randrange(len(kinds))], rng, slow))
      done[-1]["step"] = reached(run)
      print(json.dumps({"stop": len(done), **done[-1]}), flush=True)
      # A process that finished has said so; the others may have been stopped.
      ended = 0 in done[-1]["statuses"]
    else:
      check(not any(run.end(600)), f"the last start:\n{run.said()}")
      ended = True
    rows = run.rows()
    check(rows == expected[: len(rows)], f"other losses: {rows}")
    if ended:
      check(rows == expected, "a run that finished lacks steps")
      starts, run = starts + run.starts, None
      shutil.rmtree(folder / f"run-{runs}")
  by_kind = collections.defaultdict(list)
  for one in done:
    by_kind[one["kind"]].append(one)
  return {
    "processes": processes,
    "stops": len(done),
    "runs": runs,
    "starts": starts,
    "steps_of_a_run": STEPS,
    "kinds": {
      kind: {
        "stops": len(found),
        "statuses": dict(
          collections.Counter(str(one["statuses"]) for one in found)
        ),
        "median_seconds": statistics.median(one["seconds"] for one in found),
        "most_seconds": max(one["seconds"] for one in found),
      }
      for kind, found in sorted(by_kind.items())
    },
  }


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.stops",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--processes", type=int, default=2, help="of a run (2)")
  add("--stops", type=int, default=200, help="how many (200)")
  add("--seed", type=int, default=0, help="of the moments")
  add("--kinds", default=",".join(KINDS), help="some of them, by commas")
  add("--minutes", type=float, default=600, help="begin no stop after so long")
  add("--slow", type=int, default=1, help="times the limits, on a busy machine")
  add("--json", action="store_true", help="print a JSON object at the end")
  args = parser.parse_args(argv)
  kinds = args.kinds.split(",")
  if args.processes < 2 or args.stops < 1 or not set(kinds) <= set(KINDS):
    parser.error(
      f"--processes from 2, --stops from 1, --kinds of {','.join(KINDS)}"
    )
  began = time.monotonic()
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends them, too
  with tempfile.TemporaryDirectory() as folder:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)
    try:
      report = inject(
        Path(folder),
        args.processes,
        args.stops,
        args.seed,
        kinds,
        args.minutes,
        args.slow,
      )
    except Broken as error:
      print(f"broken promise: {error}", file=sys.stderr)
      return 1
  minutes = round((time.monotonic() - began) / 60, 1)
  command = shlex.join(
    ["python", "-m", "benchmarks.stops", *(argv or sys.argv[1:])]
  )
  report = {"command": command, **report, "minutes": minutes}
  if args.json:
    print(json.dumps(report))
  else:
    print(f"{report['stops']} stops, {report['starts']} starts: nothing lost")
  return 0


if __name__ == "__main__":
  sys.exit(main())
