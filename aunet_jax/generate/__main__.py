"""Generates text with a trained AU-Net, streamed to the terminal.

  python -m aunet_jax.generate --workdir=runs/quickstart --prompt='def main'

`--help` lists what can be set; docs/generation.md explains it. The library is
`generator.Generator`.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence

from aunet_jax import terminal
from aunet_jax.data import roles
from aunet_jax.generate import chat, utf8
from aunet_jax.generate.generator import Completion, Generator
from aunet_jax.generate.sampling import Sampling, check_stops


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.generate",
    description="Continues a text with a trained AU-Net, byte by byte.",
    epilog=(
      "examples:\n"
      "  python -m aunet_jax.generate --workdir=runs/quickstart "
      "--prompt='def main'\n"
      "  … --temperature=0                    the most likely text\n"
      "  … --temperature=0.8 --top_p=0.95     more varied, few mistakes\n"
      "  … --stop='\\n\\n' --samples=4          four paragraphs\n"
      "  … --interactive                      type, read, type again\n"
      "  … --chat                             chat with a tuned model\n"
    ),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--workdir", required=True, help="workdir of a run or a conversion")
  add("--prompt", help="text to continue (default: start a new document)")
  add(
    "--max_bytes",
    type=int,
    default=400,
    help="bytes to generate at most (%(default)s)",
  )
  add(
    "--temperature",
    type=float,
    default=0.8,
    help="0 = always the most likely byte; 1 = the model's own probabilities "
    "(%(default)s)",
  )
  add("--top_k", type=int, help="sample from the k most likely bytes only")
  add(
    "--top_p",
    type=float,
    default=1.0,
    help="sample from the fewest bytes whose probabilities add up to this "
    "(%(default)s)",
  )
  add(
    "--min_p",
    type=float,
    default=0.0,
    help="drop bytes less likely than this share of the most likely one",
  )
  add(
    "--no_repeat",
    type=int,
    metavar="N",
    help="never write the same N bytes in a row twice",
  )
  add("--seed", type=int, default=0, help="same seed, same text (%(default)s)")
  add(
    "--samples",
    type=int,
    default=1,
    help="continuations to write (%(default)s)",
  )
  add(
    "--stop",
    action="append",
    default=[],
    metavar="TEXT",
    help="end before this text; \\n is a newline; may be given again",
  )
  add(
    "--max_positions",
    type=int,
    help="allow texts longer than the model was trained on, up to this many "
    "positions",
  )
  add(
    "--levels",
    choices=("rule", "head"),
    default="rule",
    help="what splits the generated text into stages: the splitting rule, or "
    "the level head of a model trained with one (%(default)s)",
  )
  add(
    "--utf8",
    action="store_true",
    help="only bytes that keep the text valid UTF-8",
  )
  add(
    "--drafts",
    action="store_true",
    help="speculative decoding with the heads of a model trained with "
    "model.heads; gives the same text",
  )
  add("--int8", action="store_true", help="keep matrices as 8-bit integers")
  terminal.add_trust_rules(parser)
  add("--json", action="store_true", help="print one JSON object per sample")
  add(
    "--interactive",
    action="store_true",
    help="type a line, read its continuation, and again",
  )
  add(
    "--chat",
    action="store_true",
    help="chat with a model that was tuned on conversations; with --prompt, "
    "one answer",
  )
  add("--system", metavar="TEXT", help="the system's turn before a --chat")
  return parser


def _write(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


def _as_bytes(text: str) -> bytes:
  """What was typed; bytes that are no UTF-8 come as they are."""
  return text.encode("utf-8", errors="surrogateescape")


def _shown(prompt: bytes) -> str:
  """A prompt as text, but for a character that its continuation completes."""
  complete = prompt.removesuffix(utf8.unfinished(prompt))
  return complete.decode("utf-8", errors="replace")


def _to_json(completion: Completion) -> str:
  return json.dumps(
    {
      "prompt": _shown(completion.prompt),
      "text": completion.text,
      "bytes": list(completion.data),
      "prompt_bytes": list(completion.prompt),
      "logprobs": [round(float(x), 5) for x in completion.logprobs],
      "levels": completion.levels.tolist(),
      "reason": completion.reason,
    }
  )


def _settings(args) -> dict:
  """Arguments of `Generator.generate`, as far as flags say them.

  Raises: ValueError for one that cannot be, before a model is loaded.
  """
  if args.max_bytes < 1:
    raise ValueError(f"max_bytes={args.max_bytes} must be at least 1.")
  stop = [_as_bytes(text.replace("\\n", "\n")) for text in args.stop]
  return {
    "max_bytes": args.max_bytes,
    "settings": Sampling(
      temperature=args.temperature,
      top_k=args.top_k,
      top_p=args.top_p,
      min_p=args.min_p,
      no_repeat=args.no_repeat,
      utf8=args.utf8,
    ),
    "seed": args.seed,
    "stop": check_stops(stop),
    "levels": args.levels,
    "drafts": args.drafts,
    "max_positions": args.max_positions,
  }


def _stream(row: int, text: str) -> None:
  _write(text)


def _answer(generator: Generator, prompt: bytes, args, settings) -> str:
  """Writes continuations of one prompt; returns the first one's reason."""
  streams = args.samples == 1 and not args.json
  if streams:
    _write(_shown(prompt))
  completions = generator.generate(
    [prompt],
    num_samples=args.samples,
    on_text=_stream if streams else None,
    **settings,
  )
  for number, completion in enumerate(completions):
    if args.json:
      _write(_to_json(completion) + "\n")
    elif not streams:
      _write(f"--- sample {number} ({completion.reason})\n")
      _write(_shown(prompt) + completion.text + "\n")
  if streams:
    _write("\n")
  return completions[0].reason


