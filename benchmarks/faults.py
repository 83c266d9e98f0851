"""Hurts training runs on purpose, and checks that nothing is lost.

  python -m benchmarks.faults                           66 faults
  python -m benchmarks.faults --faults=11 --steps=96    one of each kind

The command line trains tests/tiny.py, is hurt at a moment drawn from --seed,
and is started again, until it has reached its last step. After every fault:

  - the run ended as it should (a signal's status, 75 after SIGTERM, 1 and an
    error that names the checkpoint or the disk where that was full);
  - the next start says that it continues from the newest checkpoint that was
    committed and not damaged, and names every one that it skipped;
  - metrics.jsonl holds each step up to now once, with the loss and the number
    of bytes seen of a run that nothing disturbed, equal to the last bit. A
    batch that was lost, repeated or changed would change them.

Runs of several processes are compared with an undisturbed run of as many.
hosts_of_two and hosts_of_four change how many there are: kill -9 takes some of
them, as hosts that die, and the run goes on with those that are left; or all
are told to stop, and it goes on with more. The mesh is what the launch scripts
choose (`launch/check_job.py`). Another mesh adds the same numbers in another
order, and float32 rounds a sum by its order: from then on each step must have
seen the same bytes, and its loss must agree to one part in 10^5.

The last line of the output is one JSON object.
"""

import argparse
import atexit
import collections
import json
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SAVE_EVERY = 6
PATIENCE_SECONDS = 1200  # for anything to happen, on a busy machine
FILE_LIMIT_BYTES = 30_000  # less than the largest file of a checkpoint
KINDS = (
  "kill",
  "kill_while_saving",
  "kill_while_starting",
  "kill_one_of_two",
  "sigterm",
  "truncate",
  "flip",
  "file_limit",
  "disk_full",
  "hosts_of_two",
  "hosts_of_four",
)
PROCESSES = {"kill_one_of_two": 2, "hosts_of_two": 2, "hosts_of_four": 4}
FLAGS = {4: ("--config.train.batch_size=12",)}  # three divide it, too
OTHER_MESH_RTOL = 1e-5  # of a loss, after another order of its sums


class Broken(AssertionError):
  """A promise that a run did not keep."""


def check(kept: bool, promise: str) -> None:
  if not kept:
    raise Broken(promise)


def write_corpus(folder: Path) -> None:
  folder.mkdir()
  rng = np.random.default_rng(0)
  words = "one two three 44 five, six. seven\neight (nine) ten".split(" ")
  for i in range(200):
    chosen = rng.choice(words, size=int(rng.integers(0, 300)))
    (folder / f"{i}.txt").write_text(" ".join(chosen))


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def await_(condition: Callable[[], object], what: str):
  """The first true value of `condition`; looks a thousand times a second."""
  end = time.monotonic() + PATIENCE_SECONDS
  while not (value := condition()):
    check(time.monotonic() < end, f"no {what} within {PATIENCE_SECONDS} s")
    time.sleep(0.001)
  return value


