"""Random trees of files against a plain oracle of what must be read.

  python -m benchmarks.fuzz_sources --trees=10000 --seed=0

Every tree has files of all kinds, sizes and names, right and wrong, compressed,
joined, padded and damaged, with links to files and directories, loops, hidden
names and, where this runs as root, names that another user may not read. What
a file holds is known from making it; which files a specification names is found
again by a fixpoint over real paths. Compared are the texts of every file, in
order, and how often each reason is counted. A tree that disagrees is printed
with the number that makes it again; the exit status is then 1.
"""

import argparse
import collections
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable

import fsspec

from aunet_jax.data import sources
from benchmarks.source_trees import (
  FIELDS,
  NOBODY,
  SEPARATORS,
  File,
  Maker,
  short,
)

# ----- the oracle of listing ------------------------------------------------


def _may_read(path: str, others: bool) -> bool:
  return not others or bool(os.stat(path).st_mode & 0o777)


def reachable(root: str, others: bool) -> tuple[dict[str, str], Counter]:
  """Real paths of files below a directory, and reasons of what is left out.

  Loops count as duplicates here: which of the two it is, is a matter of order.
  """
  reasons, files, seen, todo = Counter(), {}, set(), [os.path.realpath(root)]
  arrivals = num_files = 0
  seen.add(todo[0])
  while todo:
    here = todo.pop()
    if not _may_read(here, others):
      reasons["unreadable"] += 1
      continue
    for name in os.listdir(here):
      path = os.path.join(here, name)
      if name.startswith("."):
        reasons["hidden name"] += 1
      elif os.path.isdir(path):
        arrivals += 1
        real = os.path.realpath(path)
        if real not in seen:
          seen.add(real)
          todo.append(real)
      else:
        num_files += 1
        files[os.path.realpath(path)] = name
  doubles = arrivals - (len(seen) - 1) + num_files - len(files)
  if doubles:
    reasons["duplicate path"] = doubles
  return files, reasons


# ----- the comparison -------------------------------------------------------


def read(
  paths: list[str], field: str, separator: str | None
) -> tuple[list[tuple[str, list[bytes], Counter]], Counter]:
  """(path, texts, reasons) of every file, and reasons of the listing."""
  found, skips = sources.list_sources(paths)
  result = []
  for source in found:
    texts, reasons = [], Counter()
    for record in sources.read_source(source, field, separator):
      if isinstance(record, sources.Skip):
        reasons[record.reason] += 1
      else:
        texts.append(record.text)
    result.append((source.path, texts, reasons))
  left_out = Counter(skip.reason for skip in skips)
  left_out["duplicate path"] += left_out.pop("link loop", 0)
  return result, +left_out


def _serve(connection) -> None:
  """Reads as a user without rights, for a parent who has them all."""
  with tempfile.TemporaryDirectory() as directory:  # loads all libraries
    maker = Maker(0, "text", None)
    for number, make in enumerate(maker.makers()):
      file = make()
      path = pathlib.Path(directory, f"{number}{file.suffix}")
      path.write_bytes(file.data)
    read([directory], "text", None)
  os.setgroups([])
  os.setgid(NOBODY)
  os.setuid(NOBODY)
  while (task := connection.recv()) is not None:
    try:
      connection.send(read(*task))
    except Exception as error:
      connection.send(error)


class Reader:
  """`read`, by this user or by one without rights.

  Attributes: others: whether it is another, who may not read everything.
  """

  def __init__(self, others: bool):
    self.others = others
    if others:
      self._ours, theirs = multiprocessing.Pipe()
      self._process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(theirs,), daemon=True
      )
      self._process.start()

  def __call__(self, *task):
    if not self.others:
      return read(*task)
    self._ours.send(task)
    result = self._ours.recv()
    if isinstance(result, Exception):
      raise result
    return result

  def close(self) -> None:
    if self.others:
      self._ours.send(None)
      self._process.join()


def _check(
  found, files: dict[bytes, File], expected: dict[str, str], others: bool
) -> list[str]:
  """Disagreements on the files that were read."""
  wrong = []
  by_real = collections.defaultdict(list)
  for path, texts, reasons in found:
    by_real[os.path.realpath(path)].append((texts, reasons))
  if set(by_real) != set(expected):
    extra = sorted(set(by_real) - set(expected))
    missing = sorted(set(expected) - set(by_real))
    wrong.append(f"listed {extra} too much, {missing} too little")
  for real, results in by_real.items():
    if len(results) > 1:
      wrong.append(f"{real!r} is read {len(results)} times")
    file = files.get(os.fsencode(real))
    texts, reasons = results[0]
    if file is None or not _may_read(real, others):
      if texts or reasons != Counter(unreadable=1):
        wrong.append(f"{real!r}: {short(texts)} {dict(reasons)}, unreadable")
    elif said := file.disagrees(texts, reasons):
      wrong.append(f"{real!r}: {said}")
  return wrong