def _typed() -> Iterator[str]:
  """The lines that somebody types, until Ctrl-D."""
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="surrogateescape")
  print("Type a text and press enter; an empty line forgets, Ctrl-D ends.")
  while True:
    try:
      line = input("> ")
    except (EOFError, KeyboardInterrupt):
      print()
      return
    yield line


def _interact(generator: Generator, prompt: bytes, settings) -> None:
  """Reads a line, continues the conversation so far, and again."""
  history = prompt
  for line in _typed():
    if not line:
      history = b""
      print("(new document)")
      continue
    prompt = history + _as_bytes(line)
    try:
      (completion,) = generator.generate([prompt], on_text=_stream, **settings)
    except ValueError as error:
      print(f"error: {error}")
      continue
    print()
    history = prompt + completion.data + b"\n"


def _chat(generator: Generator, args, settings) -> None:
  """One answer to --prompt, or a conversation line by line."""
  chat.check(generator)
  begin = []
  if args.system is not None:
    begin = [roles.turn_of("system", args.system)]
  settings["stop"] = (*chat.STOPS, *settings["stop"])
  sizes = args.max_bytes, args.max_positions

  def answer(turns, text):
    turns = [*turns, roles.turn_of("user", text)]
    prompt = chat.prompt_of(generator, turns, *sizes)
    (completion,) = generator.generate([prompt], on_text=_stream, **settings)
    _write("\n")
    return [*turns, chat.answered(completion)]

  if args.prompt is not None:
    answer(begin, args.prompt)
    return
  turns = begin
  for line in _typed():
    if not line:
      turns = begin
      print("(new conversation)")
      continue
    try:
      turns = answer(turns, line)
    except ValueError as error:
      print(f"error: {error}")


def _check_chat(args) -> None:
  """Raises: ValueError for flags that do not go with --chat."""
  if args.system is not None and not args.chat:
    raise ValueError("--system is for --chat; add --chat, or leave it out.")
  others = {
    "--interactive": args.interactive,
    "--json": args.json,
    "--utf8": args.utf8,  # no mark is UTF-8: a turn would never end
    "--samples": args.samples != 1,
  }
  for name, given in others.items():
    if args.chat and given:
      raise ValueError(f"{name} and --chat do not go together; leave one out.")


@terminal.command
def main(argv: Sequence[str] | None = None) -> int:
  """Exit status: 0, 130 after Ctrl-C, 2 for a request that cannot be met."""
  args = make_parser().parse_args(argv)
  if args.prompt == "":
    raise ValueError(
      "--prompt is empty: give it a text, or leave it out to write a "
      "document from its start."
    )
  _check_chat(args)
  prompt = _as_bytes(args.prompt or "")
  settings = _settings(args)
  generator = Generator.from_workdir(
    args.workdir, int8=args.int8, trust_rules=args.trust_rules
  )
  if args.chat:
    _chat(generator, args, settings)
    return 0
  if args.interactive:
    _interact(generator, prompt, settings)
    return 0
  reason = _answer(generator, prompt, args, settings)
  return terminal.EXIT_INTERRUPTED if reason == "interrupted" else 0


if __name__ == "__main__":
  sys.exit(main())
