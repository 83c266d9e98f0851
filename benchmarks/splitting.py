"""How fast text is split: our automaton beside regular expressions.

  python -m benchmarks.splitting                      # Python's own text
  python -m benchmarks.splitting --input=books.jsonl --rule=pretok

Prints, from one run on one core: the bulk driver, a regex implementation of
the same rules (the published expressions compiled once, one pass each over
whole documents; needs `pip install -e '.[bench]'`), and their ratio; the bulk
driver on two threads; and one decoding step in jit for several batch sizes.
The last line is JSON. Speeds are the best of several runs. Those of one core
count the processor time of its thread, so that neighbours on a shared machine
matter less; the others count time on the clock.
"""

import argparse
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax.data import sources
from aunet_jax.splitting.splitter import Splitter
from benchmarks import measure

_WORD_STARTS = r"\p{N}{1,3}|[^\s\p{L}\p{N}]{1,3}[\r\n]*|\s*[\r\n]"
_PRETOK = (
  r" ?\p{L}{1,16}|\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,3}+[\r\n]*|\s*[\r\n]"
  r"|\s+(?!\S)|\s+"
)
_PUNCT = r"\d{1,3}(?=(?:\d{3})*(?!\d))|[^\s\p{L}\p{N}]{1,3}[\r\n]*|\s*[\r\n]"


def regex_splitter(rules):
  """A function from UTF-8 to the level of each byte; None if not known."""
  regex = measure.compared_with("regex")
  passes = []  # (level, expression, whether its end is the cut)
  for level, rule in enumerate(rules, 1):
    name, _, number = rule.partition("@")
    if name == "word":
      passes.append((level, _WORD_STARTS, False))
      passes.append((level, rf"(?:\S+?\s){{{number or 1}}}", True))
    elif name in ("pretok", "punct"):
      passes.append((level, _PRETOK if name == "pretok" else _PUNCT, False))
    else:
      return None
  # Starts are the same for every word rule: only the deepest pass counts.
  deepest = {(pattern, end): level for level, pattern, end in passes}
  compiled = [
    (level, regex.compile(pattern), end)
    for (pattern, end), level in deepest.items()
  ]

  def levels(data: bytes) -> np.ndarray:
    text = data.decode()
    result = np.zeros(len(text), np.int8)
    for level, pattern, end in compiled:
      if end:
        at = [match.end() - 1 for match in pattern.finditer(text)]
      else:
        at = [match.start() for match in pattern.finditer(text)]
      result[at] = np.maximum(result[at], level)
    if len(data) == len(text):
      return result
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = np.searchsorted([0x80, 0x800, 0x10000], codes, side="right") + 1
    on_bytes = np.zeros(len(data), np.int8)
    on_bytes[np.cumsum(sizes) - 1] = result
    return on_bytes

  return levels


def best_seconds(work, repeats: int, clock=time.perf_counter) -> float:
  times = []
  for _ in range(repeats):
    start = clock()
    work()
    times.append(clock() - start)
  return min(times)


def read(paths: str, limit: int) -> list[bytes]:
  found = sources.documents(paths, "text", limit, on_skip=lambda skip: None)
  return [document.text for document in found]


def bulk(splitter, documents, rules, repeats) -> dict:
  num_bytes = sum(map(len, documents))
  splitter.levels(b"")  # compiles
  ours = best_seconds(
    lambda: [splitter.levels(d) for d in documents], repeats, time.thread_time
  )
  result = {"bytes": num_bytes, "ours_mb_per_s": num_bytes / ours / 1e6}
  expressions = regex_splitter(rules)
  if expressions is not None:
    few, taken = [], 0
    for document in documents:  # the slower one gets less to do
      if taken > 2_000_000:
        break
      # What is read may be cut inside a character, which regexes cannot read.
      few.append(document.decode("utf-8", "ignore").encode())
      taken += len(few[-1])
    seconds = best_seconds(
      lambda: [expressions(text) for text in few],
      max(2, repeats // 3),
      time.thread_time,
    )
    result["regex_mb_per_s"] = taken / seconds / 1e6
    result["ratio"] = result["ours_mb_per_s"] / result["regex_mb_per_s"]
    differing = sum(
      int((splitter.levels(text) != expressions(text)).sum()) for text in few
    )
    result["share_differing"] = differing / taken
  return result


def two_threads(splitter, documents, repeats) -> float:
  """Speed of two threads over that of one."""
  text = b"".join(documents)

  def work():
    splitter.levels(text)

  def both():
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()

  return 2 * best_seconds(work, repeats) / best_seconds(both, repeats)


def step_nanoseconds(splitter, batch: int, repeats: int) -> float:
  """Time of one step in a jitted loop, for the whole batch."""
  steps = 2000
  rng = np.random.default_rng(0)
  bytes_LB = jnp.asarray(rng.integers(32, 127, (steps, batch)), jnp.int32)

  @jax.jit
  def loop(bytes_LB):
    def body(state_BK, byte_B):
      return splitter.step(state_BK, byte_B)

    return jax.lax.scan(body, splitter.init_state(batch), bytes_LB)[1]

  loop(bytes_LB).block_until_ready()
  seconds = best_seconds(lambda: loop(bytes_LB).block_until_ready(), repeats)
  return seconds / steps * 1e9


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--input", default="python", help="files, as data.train")
  add("--rule", default="word@1,word@2,word@4")
  add("--max_bytes", type=int, default=20_000_000)
  add("--repeats", type=int, default=7)
  args = parser.parse_args()
  rules = args.rule.split(",")
  start = time.perf_counter()
  splitter = Splitter(rules)
  result = {
    "rules": rules,
    "make_splitter_ms": 1e3 * (time.perf_counter() - start),
    "states": splitter.tables.num_states,
    "table_bytes": splitter.tables.nbytes,
  }
  documents = read(args.input, args.max_bytes)
  result |= bulk(splitter, documents, rules, args.repeats)
  result["two_threads_over_one"] = two_threads(
    splitter, documents, args.repeats
  )
  result["step_ns"] = {
    str(batch): step_nanoseconds(splitter, batch, 3) for batch in (1, 32, 1024)
  }
  print(
    f"rules       {args.rule}: {result['states']} states, "
    f"{result['table_bytes']:,} bytes of tables, "
    f"made in {result['make_splitter_ms']:.0f} ms"
  )
  print(f"automaton   {result['ours_mb_per_s']:8.1f} MB/s on one core")
  if "ratio" in result:
    print(f"regex       {result['regex_mb_per_s']:8.2f} MB/s on one core")
    print(
      f"ratio       {result['ratio']:8.0f}   (levels differ, by look-ahead, on "
      f"{result['share_differing']:.2%} of bytes)"
    )
  print(f"two threads {result['two_threads_over_one']:8.2f} times one")
  for batch, nanoseconds in result["step_ns"].items():
    print(f"jit step    {nanoseconds:8.0f} ns for a batch of {batch}")
  print(json.dumps({**measure.machine("splitting"), **result}))


if __name__ == "__main__":
  main()
