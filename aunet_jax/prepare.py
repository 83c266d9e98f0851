"""Turns any source into shuffled ArrayRecord shards, or builds a run's index.

  python -m aunet_jax.prepare --input='books/*.jsonl.gz' --output=books
  python -m aunet_jax.train --config=CONFIG --workdir=DIR \\
      --config.data.train=books/train --config.data.heldout=books/heldout

  # Build the packed index of a config's data before the training hosts start.
  python -m aunet_jax.prepare --index=CACHE --config=CONFIG --workers=16
  python -m aunet_jax.train --config=CONFIG --config.data.cache_dir=CACHE …

  # Which capacities suit this corpus and these rules? Nothing is written.
  python -m aunet_jax.prepare --input=books --rules=word@1,word@2 --plan

Training can read every kind of source directly. Make shards if many runs share
a corpus, if documents are ordered (by site, by date) and should be shuffled, or
to have a Hugging Face dataset on disk (--input=hf:NAME, hf:NAME:SPLIT or
hf:NAME:CONFIG:SPLIT, streamed; needs the extra `hf`). docs/data.md has a table
of the file types.

The output directory has train/*.arrayrecord and heldout/*.arrayrecord, one
record per document (its bytes), and index.json: documents and bytes of every
shard, skipped records by reason, segment lengths per stage, and recommended
capacities. It appears only when complete; until then a second copy of the text
is beside it.

--index builds what `train` would build itself, bit for bit, in any number of
processes. If killed, the same command continues. Machines that share CACHE also
share the work: start the same command on each; if their file system has no
locks, set AUNET_JAX_LOCKS=none and give each --share=I/N. The last line is
JSON.
"""

import argparse
import json
import re
import sys
import time

from aunet_jax import config, terminal
from aunet_jax.data import building, corpora, planner, reading, sources
from aunet_jax.data.shards import SAMPLE_ROWS, log, write
from aunet_jax.splitting.splitter import Splitter


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--input",
    help="files, directories, globs or URLs, joined by commas; 'python' for "
    "the text that ships with Python; hf:NAME[:[CONFIG:]SPLIT] for a dataset",
  )
  add("--output", help="directory to make; must not exist")
  add(
    "--rules",
    default="word@1",
    help="splitting rules of stages 2, 3, ..., joined by commas, for the "
    "statistics and the plan; the shards do not depend on them",
  )
  add(
    "--row_bytes",
    type=int,
    default=8192,
    help="bytes in a row, for the plan",
  )
  add(
    "--plan", action="store_true", help="only recommend capacities, from a "
    "sample of the input",
  )  # fmt: skip
  add(
    "--text_field",
    default="text",
    help="text field of JSON objects and table rows; a.b is nested",
  )
  add(
    "--separator",
    help="separates the documents of a text file: line, blank_line or any "
    "string (default: a file is a document)",
  )
  add(
    "--heldout_fraction",
    type=float,
    default=0.02,
    help="share of documents held out, by a hash of their text; near copies "
    "of training documents are not held out",
  )
  add("--seed", type=int, default=0, help="seed of the shuffle")
  add(
    "--shard_bytes",
    type=int,
    default=256_000_000,
    help="approximate bytes of text in a shard",
  )
  add(
    "--max_skip_fraction",
    type=float,
    default=0.01,
    help="fail if more than this share of the records, or of the bytes of "
    "text, is lost",
  )
  index = parser.add_argument_group(
    "index", "settings of data and model come from --config, as in train"
  )
  add = index.add_argument
  add(
    "--index",
    metavar="CACHE",
    help="directory to build a run's index in, its data.cache_dir",
  )
  add(
    "--config",
    metavar="FILE",
    help="config of the run; --config.a.b=VALUE as in train",
  )
  add("--workers", type=int, default=1, help="processes on this machine")
  add(
    "--share",
    metavar="I/N",
    help="build only share I (from 0) of N; the last to finish joins them",
  )
  args, rest = parser.parse_known_args(argv)
  if args.index is not None:
    return _parse_index(parser, args, rest)
  if rest or args.config:
    other = " ".join(rest or ["--config"])
    parser.error(f"{other}: settings are for --index; see --help.")
  if not args.input:
    parser.error("give --input=FILES, or --index=CACHE.")
  if not args.plan and not args.output:
    parser.error("give --output=DIR, or --plan to write nothing.")
  if not 0 <= args.heldout_fraction < 1:
    parser.error(f"--heldout_fraction={args.heldout_fraction} not in [0, 1).")
  if args.separator == "":
    parser.error('--separator="" cannot separate; give a string.')
  if args.shard_bytes < 1:
    parser.error(f"--shard_bytes={args.shard_bytes} must be >= 1.")
  return args