def check_tree(seed: int, reader: Callable, directory: str) -> list[str]:
  """Makes a tree and reads it in some ways; returns what disagrees."""
  rng = random.Random(seed)
  field, separator = rng.choice(FIELDS), rng.choice(SEPARATORS)
  maker = Maker(rng.randrange(2**60), field, separator)
  root = os.path.join(directory, f"tree{seed}")
  files = maker.tree(os.fsencode(root), reader.others)
  top = os.path.join(root, "in")
  wrong = []
  try:
    expected, reasons = reachable(top, reader.others)
    for spec in (top, f"file://{top}", f"{top}/*", f"{top}/**", "**/*.txt"):
      wanted = expected
      if spec == "**/*.txt":
        spec = f"{top}/**/*.txt"
        wanted = {
          os.path.realpath(os.path.join(here, name)): name
          for here in _directories(top, reader.others)
          for name in os.listdir(here)
          if name.endswith(".txt") and not name.startswith(".")
          if not os.path.isdir(os.path.join(here, name))
        }
        below = [
          os.path.join(here, name)
          for here in _directories(top, reader.others)
          for name in os.listdir(here)
          if name.endswith(".txt") and not name.startswith(".")
          if os.path.isdir(os.path.join(here, name))
        ]
        for path in below:
          wanted |= reachable(path, reader.others)[0]
      try:
        found, left_out = reader([spec], field, separator)
      except ValueError as error:
        if wanted or "matches no file" not in str(error):
          wrong.append(f"{spec}: {type(error).__name__}: {error}")
        continue
      wrong += [
        f"{spec}: {line}"
        for line in _check(found, files, wanted, reader.others)
      ]
      if spec in (top, f"file://{top}") and left_out != reasons:
        wrong.append(f"{spec}: left out {dict(left_out)}, not {dict(reasons)}")
      elif not reasons["hidden name"] and left_out["hidden name"]:
        wrong.append(f"{spec}: hides {left_out['hidden name']} names")
    wrong += _check_url(seed, top, files, field, separator, expected)
  except Exception as error:
    wrong.append(f"{type(error).__name__}: {error}")
    if not wrong[:-1]:
      import traceback

      wrong.append(traceback.format_exc())
  for here, _, _ in os.walk(root):
    os.chmod(here, 0o700)
  shutil.rmtree(root)
  return [f"--seed={seed} ({field}, {separator!r}): {line}" for line in wrong]


def _directories(root: str, others: bool) -> set[str]:
  """Real paths of the directories that can be listed below one, and its own."""
  seen, todo = {os.path.realpath(root)}, [os.path.realpath(root)]
  while todo:
    here = todo.pop()
    if not _may_read(here, others):
      seen.discard(here)
      continue
    for name in os.listdir(here):
      path = os.path.join(here, name)
      real = os.path.realpath(path)
      if os.path.isdir(path) and not name.startswith(".") and real not in seen:
        seen.add(real)
        todo.append(real)
  return seen


def _check_url(seed, top, files, field, separator, expected) -> list[str]:
  """The same files behind a URL, without links and permissions."""
  memory = fsspec.filesystem("memory")
  place = f"/fuzz{seed}"
  wanted = {}
  for path, file in files.items():
    name = os.fsdecode(path)
    if not name.startswith(top + "/"):
      continue
    try:
      name.encode()
    except UnicodeEncodeError:
      continue
    inner = name[len(top) :]
    memory.pipe(place + inner, file.data)
    if not any(part.startswith(".") for part in inner.split("/")[1:]):
      wanted[f"memory://{place}{inner}"] = file
  if not wanted:
    return []
  wrong = []
  try:
    found, _ = read([f"memory://{place}"], field, separator)
    if {path for path, _, _ in found} != set(wanted):
      wrong.append(f"memory: listed {[p for p, _, _ in found]}")
    for path, texts, reasons in found:
      said = wanted[path].disagrees(texts, reasons) if path in wanted else None
      if said:
        wrong.append(f"{path}: {said}")
  finally:
    memory.rm(place, recursive=True)
  return wrong


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.fuzz_sources",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--trees", type=int, default=1000)
  parser.add_argument("--seed", type=int, default=0, help="of the first tree")
  args = parser.parse_args(argv)
  reader = Reader(others=os.getuid() == 0)
  directory = tempfile.mkdtemp(prefix="fuzz_sources")
  os.chmod(directory, 0o755)
  num_wrong = 0
  try:
    for number in range(args.trees):
      lines = check_tree(args.seed + number, reader, directory)
      num_wrong += bool(lines)
      for line in lines:
        print(line.encode("utf-8", "backslashreplace").decode(), flush=True)
      if (number + 1) % 500 == 0:
        print(f"{number + 1} trees, {num_wrong} disagree", file=sys.stderr)
  finally:
    reader.close()
    shutil.rmtree(directory, ignore_errors=True)
  print(f"{args.trees} trees, {num_wrong} disagree")
  return 1 if num_wrong else 0


if __name__ == "__main__":
  sys.exit(main())
