"""Makes the data of a fine-tuning recipe from files you have.

  python -m aunet_jax.finetune_data sst2 --input=sst2_val.jsonl \\
      --output=data/sst2

writes train.jsonl and heldout.jsonl, of prompts and completions or of messages.
A hash of the text that examples share (a paragraph, a sentence in all its
languages) decides what is held out, so all examples of one text stay together.
docs/finetuning.md has the recipes.
"""

import argparse
import collections
import hashlib
import itertools
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from aunet_jax import terminal
from aunet_jax.files import written_whole

# Of an example: what decides whether it is held out, and the record; of what is
# left out: why, and None.
Examples = Iterator[tuple[str, dict | None]]

BODY_CHARACTERS = 600  # of a text to summarise, from its start
EXCHANGES = 2  # of a dialogue: a question and an answer each
SPEECH_CHARACTERS = 800  # of a dialogue's turn, so that it fits short rows


def _text(path: str) -> str:
  opened = lzma.open if path.endswith(".xz") else open
  try:
    with opened(path, "rt", encoding="utf-8") as file:
      return file.read()
  except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
    raise ValueError(f"--input={path} is not text: {error}.") from None


def _records(path: str, *fields: str) -> Iterator[list]:
  """Values of fields of every JSON line. Raises: ValueError, with its line."""
  for number, line in enumerate(_text(path).split("\n"), start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      yield [record[field] for field in fields]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"--input={path}:{number} is no object with {', '.join(fields)}: "
        f"{error!r}."
      ) from None


def _pair(prompt: str, completion: str) -> dict:
  return {"prompt": prompt, "completion": completion}


# ----- the recipes ----------------------------------------------------------


def sst2(args: argparse.Namespace) -> Examples:
  """Sentence and label (1 = positive), as GLUE's JSON lines."""
  for sentence, label in _records(args.input, "sentence", "label"):
    answer = "positive" if label else "negative"
    yield sentence, _pair(f"{sentence.strip()}\nPositive or negative?", answer)


def _of_two_sentences(question: str, yes: int):
  def convert(args: argparse.Namespace) -> Examples:
    for one, two, label in _records(
      args.input, "sentence1", "sentence2", "label"
    ):
      answer = "yes" if label == yes else "no"
      yield one, _pair(f"{one}\n{question} {two}", answer)

  return convert


def squad(args: argparse.Namespace) -> Examples:
  """SQuAD's JSON, version 1 or 2; the first answer, or "no answer"."""
  try:
    articles = json.loads(_text(args.input))["data"]
    for paragraph in (p for one in articles for p in one["paragraphs"]):
      context = paragraph["context"]
      for asked in paragraph["qas"]:
        answers = [answer["text"] for answer in asked["answers"]]
        prompt = f"{context}\n{asked['question']}"
        yield context, _pair(prompt, (*answers, "no answer")[0])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"--input={args.input} is not laid out as SQuAD: {error!r}."
    ) from None


def translate(args: argparse.Namespace) -> Examples:
  """Lines of one text in many languages, as NTREX's folder has them.

  `--pairs` names source and target, as "deu-eng"; "*-eng" is from all others.
  """
  files = {}
  for path in sorted(Path(args.input).glob("*.txt")):
    files[path.name.split(".")[-2]] = path
  if not args.pairs:
    raise ValueError("translate needs --pairs, such as deu-eng or '*-eng'.")
  for source, dash, target in (p.partition("-") for p in args.pairs.split(",")):
    sources = [source]
    if source == "*":  # eng-GB is no other language than eng
      sources = [f for f in files if f[:3] != target[:3]]
    for name in (*sources, target):
      if not dash or name not in files:
        raise ValueError(
          f"--pairs: there is no {name!r} in {args.input}, but "
          f"{', '.join(files) or 'no *.txt'}."
        )
    targets = _text(str(files[target])).splitlines()
    for name in sources:
      lines = _text(str(files[name])).splitlines()
      if len(lines) != len(targets):
        raise ValueError(
          f"{files[name]} has {len(lines)} lines, {files[target]} "
          f"{len(targets)}: they are not one text."
        )
      for n, (line, answer) in enumerate(zip(lines, targets, strict=True)):
        if line.strip() and answer.strip():
          yield str(n), _pair(f"{name} to {target}:\n{line}", answer)
        else:
          yield "an empty line", None