class Run:
  """One workdir, started again and again.

  Args: num_processes: of the job; `resize` starts it on others.
  """

  def __init__(
    self,
    corpus: Path,
    workdir: Path,
    num_processes: int,
    steps: int,
    flags: Sequence[str] = (),
  ):
    self.corpus, self.workdir, self.num_steps = corpus, workdir, steps
    self.flags = [
      "--config=tests/tiny.py",
      f"--workdir={workdir}", f"--config.data.train={corpus}",
      "--config.data.heldout_fraction=0", "--config.train.log_every_steps=1",
      f"--config.train.num_steps={steps}",
      "--config.checkpoint.keep=4",
      f"--config.checkpoint.every_steps={SAVE_EVERY}",
      f"--config.mesh.fsdp={num_processes}",
      *flags,
    ]  # fmt: skip
    self.job_processes = self.num_processes = num_processes
    self.mesh_flags = []
    self.other_mesh = False  # whether it was started on another than the job's
    self.processes, self.writers = [], []
    self.damaged = set()  # steps whose checkpoint was damaged since the start
    self.starts = 0

  def resize(self, num_processes: int) -> str:
    """The next start has so many processes; what the launch scripts say."""
    chosen = subprocess.run(
      [
        sys.executable, "launch/check_job.py",
        f"--job_devices={self.job_processes}", f"--devices={num_processes}",
        "--", *self.flags,
      ],
      cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
      capture_output=True, text=True,
    )  # fmt: skip
    check(chosen.returncode == 0, f"no mesh:\n{chosen.stderr}")
    self.num_processes, self.mesh_flags = num_processes, chosen.stdout.split()
    return chosen.stderr.strip().removeprefix("launch: ") or "the job's mesh"

  def start(self) -> None:
    command = [
      sys.executable, "-m", "aunet_jax.train", *self.flags, *self.mesh_flags
    ]  # fmt: skip
    if self.num_processes > 1:
      command += [
        f"--coordinator=localhost:{free_port()}",
        f"--num_processes={self.num_processes}",
      ]
    self.starts += 1
    self.other_mesh |= bool(self.mesh_flags)
    self.started_at = time.monotonic()
    self.processes, self.writers = [], []
    for i in range(self.num_processes):
      identity = [f"--process_id={i}"] if self.num_processes > 1 else []
      with self.output(i).open("w") as output:
        # Another process writes the log: a limit on files must not cut it off.
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
      self.processes.append(
        subprocess.Popen(
          command + identity,
          cwd=ROOT,
          env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
          },
          stdout=writer.stdin,
          stderr=subprocess.STDOUT,
        )
      )
      atexit.register(self.processes[-1].kill)
      writer.stdin.close()
      self.writers.append(writer)

  def output(self, process: int) -> Path:
    name = f"{self.workdir.name}-start{self.starts}-{process}.log"
    return self.corpus.parent / name  # not on the disk that gets full

  def said(self, process: int = 0) -> str:
    return self.output(process).read_text(errors="replace")

  def rows(self) -> list[tuple[int, float, int]]:
    """(step, loss, bytes seen) of every whole row of the log."""
    path = self.workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
      try:
        row = json.loads(line)
      except ValueError:
        check(number == len(lines) - 1, f"torn row {number} of {path}")
        break
      rows.append((row["step"], row["loss_nats"], row["bytes_seen"]))
    return rows

  def committed(self) -> list[int]:
    folder = self.workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())

  def saving(self) -> list[Path]:
    return list((self.workdir / "checkpoints").glob("*checkpoint-tmp*"))

  def alive(self) -> bool:
    return all(process.poll() is None for process in self.processes)

  def await_start(self) -> None:
    """Waits until it trains; checks where it continued from."""
    whole = [step for step in self.committed() if step not in self.damaged]
    await_(
      lambda: "compiled the step" in self.said() or not self.alive(),
      "first step",
    )
    said = self.said()
    check(self.alive(), f"the start failed:\n{said}")
    if whole:
      wanted = f"continuing from checkpoint {whole[-1]}\n"
      check(wanted in said, f"not {wanted!r} but:\n{said}")
    newer = {step for step in self.damaged if step > whole[-1]}
    for step in newer:
      wanted = f"checkpoint {step} skipped: "
      check(wanted in said, f"not {wanted!r} but:\n{said}")
    check(
      said.count(" skipped: ") == len(newer), f"a whole one skipped:\n{said}"
    )
    self.damaged -= newer  # they were set aside

  def await_step(self, step: int) -> None:
    """Waits until that step is logged, or the run has ended."""
    await_(
      lambda: not self.alive() or (self.rows() or [(0,)])[-1][0] >= step,
      f"step {step}",
    )

  def end(self, patience: float = PATIENCE_SECONDS) -> list[int]:
    """The statuses, when all processes ended; a launcher ends the last."""
    for process in self.processes:
      try:
        process.wait(timeout=patience if self.alive() else 20)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for writer in self.writers:
      writer.wait(timeout=20)
    return [process.returncode for process in self.processes]


# ----- the faults -----------------------------------------------------------
# Each hurts a run that trains and returns what happened, for the report. The
# run may have ended by itself just before.


def kill(run: Run, rng: random.Random) -> str:
  run.processes[0].kill()
  check(run.end()[0] in (-signal.SIGKILL, 0), "a killed run ends as killed")
  return "killed"


def kill_while_saving(run: Run, rng: random.Random) -> str:
  """Kills when the folder of a save that is not committed is there."""
  await_(lambda: run.saving() or not run.alive(), "save")
  time.sleep(rng.uniform(0, 0.05))
  kill(run, rng)
  return "save cut off" if run.saving() else "save was committed"


def kill_while_starting(run: Run, rng: random.Random) -> str:
  kill(run, rng)
  logged = len(run.rows())
  run.start()
  end = time.monotonic() + rng.uniform(0, 8)
  while time.monotonic() < end and len(run.rows()) == logged:
    time.sleep(0.01)  # until it trains, at the latest
  return kill(run, rng)


