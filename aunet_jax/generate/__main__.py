"""Text from a trained AU-Net, streamed to the terminal.

  python -m aunet_jax.generate --workdir=runs/quickstart --prompt='def main'

`--help` lists what can be set; docs/generation.md explains it. The library is
`generator.Generator`.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from aunet_jax.generate.generator import Completion, Generator
from aunet_jax.generate.sampling import Sampling


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.generate",
    description="Continues a text with a trained AU-Net, byte by byte.",
    epilog=(
      "examples:\n"
      "  python -m aunet_jax.generate --workdir=runs/quickstart "
      "--prompt='def main'\n"
      "  … --temperature=0                    the most likely text\n"
      "  … --temperature=0.8 --top_p=0.95     livelier, few mistakes\n"
      "  … --stop='\\n\\n' --samples=4          four paragraphs\n"
      "  … --interactive                      type, read, type on\n"
    ),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--workdir", required=True, help="of a training run, or a conversion")
  add("--prompt", help="text to continue; left out: starts a document")
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
    help="0 = always the most likely byte; 1 = as the model believes "
    "(%(default)s)",
  )
  add("--top_k", type=int, help="draw from the k most likely bytes only")
  add(
    "--top_p",
    type=float,
    default=1.0,
    help="draw from the fewest bytes that have this much probability "
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
    help="never write N bytes in a row that were written before",
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
    help="go on past the length the model was trained on, up to this many",
  )
  add(
    "--levels",
    choices=("rule", "head"),
    default="rule",
    help="what cuts the generated text into stages: the splitting rule, or "
    "the level head of a model trained with one (%(default)s)",
  )
  add("--int8", action="store_true", help="keep matrices as 8-bit integers")
  add("--json", action="store_true", help="one JSON object per sample instead")
  add("--interactive", action="store_true", help="prompt again and again")
  return parser


def _to_json(completion: Completion) -> str:
  return json.dumps(
    {
      "prompt": completion.prompt.decode("utf-8", errors="replace"),
      "text": completion.text,
      "bytes": list(completion.data),
      "logprobs": [round(float(x), 5) for x in completion.logprobs],
      "levels": completion.levels.tolist(),
      "reason": completion.reason,
    }
  )


def _write(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


def _answer(generator: Generator, prompt: bytes, args, settings) -> str:
  """Writes continuations of one prompt; returns the first one's reason."""
  streams = args.samples == 1 and not args.json

  def on_text(row, text):
    _write(text)

  completions = generator.generate(
    [prompt],
    max_bytes=args.max_bytes,
    settings=settings,
    num_samples=args.samples,
    seed=args.seed,
    stop=[text.replace("\\n", "\n").encode() for text in args.stop],
    levels=args.levels,
    max_positions=args.max_positions,
    on_text=on_text if streams else None,
  )
  for number, completion in enumerate(completions):
    if args.json:
      _write(_to_json(completion) + "\n")
    elif not streams:
      shown = completion.prompt.decode("utf-8", errors="replace")
      _write(f"--- sample {number} ({completion.reason})\n")
      _write(shown + completion.text + "\n")
  if streams:
    _write("\n")
  return completions[0].reason


def _interact(generator: Generator, args, settings) -> None:
  """Reads a line, continues the conversation so far, and again."""
  print("Type a text and press enter; an empty line forgets, Ctrl-D ends.")
  history = args.prompt.encode("utf-8", errors="surrogateescape")
  while True:
    try:
      line = input("> ")
    except (EOFError, KeyboardInterrupt):
      print()
      return
    if not line:
      history = b""
      print("(new document)")
      continue
    prompt = history + line.encode("utf-8", errors="surrogateescape")
    try:
      (completion,) = generator.generate(
        [prompt],
        max_bytes=args.max_bytes,
        settings=settings,
        seed=args.seed,
        stop=[text.replace("\\n", "\n").encode() for text in args.stop],
        levels=args.levels,
        max_positions=args.max_positions,
        on_text=lambda row, text: _write(text),
      )
    except ValueError as error:
      print(f"error: {error}")
      continue
    print()
    history = prompt + completion.data + b"\n"


def main(argv: Sequence[str] | None = None) -> int:
  """Exit status: 0, 130 after Ctrl-C, 2 for a request that cannot be met."""
  from aunet_jax.workdir.layout import CheckpointError

  args = make_parser().parse_args(argv)
  try:
    settings = Sampling(
      temperature=args.temperature,
      top_k=args.top_k,
      top_p=args.top_p,
      min_p=args.min_p,
      no_repeat=args.no_repeat,
    )
    if args.max_bytes < 1:
      raise ValueError(f"max_bytes={args.max_bytes} must be at least 1.")
    if args.prompt == "":
      raise ValueError(
        "--prompt is empty: give it a text, or leave it out to write a "
        "document from its start."
      )
    args.prompt = args.prompt or ""
    generator = Generator.from_workdir(args.workdir, int8=args.int8)
    if args.interactive:
      _interact(generator, args, settings)
      return 0
    prompt = args.prompt.encode("utf-8", errors="surrogateescape")
    if args.samples == 1 and not args.json:
      _write(args.prompt)
    reason = _answer(generator, prompt, args, settings)
  except (ValueError, CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:  # while loading or compiling
    return 130
  return 130 if reason == "interrupted" else 0


if __name__ == "__main__":
  sys.exit(main())
