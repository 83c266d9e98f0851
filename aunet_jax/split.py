"""Shows how a text is split into stages, and what that means for a corpus.

  # in the terminal: the positions of every stage, in colour
  python -m aunet_jax.split --rule=word@1,word@2 README.md
  python -m aunet_jax.split --rule=word@1,word@2 --text='It is 1234.'

  # the same as a web page
  python -m aunet_jax.split --rule=word@1,word@2 README.md --html=stages.html

  # a whole corpus: bytes per segment, longest segments, capacities for a row
  python -m aunet_jax.split --rule=word@1,word@2 --stats 'books/*.jsonl.gz'

Stage 1 is the bytes. The first rule feeds stage 2, the second stage 3, and so
on; each stage has the positions at which its rule cuts, and those of all deeper
stages. Rules:

  word@K       after every K words; at numbers, punctuation, newlines. The
               rule of the released AU-Net models, K = 1, 2, 4
  anyscript@K  the same, with short words in scripts that use no spaces
  pretok       the tokens of the paper's Appendix B
  punct        numbers, punctuation and newlines only
  stride@N     every N bytes
  bytes        every byte
  entropy@FILE where a small model finds the next byte hard to predict
  tokens@FILE  tokens of a vocabulary (tokenizer.json or .tiktoken), causally
  MODULE:NAME  your own; see docs/splitting.md

FILE may be any kind of file in docs/data.md, compressed or not, a directory, a
glob, or "python" for the text that ships with Python. Without FILE, standard
input is read.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator

from aunet_jax import terminal
from aunet_jax.data import planner, reading, sources
from aunet_jax.data.planner import statistics
from aunet_jax.splitting import view
from aunet_jax.splitting.splitter import Splitter


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.split",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "files",
    nargs="*",
    metavar="FILE",
    help="what to read; - or none: standard input",
  )
  add(
    "--rule",
    default="word@1",
    help="rules of stages 2, 3, …, joined by commas (default: word@1)",
  )
  add("--text", help="a text to split, instead of files")
  add(
    "--html",
    metavar="OUT",
    help="write a web page to this file, instead of the terminal",
  )
  add(
    "--stats",
    action="store_true",
    help="read everything and print statistics only",
  )
  add("--json", action="store_true", help="statistics as one JSON object")
  add(
    "--max_bytes",
    type=int,
    default=4000,
    help="bytes of text to show at most (default: 4000)",
  )
  add(
    "--row_bytes",
    type=int,
    default=8192,
    help="row length that capacities are recommended for (default: 8192)",
  )
  add(
    "--longest",
    type=int,
    default=5,
    help="longest segments of stage 2 to print with --stats (default: 5)",
  )
  add(
    "--text_field",
    default="text",
    help="text field of JSON objects and table rows",
  )
  add(
    "--separator",
    help="separates the documents of a text file; see docs/data.md",
  )
  add(
    "--color",
    choices=("auto", "always", "never"),
    default="auto",
    help="auto: if the output is a terminal and NO_COLOR is not set",
  )
  args = parser.parse_args(argv)
  if args.text is not None and args.files:
    parser.error(f"--text and files ({' '.join(args.files)}); give one of them")
  if args.html and (args.stats or args.json):
    parser.error("--html shows a text; --stats and --json count. Give one.")
  for name in ("max_bytes", "row_bytes"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be at least 1.")
  return args


def _documents(args: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
  """Names and texts of what was asked for."""
  if args.text is not None:
    # Bytes that the shell passed and that are no UTF-8 come back as they were.
    yield "the text given", args.text.encode("utf-8", "surrogateescape")
    return
  if not args.files or args.files == ["-"]:
    if sys.stdin.isatty():
      print("reading standard input; Ctrl-D ends it", file=sys.stderr)
    yield "standard input", sys.stdin.buffer.read()
    return
  skips = reading.SkipLog(reading.log_to_stderr)
  for document in sources.documents(
    args.files, args.text_field, None, skips.add, args.separator
  ):
    yield document.name, document.text
  skips.finish()


def table(found: dict) -> list[list[str]]:
  """The per-stage part of `statistics` as rows of text, headings first."""
  rows = [
    ["stage", "rule", "segments", "bytes each", "longest", "over 16 bytes"]
  ]
  for stage in found["stages"]:
    rows.append(
      [
        str(stage["stage"]),
        stage["rule"],
        f"{stage['segments']:,}",
        f"{stage['mean_bytes']:.2f}",
        f"{stage['longest_bytes']:,}",
        f"{stage['share_longer_than_16']:.2%}",
      ]
    )
  if found["capacities"]:
    rows[0].append("capacity")
    for row, capacity in zip(rows[1:], found["capacities"][1:], strict=True):
      row.append(f"{capacity:,}")
  return rows


def report(found: dict) -> str:
  """`statistics` for people."""
  rows = table(found)
  widths = [max(len(cell) for cell in column) for column in zip(*rows)]  # noqa: B905
  lines = [
    f"{found['documents']:,} documents, {found['bytes']:,} bytes, split at "
    f"{found['megabytes_per_second']:,.0f} MB/s",
    "",
  ]
  lines += [
    "  ".join(
      cell.rjust(width) for cell, width in zip(row, widths, strict=True)
    )
    for row in rows
  ]
  if found["capacities"]:
    fill = ", ".join(f"{share:.1%}" for share in found["fill"])
    capacities = ", ".join(map(str, found["capacities"]))
    lines += [
      "",
      f"capacities for rows of {found['row_bytes']} bytes: {capacities} "
      f"(slots filled: {fill})",
    ]
  elif found["stages"]:
    lines += [
      "",
      f"recommended capacities need {planner.MIN_ROWS} rows of "
      f"{found['row_bytes']} bytes; give more text or a smaller --row_bytes",
    ]
  if found["longest"]:
    lines += ["", "longest segments of stage 2:"]
  for segment in found["longest"]:
    lines.append(
      f"  {segment['bytes']:,} bytes at {segment['offset']:,} of "
      f"{segment['document']}: {view.on_one_line(segment['text'])}"
    )
  return "\n".join(lines)


def _as_json(found: dict) -> str:
  longest = [
    segment | {"text": segment["text"].decode("utf-8", "replace")}
    for segment in found["longest"]
  ]
  return json.dumps(found | {"longest": longest})


def _show(args: argparse.Namespace, splitter: Splitter) -> None:
  """Draws the start of the first document."""
  name, text = next(_documents(args), (None, b""))
  if name is None:
    raise ValueError(f"no text to show in {', '.join(args.files)}.")
  data = text[: args.max_bytes]
  levels = splitter.levels(data)
  rules = list(splitter.rules)
  found = statistics([(name, data)], splitter, rules, args.row_bytes)
  title = name
  if len(data) < len(text):
    title += f", first {len(data):,} of {len(text):,} bytes"
  if args.html:
    with open(args.html, "w", encoding="utf-8") as file:
      file.write(view.page(title, data, levels, rules, table(found)))
    print(f"wrote {args.html}")
    return
  colour = args.color == "always" or (
    args.color == "auto"
    and sys.stdout.isatty()
    and not os.environ.get("NO_COLOR")
  )
  print(f"{title}\n{view.legend(rules, colour)}\n")
  print(view.draw(data, levels, colour))
  print()
  for row in table(found)[1:]:
    print(f"stage {row[0]}: {row[2]} segments of {row[3]} bytes on average")


@terminal.command
def main(argv: list[str] | None = None) -> None:
  args = _parse(argv)
  rules = [rule for rule in args.rule.split(",") if rule]
  splitter = Splitter(rules)
  if args.stats or args.json:
    found = statistics(
      _documents(args), splitter, rules, args.row_bytes, args.longest
    )
    print(_as_json(found) if args.json else report(found))
  else:
    _show(args, splitter)


if __name__ == "__main__":
  sys.exit(main())
