"""How fast an index is built, and what a start over a large one costs.

  python -m benchmarks.indexing --only=build --input='books/*.jsonl.xz'
  python -m benchmarks.indexing --only=start --documents=100000000

build: texts of --input, cut anywhere into documents of about 4 kB, are written
over and over to JSON lines; `python -m aunet_jax.prepare --index` makes an
index of them with each number of --workers, --repeats times. Speeds are best
of those.

start: an index of so many documents of 1 kB is written directly, its text and
names as holes in files, in as many parts as `prepare` would make. Then another
process opens it as `train` does and takes a batch.

The last line is one JSON object. Files lie below --directory for as long as
it runs: the text twice for build; 48 bytes a document for start.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np

from aunet_jax import config
from aunet_jax.data import (
  blocks,
  building,
  corpora,
  joined,
  loader,
  parts,
  sources,
  store,
)
from aunet_jax.splitting.splitter import Splitter
from benchmarks import measure

ROOT = pathlib.Path(__file__).parents[1]
RULES = ("word@1",)
CAPACITIES = (8192, 1728)
DOCUMENT_BYTES = 1023  # and BOS: eight in a row


# ----- build ----------------------------------------------------------------


def write_corpus(
  directory: pathlib.Path, texts: list[bytes], num_files: int, num_bytes: int
) -> int:
  """JSON lines of random cuts of `texts`; returns bytes of text."""
  rng = np.random.default_rng(0)
  whole = b"".join(texts).decode("utf-8", "ignore")
  written = 0
  for number in range(num_files):
    left = num_bytes // num_files
    with open(directory / f"{number:03d}.jsonl", "w") as file:
      while left > 0:
        length = int(rng.lognormal(np.log(2500), 1.0)) + 1
        begin = int(rng.integers(max(len(whole) - length, 1)))
        text = whole[begin : begin + length]
        file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        size = len(text.encode())
        left -= size
        written += size
  return written


_PREPARE = """
import json, resource, sys
from aunet_jax import prepare

if __name__ == "__main__":
  prepare.main(sys.argv[1:])
  own, others = (
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  )
  print(json.dumps({
    "own": own.ru_utime + own.ru_stime,
    "workers": others.ru_utime + others.ru_stime,
    "resident_kb": max(own.ru_maxrss, others.ru_maxrss),
  }))
