"""How full the rows are, and how fast they come.

  python -m benchmarks.loader --input=books.jsonl.gz --input=python
  python -m benchmarks.loader --input=python --only=speed --workers=0,1,2

Three tables, and the same figures as one JSON object on the last line:
fill (ours beside fixed rows of bytes with the official capacities), speed
(indexing, loading, and both together, against a plain regex packer in the
same run; needs `pip install -e '.[bench]'`) and memory (resident set over many
batches). Speeds are best of several runs; on a shared machine trust the ratio
more than the figure.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time

import numpy as np

from aunet_jax import config
from aunet_jax.data import planner, sources
from aunet_jax.data.corpora import open_corpora
from aunet_jax.data.loader import make_loader
from aunet_jax.splitting.splitter import Splitter
from benchmarks import measure

ROW_BYTES = 8192
RULES = (("word@1",), ("word@1", "word@2"))
# Capacities below the bytes that the official code pads or cuts to: its
# released configs, and those behind the paper's own numbers.
OFFICIAL = {
  ("word@1",): ((3200,), (1664,)),
  ("word@1", "word@2"): ((1600, 928), (1664, 784)),
}
# Per-stage (width, blocks on all paths, feed-forward width) of the paper's 1B
# models, Table 9: the weights with which stages count in a row's FLOPs.
STAGES = {
  1: ((512, 6, 1536), (2048, 25, 5632)),
  2: ((512, 6, 1536), (2048, 6, 5632), (3072, 18, 8192)),
}


def flops_per_position(rules) -> np.ndarray:
  """Forward matmul FLOPs of a position's blocks, per stage."""
  return np.array(
    [
      2 * blocks * (4 * dim**2 + 3 * dim * ffn)
      for dim, blocks, ffn in STAGES[len(rules)]
    ],
    float,
  )


# ----- fill -----------------------------------------------------------------