def _parse_index(
  parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> argparse.Namespace:
  if args.input or args.output or args.plan:
    parser.error(
      "--index reads the sources that data.train of --config names; leave out "
      "--input, --output and --plan."
    )
  if not args.config:
    parser.error("--index needs --config=FILE, the config of the run.")
  if args.workers < 1:
    parser.error(f"--workers={args.workers} must be >= 1.")
  share = re.fullmatch(r"(\d+)/(\d+)", args.share or "0/1")
  if share is None or not int(share[1]) < int(share[2]):
    parser.error(f"--share={args.share} must be I/N with 0 <= I < N, as 0/4.")
  args.share = int(share[1]), int(share[2])
  args.config = config.parse_flags([f"--config={args.config}", *rest])
  return args


def build_index(args: argparse.Namespace) -> dict:
  """Builds the index of a config; returns what there is of it."""
  cfg = args.config
  splitter = Splitter(cfg.model.rules, cfg.has_roles)
  how = building.How(args.workers, args.share)
  where = cfg.data, splitter, cfg.model.capacities, args.index
  start = time.monotonic()
  if not corpora.build_indexes(*where, how, log):
    return {"finished": False}
  train, heldout = corpora.open_corpora(*where, log=log)
  said = {
    "finished": True,
    "seconds": round(time.monotonic() - start, 2),
    "documents": train.num_documents,
    "bytes": train.num_bytes,
    "rows": train.num_rows,
    "fill": [round(share, 4) for share in train.fill],
    "fingerprint": train.fingerprint,
    "heldout_documents": heldout.num_documents if heldout else 0,
    "heldout_bytes": heldout.num_bytes if heldout else 0,
    "heldout_fingerprint": heldout and heldout.fingerprint,
  }
  log(
    f"start the run with the same --config and settings, and "
    f"--config.data.cache_dir={args.index}"
  )
  return said


def show_plan(plan: planner.Plan, rules: list[str]) -> str:
  lines = ["stage  rule        capacity  filled"]
  for number, (rule, capacity, fill) in enumerate(
    zip(["bytes", *rules], plan.capacities, plan.fill, strict=True), start=1
  ):
    lines.append(f"{number:5}  {rule:10}  {capacity:8}  {fill:6.1%}")
  lines.append(
    f"({plan.num_bytes / 1e6:.1f} MB of sample in {plan.num_rows} rows, "
    f"{plan.num_cuts} cuts between rows)"
  )
  return "\n".join(lines)


@terminal.command
def main(argv: list[str] | None = None) -> None:
  args = _parse(argv)
  if args.index is not None:
    print(json.dumps(build_index(args)))
    return
  rules = [rule for rule in args.rules.split(",") if rule]
  splitter = Splitter(rules)
  if args.plan:
    skips = reading.SkipLog(log)
    texts = sources.sample(
      args.input,
      args.text_field,
      SAMPLE_ROWS * args.row_bytes,
      skips.add,
      args.separator,
    )
    skips.finish()
    plan = planner.recommend(texts, splitter, args.row_bytes)
    print(show_plan(plan, rules))
  else:
    print(json.dumps(write(args, splitter, rules)))


if __name__ == "__main__":
  sys.exit(main())
