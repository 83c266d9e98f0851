"""Measures how often a tuned model gives the data's answers.

  python -m aunet_jax.answers --workdir=runs/sst2 \\
      --data=data/sst2/heldout.jsonl --labels=positive,negative

With --labels, the answer is the likeliest label, scored as a whole turn;
without, the model generates greedily. Only the last turn of a conversation is
asked for. The last line of the output is JSON: `exact` is the share of answers
equal to the data's, byte for byte; `word_f1` is the mean overlap of words,
ignoring articles, punctuation and case as SQuAD does.
"""

import argparse
import json
import sys

from aunet_jax import terminal
from aunet_jax.data import conversations, reading, roles, sources
from aunet_jax.evaluate.score import score
from aunet_jax.evaluate.word_overlap import word_f1
from aunet_jax.files import written_whole
from aunet_jax.generate import chat
from aunet_jax.generate.generator import Generator
from aunet_jax.generate.sampling import Sampling
from aunet_jax.workdir import load


def questions(
  loaded, paths: str, limit: int | None
) -> list[tuple[bytes, bytes]]:
  """(prompt, expected answer) of every conversation."""
  reader = conversations.make_reader(
    loaded.config.data,
    loaded.splitter,
    loaded.model.config.capacities,
    loaded.tokenizer,
  )
  skips = reading.SkipLog(reading.log_to_stderr)
  files, missing = sources.list_sources(paths)
  for skip in missing:
    skips.add(skip)
  found = []
  for file in files:
    for record in sources.read_source(file, reader.field, turns=reader):
      if isinstance(record, sources.Skip):
        skips.add(record)
        continue
      *turns, answer = roles.decode(record.text)
      found.append((roles.encode_prompt(turns), answer.text))
  skips.finish()
  if not found:
    raise ValueError(f"--data={paths} holds no conversation to ask.")
  return found[:limit]


@terminal.command
def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.answers",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--workdir", required=True, help="workdir of a tuned model")
  add("--data", required=True, help="records in the format it was tuned on")
  add("--labels", help="answers to choose from, joined by commas")
  add("--max_bytes", type=int, default=200, help="longest answer (%(default)s)")
  add("--limit", type=int, help="ask only the first N questions")
  add("--batch_size", type=int, default=16)
  add(
    "--output", metavar="FILE", help="file for the answers, one JSON line each"
  )
  terminal.add_trust_rules(parser)
  args = parser.parse_args(argv)
  for name in ("max_bytes", "limit", "batch_size"):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      raise ValueError(f"--{name}={getattr(args, name)} must be positive.")
  loaded = load.load(args.workdir, trust_rules=args.trust_rules)
  if not loaded.splitter.has_roles:
    raise ValueError(
      f"{args.workdir} holds a model that was not tuned on conversations; "
      f"see docs/finetuning.md."
    )
  asked = questions(loaded, args.data, args.limit)
  if args.labels is not None:
    answers = _ranked(loaded, asked, args.labels.split(","), args.batch_size)
  else:
    answers = _written(loaded, asked, args.max_bytes, args.batch_size)
  rows = []
  for (prompt, expected), answer in zip(asked, answers, strict=True):
    expected, answer = (
      x.decode("utf-8", "replace") for x in (expected, answer)
    )
    rows.append(
      {
        "prompt": prompt.decode("utf-8", "replace"),
        "answer": answer,
        "expected": expected,
        "exact": answer == expected,
        "word_f1": word_f1(answer, expected),
      }
    )
  if args.output is not None:
    with written_whole(args.output) as file:
      file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
  total = {"questions": len(rows)}
  for name in ("exact", "word_f1"):
    total[name] = sum(row[name] for row in rows) / len(rows)
  print(json.dumps(total))
  return 0


def _ranked(loaded, asked, labels: list[str], batch_size: int) -> list[bytes]:
  texts = [roles.encode_text(label) for label in labels]
  scores = score(
    loaded.model.config,
    loaded.params,
    loaded.splitter,
    [(prompt, text + roles.END_TEXT) for prompt, _ in asked for text in texts],
    batch_size=batch_size,
    tokenizer=loaded.tokenizer,
  )
  answers = []
  for n in range(len(asked)):
    some = scores[n * len(texts) : (n + 1) * len(texts)]
    best = max(range(len(texts)), key=lambda i: some[i].nats)
    answers.append(texts[best])
  return answers


def _written(loaded, asked, max_bytes: int, batch_size: int) -> list[bytes]:
  generator = Generator(
    loaded.model.config,
    loaded.params,
    loaded.splitter,
    tokenizer=loaded.tokenizer,
  )
  limit = generator.config.position_limit
  if loaded.tokenizer is not None:  # a text of tokens ends with the positions
    limit = None
  answers: dict[int, bytes] = {}
  order = sorted(range(len(asked)), key=lambda n: len(asked[n][0]))
  for first in range(0, len(order), batch_size):
    some = order[first : first + batch_size]
    prompts = [asked[n][0] for n in some]
    room = max_bytes
    if limit is not None:  # the data's own answer fits, so there is some
      room = min(room, limit - 1 - max(map(len, prompts)))
    written = generator.generate(
      prompts, max_bytes=room, settings=Sampling(temperature=0),
      stop=chat.STOPS,
    )  # fmt: skip
    for n, one in zip(some, written, strict=True):
      answers[n] = one.data
  return [answers[n] for n in range(len(asked))]


if __name__ == "__main__":
  sys.exit(main())