def fixed_rows(documents, splitter, capacities) -> dict:
  """The official scheme: rows of so many bytes, deeper stages padded or cut.

  Documents stand end to end, BOS and EOS included; each row's first position
  and each BOS is kept at every stage.
  """
  levels = []
  for text in documents:
    levels.append(np.array([splitter.num_levels], np.int8))
    levels.append(splitter.levels(text))
    levels.append(np.zeros(1, np.int8))
  stream = np.concatenate(levels)
  rows = stream[: len(stream) // ROW_BYTES * ROW_BYTES].reshape(-1, ROW_BYTES)
  rows = rows.copy()
  rows[:, 0] = splitter.num_levels
  wanted = np.stack(
    [(rows >= stage).sum(axis=1) for stage in range(len(capacities))], axis=1
  )
  kept = np.minimum(wanted, capacities)
  return {"wanted": wanted, "kept": kept}


def fill_table(name: str, documents, rules) -> list[dict]:
  splitter = Splitter(rules)
  weight_S = flops_per_position(rules)
  sample, rest = documents[::2], documents[1::2]
  plan = planner.recommend(sample, splitter, ROW_BYTES)
  usage_RS, num_cuts = planner.pack_usage(rest, splitter, plan.capacities)
  schemes = [("ours", plan.capacities, usage_RS, usage_RS)]
  for below in OFFICIAL[rules]:
    capacities = (ROW_BYTES, *below)
    rows = fixed_rows(rest, splitter, capacities)
    schemes.append(("fixed", capacities, rows["wanted"], rows["kept"]))
  lines = []
  for scheme, capacities, wanted_RS, kept_RS in schemes:
    padded = len(kept_RS) * (np.array(capacities) * weight_S).sum()
    lines.append(
      {
        "corpus": name,
        "rules": ",".join(rules),
        "scheme": scheme,
        "capacities": list(capacities),
        "fill": (kept_RS.sum(0) / (len(kept_RS) * np.array(capacities)))
        .round(4)
        .tolist(),
        "empty_deep_slots": int((capacities[-1] - kept_RS[:, -1]).sum()),
        "lost_boundaries": int((wanted_RS - kept_RS)[:, 1:].sum()),
        "useful_over_padded_flops": round(
          float((kept_RS * weight_S).sum() / padded), 4
        ),
        "rows": len(kept_RS),
        "cut_documents": num_cuts if scheme == "ours" else None,
      }
    )
  return lines


# ----- speed ----------------------------------------------------------------


def regex_packer(documents, capacities) -> tuple[int, float]:
  """A plain packer: regexes find the boundaries, Python fills the rows.

  Returns: bytes of text and seconds, for word@1 or word@1,word@2.
  """
  regex = measure.compared_with("regex")
  marks = regex.compile(r"\p{N}{1,3}|[^\s\p{L}\p{N}]{1,3}[\r\n]*|\s*[\r\n]")
  words = [
    regex.compile(rf"(?:\S+?\s){{{count}}}")
    for count in range(1, len(capacities))
  ]
  start = time.perf_counter()
  rows, row, used = [], [], [0] * len(capacities)
  num_bytes = 0
  for text in documents:
    string = text.decode("utf-8", "replace")
    levels = [0] * len(string)
    for level, word in enumerate(words, start=1):
      for match in word.finditer(string):
        levels[match.end() - 1] = level
    for match in marks.finditer(string):
      levels[match.start()] = len(words)
    positions = [(config.BOS, len(words))]
    for character, level in zip(string, levels, strict=True):
      encoded = character.encode()
      positions.extend((byte, 0) for byte in encoded[:-1])
      positions.append((encoded[-1], level))
    for byte, level in positions:
      if any(used[i] == capacities[i] for i in range(level + 1)):
        rows.append(np.array(row + [(0, 0)] * (capacities[0] - len(row))))
        row, used = [], [0] * len(capacities)
      row.append((byte, level))
      for i in range(level + 1):
        used[i] += 1
    num_bytes += len(text)
  return num_bytes, time.perf_counter() - start


def load_rate(corpus, num_workers: int, seconds: float, repeats: int) -> float:
  """Text bytes a second of a loader that is under way, best of `repeats`."""
  loader = make_loader(corpus, seed=0, batch_size=16, num_workers=num_workers)
  for _ in range(8):
    next(loader)
  best = 0.0
  for _ in range(repeats):
    start, positions = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
      positions += int(next(loader)["weights"].sum())
    best = max(best, positions / (time.perf_counter() - start))
  loader.close()
  return best


def speed_table(path: str, documents, rules, args) -> dict:
  splitter = Splitter(rules)
  sample = documents[: max(1, len(documents) // 4)]
  capacities = planner.recommend(sample, splitter, ROW_BYTES).capacities
  cfg = config.DataConfig(train=path, heldout_fraction=0.0)
  index_rates = []
  for _ in range(args.repeats):
    with tempfile.TemporaryDirectory() as cache:
      start = time.perf_counter()
      corpus, _ = open_corpora(
        cfg, splitter, capacities, cache, log=lambda line: None
      )
      index_rates.append(corpus.num_bytes / (time.perf_counter() - start))
  indexing = max(index_rates)
  result = {"rules": ",".join(rules), "capacities": list(capacities)}
  with tempfile.TemporaryDirectory() as cache:
    corpus, _ = open_corpora(
      cfg, splitter, capacities, cache, log=lambda line: None
    )
    loading = {
      str(count): load_rate(corpus, count, args.seconds, args.repeats)
      for count in args.workers
    }
  first = loading[str(args.workers[0])]
  part = documents[:: max(1, len(documents) // 20)][:20]
  part = [text[:100_000] for text in part]
  plain = 0.0
  for _ in range(args.repeats):
    num_bytes, took = regex_packer(part, capacities)
    plain = max(plain, num_bytes / took)
  result |= {
    "index_mb_per_s": round(indexing / 1e6, 1),
    "load_mb_per_s": {n: round(r / 1e6, 1) for n, r in loading.items()},
    "index_and_one_epoch_mb_per_s": round(
      1 / (1 / indexing + 1 / first) / 1e6, 1
    ),
    "regex_packer_mb_per_s": round(plain / 1e6, 2),
    "ratio_to_regex_packer": round(1 / (1 / indexing + 1 / first) / plain, 1),
  }
  return result


# ----- memory ---------------------------------------------------------------


def resident_mb() -> float:
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory_table(path: str, rules, num_batches: int) -> dict:
  """Resident set over a long run, after a tenth of it to warm up."""
  splitter = Splitter(rules)
  cfg = config.DataConfig(train=path, heldout_fraction=0.0)
  with tempfile.TemporaryDirectory() as cache:
    capacities = (ROW_BYTES,) + (ROW_BYTES // 5,) * len(rules)
    corpus, _ = open_corpora(
      cfg, splitter, capacities, cache, log=lambda line: None
    )
    loader = make_loader(corpus, seed=0, batch_size=16)
    sizes = []
    for step in range(num_batches):
      next(loader)
      if step >= num_batches // 10 and step % (num_batches // 100) == 0:
        sizes.append(resident_mb())
    loader.close()
  return {
    "batches": num_batches,
    "epochs": round(num_batches * 16 / corpus.num_rows, 1),
    "resident_mb": {
      "first": round(sizes[0], 1),
      "least": round(min(sizes), 1),
      "most": round(max(sizes), 1),
      "last": round(sizes[-1], 1),
    },
    "spread": round((max(sizes) - min(sizes)) / min(sizes), 4),
  }


# ----- all ------------------------------------------------------------------


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--input", action="append", help="as data.train")
  parser.add_argument("--only", choices=("fill", "speed", "memory"))
  parser.add_argument("--workers", default="0,1,2")
  parser.add_argument("--seconds", type=float, default=3.0)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--max_bytes", type=int, default=30_000_000)
  parser.add_argument("--batches", type=int, default=5000)
  args = parser.parse_args()
  args.workers = [int(count) for count in args.workers.split(",")]
  inputs = args.input or ["python"]
  result = {
    "command": shlex.join(["python", "-m", "benchmarks.loader", *sys.argv[1:]]),
    "cores": os.cpu_count(),
    "fill": [],
    "speed": [],
    "memory": None,
  }
  try:
    listed = {
      path: sources.sample(path, "text", args.max_bytes, lambda skip: None)
      for path in inputs
    }
  except ValueError as error:
    parser.error(str(error))
  for path, documents in listed.items():
    print(f"{path}: {sum(map(len, documents)) / 1e6:.1f} MB", file=sys.stderr)
    for rules in RULES:
      if args.only in (None, "fill"):
        for line in fill_table(path, documents, rules):
          result["fill"].append(line)
          print(line)
      if args.only in (None, "speed"):
        line = {"corpus": path, **speed_table(path, documents, rules, args)}
        result["speed"].append(line)
        print(line)
  if args.only in (None, "memory"):
    result["memory"] = memory_table(inputs[0], RULES[0], args.batches)
    print(result["memory"])
  print(json.dumps(result))


if __name__ == "__main__":
  main()