def summarise(args: argparse.Namespace) -> Examples:
  """Titles from bodies, of texts that begin with headers as PEPs do."""
  for (text,) in _records(args.input, "text"):
    head, _, body = text.partition("\n\n")
    title = re.search(r"^Title:[ \t]*(\S.*(?:\n[ \t]+.*)*)", head, re.M)
    body = body.strip()[:BODY_CHARACTERS]
    if title and body:
      answer = " ".join(title[1].split())
      yield text, _pair(f"{body}\nA title:", answer)
    else:
      yield "no title, or nothing after the headers", None


def dialogue(args: argparse.Namespace) -> Examples:
  """Speeches of a play ("NAME:" and lines), as turns of two speakers."""
  speeches = [
    block.partition(":\n")[::2] for block in _text(args.input).split("\n\n")
  ]
  speeches = [s for s in speeches if s[0] and s[1].strip()]
  size = 2 * EXCHANGES
  for first in range(0, len(speeches) - size + 1, size):
    some = speeches[first : first + size]
    if any(a == b for (a, _), (b, _) in itertools.pairwise(some)):
      yield "one speaker twice in a row", None
      continue
    if any(len(said) > SPEECH_CHARACTERS for _, said in some):
      yield f"a speech of over {SPEECH_CHARACTERS} characters", None
      continue
    roles = itertools.cycle(("user", "assistant"))
    messages = [
      {"role": role, "content": said.strip()}
      for role, (_, said) in zip(roles, some, strict=False)
    ]
    yield some[0][1], {"messages": messages}


RECIPES: dict[str, Callable[[argparse.Namespace], Examples]] = {
  "sst2": sst2,
  "rte": _of_two_sentences("Does it follow that", 0),
  "mrpc": _of_two_sentences("Does it mean the same as", 1),
  "squad": squad,
  "translate": translate,
  "summarise": summarise,
  "dialogue": dialogue,
}


# ----- the command ----------------------------------------------------------


def is_heldout(shared: str, fraction: float) -> bool:
  digest = hashlib.blake2b(shared.encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:8], "little") < fraction * 2**64


def split(
  examples: Examples, fraction: float, limit: int | None = None
) -> tuple[dict[str, list[str]], collections.Counter]:
  """The JSON lines of both files, and how much was left out, by reason."""
  lines, left_out = {"train": [], "heldout": []}, collections.Counter()
  for shared, record in examples:
    if record is None:
      left_out[shared] += 1
      continue
    if limit is not None and sum(map(len, lines.values())) == limit:
      break
    name = "heldout" if is_heldout(shared, fraction) else "train"
    lines[name].append(json.dumps(record) + "\n")
  return lines, left_out


@terminal.command
def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.finetune_data",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("recipe", choices=RECIPES)
  add("--input", required=True, help="a file; for translate, a folder")
  add("--output", required=True, help="folder for the two files")
  add("--pairs", help="for translate: deu-eng, or '*-eng', joined by commas")
  add("--limit", type=int, help="use only the first N examples")
  add("--heldout_fraction", type=float, default=0.1)
  args = parser.parse_args(argv)
  if not 0 <= args.heldout_fraction < 1:
    raise ValueError(
      f"--heldout_fraction={args.heldout_fraction} must be in [0, 1)."
    )
  if not Path(args.input).exists():
    raise ValueError(f"--input={args.input}: there is no such file.")
  examples = RECIPES[args.recipe](args)
  lines, left_out = split(examples, args.heldout_fraction, args.limit)
  if not lines["train"]:
    raise ValueError(f"--input={args.input} holds no example to train on.")
  Path(args.output).mkdir(parents=True, exist_ok=True)
  for name, some in lines.items():
    path = Path(args.output) / f"{name}.jsonl"
    with written_whole(path) as file:
      file.write("".join(some).encode())
    print(f"{path}: {len(some):,} examples")
  for reason, count in left_out.items():
    print(f"left out: {count:,}, {reason}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