"""


def prepare(source: pathlib.Path, workers: int, scratch: pathlib.Path) -> dict:
  """One build with `prepare`: what it says, its disk, time and memory."""
  script = scratch / "prepare.py"  # a file, which worker processes import
  script.write_text(_PREPARE)
  with tempfile.TemporaryDirectory(dir=scratch) as cache:
    done = subprocess.run(
      [
        sys.executable, str(script), f"--index={cache}",
        "--config=configs/aunet2_1b.py", f"--config.data.train={source}",
        f"--workers={workers}",
      ],
      cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    said, used = map(json.loads, done.stdout.splitlines()[-2:])
    files = pathlib.Path(cache).rglob("*.bin")
    size = sum(path.stat().st_size for path in files)
  return {**said, **used, "disk_bytes": size}


def build_table(args: argparse.Namespace) -> dict:
  texts = sources.sample(args.input, "text", 60_000_000, lambda skip: None)
  with tempfile.TemporaryDirectory(dir=args.directory) as directory:
    scratch = pathlib.Path(directory)
    source = scratch / "text"
    source.mkdir()
    num_bytes = write_corpus(source, texts, args.files, args.bytes)
    results: dict[int, list[dict]] = {count: [] for count in args.workers}
    for _ in range(args.repeats):
      for count in args.workers:
        results[count].append(prepare(source, count, scratch))
        line = results[count][-1]
        rate = num_bytes / line["seconds"] / 1e6
        print(f"{count} workers: {rate:.1f} MB/s", file=sys.stderr)
  runs = [run for found in results.values() for run in found]
  assert len({run["fingerprint"] for run in runs}) == 1
  documents = runs[0]["documents"] + runs[0]["heldout_documents"]
  table = {
    "text_mb": round(num_bytes / 1e6, 1),
    "files": args.files,
    "documents": documents,
    "index_bytes_per_document_beside_text": round(
      (runs[0]["disk_bytes"] - num_bytes) / documents, 1
    ),
    "workers": [],
  }
  rates: dict[int, float] = {}
  for count, found in results.items():
    best = min(found, key=lambda run: run["seconds"])
    rates[count] = num_bytes / best["seconds"] / 1e6
    used = [run["own"] + run["workers"] for run in found]
    first = args.workers[0]
    table["workers"].append(
      {
        "count": count,
        "seconds": [run["seconds"] for run in found],
        "mb_per_s": round(rates[count], 1),
        "of_linear": round(rates[count] * first / (rates[first] * count), 3),
        # What a busy machine does not change much: processor time, imports
        # and compiling included.
        "processor_seconds": [round(seconds, 1) for seconds in used],
        "of_these_in_the_first_process": [round(r["own"], 1) for r in found],
        "mb_per_processor_second": round(num_bytes / min(used) / 1e6, 1),
        "most_resident_mb_of_a_process": round(
          max(run["resident_kb"] for run in found) / 1e3, 1
        ),
      }
    )
  return table


# ----- start ----------------------------------------------------------------


def _holes(path: pathlib.Path, size: int) -> np.ndarray:
  """Makes a file of zeros that takes no disk; the sums of its blocks."""
  with open(path, "wb") as file:
    file.truncate(size)
  count, rest = divmod(size, blocks.BLOCK)
  sums = [zlib.crc32(bytes(blocks.BLOCK))] * count
  return np.array(sums + [zlib.crc32(bytes(rest))] * (rest > 0), "<u4")


def _table(path: pathlib.Path, arrays) -> tuple[int, np.ndarray]:
  with contextlib.closing(blocks.Writer(path)) as writer:
    for array in arrays:
      writer.write(array.tobytes())
    return writer.size, writer.finish()


def write_store(directory: pathlib.Path, splitter, num: int) -> None:
  """A store of `num` documents of zeros, as `StoreWriter` lays it out."""
  directory.mkdir(parents=True)
  per_row = CAPACITIES[0] // (DOCUMENT_BYTES + 1)
  num_rows = -(-num // per_row)
  step = 1 << 18

  def counts(number):
    return [
      np.arange(at, min(at + step, number), dtype="<i8")
      for at in range(0, number, step)
    ]

  def pieces(part):
    found = np.zeros(len(part), store.piece_dtype(len(splitter.start)))
    found["document"] = part
    found["stop"] = DOCUMENT_BYTES + 1
    found["state"] = splitter.start
    return found

  sums, sizes = [], {}
  for name, made in (
    ("text.bin", num * DOCUMENT_BYTES),
    ("documents.bin", (part * DOCUMENT_BYTES for part in counts(num + 1))),
    ("digests.bin", 8 * num),
    ("names.jsonl", 80 * num),
    ("pieces.bin", map(pieces, counts(num))),
    (
      "rows.bin",
      (np.minimum(part * per_row, num) for part in counts(num_rows + 1)),
    ),
  ):
    if isinstance(made, int):
      sizes[name] = made
      sums.append(_holes(directory / name, made))
    else:
      sizes[name], found = _table(directory / name, made)
      sums.append(found)
  raw = np.concatenate(sums).tobytes()
  (directory / "checksums.bin").write_bytes(raw)
  store.write_json(
    directory / "summary.json",
    {
      "format": store.FORMAT,
      "fingerprint": f"synthetic {directory.name} {num}",
      "content": "synthetic",
      "splitter_hash": splitter.hash,
      "capacities": CAPACITIES,
      "keep_documents": False,
      "state_size": len(splitter.start),
      "num_rows": num_rows,
      "num_pieces": num,
      "num_documents": num,
      "num_bytes": num * DOCUMENT_BYTES,
      "num_cuts": 0,
      "used": [num * (DOCUMENT_BYTES + 1), num],
      "files": sizes,
      "checksum_of_checksums": zlib.crc32(raw),
    },
  )


def _config(cache: pathlib.Path) -> config.DataConfig:
  return config.DataConfig(train=f"{cache}/gone/*.jsonl")


def write_index(cache: pathlib.Path, num_documents: int) -> int:
  """An index in the cache of `_config`; returns how many parts it has."""
  splitter = Splitter(RULES)
  (recipe,) = corpora.recipes_of(_config(cache), splitter, CAPACITIES).train
  directory = cache / f"{recipe.key}-synthetic"
  size = num_documents * DOCUMENT_BYTES
  count = min(-(-size // parts.PART_BYTES), parts.MOST_PARTS)
  ends = np.arange(count + 1) * num_documents // count
  names = [f"{number:05d}" for number in range(count)]
  for name, num in zip(names, np.diff(ends).tolist(), strict=True):
    write_store(directory / "train" / name, splitter, num)
  joined.join(directory / "train", names)
  write_store(directory / "heldout", splitter, 1000)
  store.write_json(
    directory / "index.json",
    {"format": store.FORMAT, "skipped": {}, "listing": "", "waiting": []},
  )
  return count


def start(cache: pathlib.Path) -> dict:
  """Opens the index as `train` does and takes a batch, in this process."""
  begun = time.perf_counter()
  splitter = Splitter(RULES)
  train, heldout = corpora.open_corpora(
    _config(cache), splitter, CAPACITIES, cache, log=lambda line: None,
    how=building.How(most_bytes=-1),
  )  # fmt: skip
  batches = loader.make_loader(train, seed=0, batch_size=16)
  opened = time.perf_counter()
  batch = next(batches)
  took = time.perf_counter()
  assert batch["weights"].sum() == 16 * CAPACITIES[0]
  for _ in range(200):
    next(batches)
  batches.close()
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return {
    "documents": train.num_documents,
    "heldout_documents": heldout.num_documents,
    "open_seconds": round(opened - begun, 3),
    "first_batch_seconds": round(took - opened, 3),
    "resident_mb_after_200_batches": round(usage.ru_maxrss / 1e3, 1),
  }


def start_table(args: argparse.Namespace) -> dict:
  with tempfile.TemporaryDirectory(dir=args.directory) as directory:
    cache = pathlib.Path(directory)
    count = write_index(cache, args.documents)
    taken = sum(p.stat().st_blocks * 512 for p in cache.rglob("*"))
    begun = time.perf_counter()
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.indexing", f"--start={cache}"],
      cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
  said = json.loads(done.stdout.splitlines()[-1])
  return {
    "parts": count,
    "disk_mb": round(taken / 1e6, 1),
    "process_seconds_with_imports_and_200_batches": round(seconds, 2),
    **said,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  add = parser.add_argument
  add("--input", default="python", help="as data.train, for build")
  add("--only", choices=("build", "start"))
  add("--workers", default="1,2")
  add("--files", type=int, default=16)
  add("--bytes", type=int, default=1_000_000_000, help="of text, for build")
  add("--repeats", type=int, default=3)
  add("--documents", type=int, default=100_000_000, help="for start")
  add("--directory", help="for scratch files")
  add("--start", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.workers = [int(count) for count in args.workers.split(",")]
  if args.start is not None:
    print(json.dumps(start(args.start)))
    return
  result = {**measure.machine("indexing"), "index": {}}
  for name, table in (("build", build_table), ("start", start_table)):
    if args.only in (None, name):
      result["index"][name] = table(args)
      print(result["index"][name], file=sys.stderr)
  print(json.dumps(result))


if __name__ == "__main__":
  main()