def kill_one_of_two(run: Run, rng: random.Random) -> str:
  victim = rng.randrange(2)
  run.processes[victim].kill()
  began = time.monotonic()
  while not all(process.poll() is not None for process in run.processes):
    if time.monotonic() > began + 30:
      run.processes[1 - victim].kill()  # as launch/local.sh does
      break
    time.sleep(0.05)
  statuses = run.end()
  other = statuses[1 - victim]
  check(
    other != 0 or statuses[victim] == 0,
    f"the other process said it finished: {run.said(1 - victim)}",
  )
  return f"process {victim}; the other " + (
    "waited" if other == -signal.SIGKILL else "ended"
  )


def hosts(run: Run, rng: random.Random) -> str:
  """Hosts die, and the run goes on without; or hosts come, and it uses them."""
  before = run.num_processes
  sizes = [n for n in range(1, run.job_processes + 1) if n != before]
  after = rng.choice(sizes)
  if after < before:
    for victim in rng.sample(run.processes, before - after):
      victim.kill()
    run.end(20)  # those that are left notice, or a launcher ends them
  else:
    run.processes[rng.randrange(before)].terminate()
    statuses = run.end()
    check(set(statuses) <= {75, 0}, f"{statuses} after SIGTERM:\n{run.said()}")
  return f"{before} to {after} processes: {run.resize(after)}"


hosts_of_two = hosts_of_four = hosts


def sigterm(run: Run, rng: random.Random) -> str:
  run.processes[0].terminate()
  (status,) = run.end()
  check(status in (75, 0), f"status {status} after SIGTERM:\n{run.said()}")
  last = run.rows()[-1][0]
  check(run.committed()[-1] == last, f"step {last} was logged, not saved")
  return f"status {status}"


def _newest_file(run: Run, rng: random.Random) -> Path:
  """Stops the run; a file of its newest checkpoint, the big ones more often."""
  await_(lambda: len(run.committed()) > 1 or not run.alive(), "two saves")
  kill(run, rng)
  step = run.committed()[-1]
  run.damaged.add(step)
  folder = run.workdir / "checkpoints" / str(step)
  paths = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
  sizes = [path.stat().st_size for path in paths]
  return rng.choices(paths, [size + 1000 * (size > 0) for size in sizes])[0]


def truncate(run: Run, rng: random.Random) -> str:
  path = _newest_file(run, rng)
  size = path.stat().st_size
  os.truncate(path, rng.randrange(size))
  return path.relative_to(run.workdir / "checkpoints").as_posix()


def flip(run: Run, rng: random.Random) -> str:
  path = _newest_file(run, rng)
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)
  return path.relative_to(run.workdir / "checkpoints").as_posix()


def _must_fail(run: Run) -> str:
  (status,) = run.end()
  lines = [x for x in run.said().splitlines() if x.startswith("error: ")]
  check(
    status == 1 and len(lines) == 1,
    f"status {status} on a full disk, errors {lines}:\n{run.said()}",
  )
  return lines[0].replace(str(run.workdir), "WORKDIR")


def file_limit(run: Run, rng: random.Random) -> str:
  """From now on a write past 30 kB fails, as on a disk with a quota."""
  limits = (FILE_LIMIT_BYTES, FILE_LIMIT_BYTES)
  resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE, limits)
  return _must_fail(run)


def disk_full(run: Run, rng: random.Random) -> str:
  """Fills the file system, half the time when a save has begun."""
  if rng.random() < 0.5:
    await_(lambda: run.saving() or not run.alive(), "save")
  filler = run.workdir.parent / "filler"
  try:
    with filler.open("wb", buffering=0) as file:
      while file.write(b"x" * 4096):
        pass
  except OSError:
    pass
  said = _must_fail(run)
  filler.unlink()
  return said


FAULTS = {name: globals()[name] for name in KINDS}


# ----- one after the other --------------------------------------------------


def same(run: Run, rows: list, expected: list) -> float:
  """Checks steps, bytes and losses; the largest relative difference of a loss.

  Args: rows, expected: as `Run.rows`.
  """
  if not rows:
    return 0.0
  (steps, losses, seen), (steps_e, losses_e, seen_e) = (
    zip(*table, strict=True) for table in (rows, expected)
  )
  check(steps == steps_e and seen == seen_e, f"other steps or bytes: {rows}")
  apart = np.abs(np.divide(losses, losses_e) - 1).max()
  limit = OTHER_MESH_RTOL if run.other_mesh else 0
  check(apart <= limit, f"losses differ by {apart}: {rows}")
  return float(apart)


def small_disk(folder: Path) -> bool:
  """Mounts a file system of 96 MB there, where that is allowed."""
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
  try:
    return subprocess.run(mount, capture_output=True).returncode == 0
  except FileNotFoundError:
    return False


def hurt(run: Run, kind: str, rng: random.Random, expected: list) -> dict:
  """Starts the run, lets it get on, and injects one fault."""
  run.start()
  run.await_start()
  at = (run.rows() or [(0,)])[-1][0] + rng.randrange(1, 4 * SAVE_EVERY)
  run.await_step(min(at, run.num_steps - 3 * SAVE_EVERY))
  happened = FAULTS[kind](run, rng)
  rows = run.rows()
  apart = same(run, rows, expected[: len(rows)])
  found = {"kind": kind, "step": len(rows), "happened": happened}
  return {**found, "losses_apart": apart} if run.other_mesh else found


def inject(folder: Path, num_faults: int, num_steps: int, seed: int, kinds):
  """Injects faults until there were so many, and lets every run end."""
  rng = random.Random(seed)
  corpus = folder / "corpus"
  write_corpus(corpus)
  disk = folder / "disk"
  mounted = small_disk(disk)
  kinds = [kind for kind in kinds if kind != "disk_full" or mounted]
  turns = [kinds[i % len(kinds)] for i in range(num_faults)]
  rng.shuffle(turns)
  done, repeated, lives, starts, apart = [], 0, 0, 0, 0.0
  try:
    for number in (1, 2, 4):
      mine = [kind for kind in turns if PROCESSES.get(kind, 1) == number]
      if not mine:
        continue
      flags = FLAGS.get(number, ())
      whole = Run(
        corpus, folder / f"undisturbed-{number}", number, num_steps, flags
      )
      whole.start()
      status = whole.end(patience=12 * PATIENCE_SECONDS)
      check(not any(status), f"undisturbed: {status}\n{whole.said()}")
      expected = whole.rows()
      check(
        [row[0] for row in expected] == list(range(1, num_steps + 1)),
        "the undisturbed run logs each step once",
      )
      run = None
      while mine or run is not None:
        if run is None:
          lives += 1
          run = Run(corpus, disk / f"hurt-{lives}", number, num_steps, flags)
        reached = (run.rows() or [(0,)])[-1][0]
        if mine and reached < num_steps - 6 * SAVE_EVERY:
          done.append(hurt(run, mine.pop(), rng, expected))
          print(json.dumps({"fault": len(done), **done[-1]}), flush=True)
          repeated += max(0, done[-1]["step"] - max(run.committed(), default=0))
          continue
        run.start()
        run.await_start()
        check(
          not any(run.end(12 * PATIENCE_SECONDS)),
          f"the last start:\n{run.said()}",
        )
        check(len(run.rows()) == num_steps, "steps missing at the end")
        apart = max(apart, same(run, run.rows(), expected))
        shutil.rmtree(run.workdir)
        starts, run = starts + run.starts, None
  finally:
    if mounted:
      subprocess.run(["umount", "-l", str(disk)], check=True)
  return {
    "faults": len(done),
    "kinds": dict(collections.Counter(fault["kind"] for fault in done)),
    "saves_cut_off": sum(f["happened"] == "save cut off" for f in done),
    "runs": lives,
    "starts": starts,
    "steps_of_a_run": num_steps,
    "steps_computed_twice": repeated,
    "losses_apart_where_the_mesh_changed": apart,
    "log": done,
  }


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.faults",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--faults", type=int, default=66, help="how many")
  parser.add_argument("--steps", type=int, default=360, help="of a run")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument(
    "--kinds", default=",".join(KINDS), help="some of the kinds, by commas"
  )
  args = parser.parse_args(argv)
  kinds = args.kinds.split(",")
  if args.steps < 12 * SAVE_EVERY:
    parser.error(f"--steps={args.steps} must be at least {12 * SAVE_EVERY}")
  if args.faults < 1 or not set(kinds) <= set(KINDS):
    parser.error(f"--faults must be positive, --kinds of {','.join(KINDS)}")
  with tempfile.TemporaryDirectory() as folder:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unmounts
    try:
      report = inject(Path(folder), args.faults, args.steps, args.seed, kinds)
    except Broken as error:
      print(f"broken promise: {error}", file=sys.stderr)
      return 1
  minutes = round((time.monotonic() - began) / 60, 1)
  command = shlex.join(
    ["python", "-m", "benchmarks.faults", *(argv or sys.argv[1:])]
  )
  print(json.dumps({"command": command, **report, "minutes": minutes}))
  return 0


if __name__ == "__main__":
  sys.exit(main())
