"""The published splitting expressions, run over whole texts, for comparison.

    python -m aunet_jax.split_reference RECORDED.jsonl…

compares our levels with levels recorded from the official code
(facebookresearch/lingua, apps/aunet) and counts the differences by kind.

Here the rules are what they were published as: regular expressions searched
in a finished text (AU-Net paper, Appendix B, and the released configs). They
look ahead, so nothing else in the package uses them. To need no regex library
that knows Unicode, they run on the text with each character replaced by one
letter for its class.
"""

import collections
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from aunet_jax.config import BOS, EOS
from aunet_jax.splitting import unicode_table as table
from aunet_jax.splitting.splitter import Splitter

# L letter, D digit, N other number, n newline, s space, w other white space,
# p all else.
_LETTER_OF_CLASS = {
  table.LETTER: "L",
  table.IDEOGRAPH: "L",
  table.SYLLABIC: "L",
  table.DIGIT: "D",
  table.NUMBER: "N",
  table.NEWLINE: "n",
  table.SPACE: "s",
  table.WHITESPACE: "w",
  table.OTHER: "p",
  table.MARK: "p",
}


_WORD_STARTS = re.compile("[DN]{1,3}|p{1,3}n*|[nsw]*n")


_PUNCT_STARTS = re.compile("D{1,3}(?=(?:D{3})*(?!D))|p{1,3}n*|[nsw]*n")


_PRETOK_STARTS = re.compile(
  "s?L{1,16}|[DN]{1,3}|s?p{1,3}+n*|[nsw]*n|[nsw]+(?![^nsw])|[nsw]+"
)


def class_letters(text: str) -> str:
  """One letter for the class of each character of `text`."""
  classes, _ = table.load_classes()
  return "".join(_LETTER_OF_CLASS[int(classes[ord(c)])] for c in text)


def _cuts(letters: str, rule: str) -> set[int]:
  """Places in the text at which the official `rule` cuts."""
  if rule == "pretok":
    return {match.start() for match in _PRETOK_STARTS.finditer(letters)}
  if rule == "punct":
    return {match.start() for match in _PUNCT_STARTS.finditer(letters)}
  name, _, num_words = rule.partition("@")
  if name != "word":
    raise ValueError(
      f"rule {rule!r} has no published expression; those of word@k, pretok "
      "and punct are known."
    )
  ends = re.compile(f"(?:[^nsw]+?[nsw]){{{int(num_words or 1)}}}")
  return {match.start() for match in _WORD_STARTS.finditer(letters)} | {
    match.end() - 1 for match in ends.finditer(letters)
  }


def character_levels(letters: str, rules: Sequence[str]) -> np.ndarray:
  """Official level of each character, int8; `letters` as `class_letters`."""
  levels = np.zeros(len(letters), np.int8)
  for level, rule in enumerate(rules, 1):
    levels[sorted(_cuts(letters, rule))] = level
  return levels


def whole_text_levels(text: str, rules: Sequence[str]) -> np.ndarray:
  """Official level of each UTF-8 byte, knowing the whole text; int8."""
  return on_last_bytes(text, character_levels(class_letters(text), rules))


def prefix_levels(text: str, rules: Sequence[str]) -> np.ndarray:
  """Official level of each byte while the text ends there; int8.

  What the official code decodes with, and what a rule that does not look
  ahead can agree with. Time is quadratic in the text.
  """
  letters = class_letters(text)
  levels = [
    character_levels(letters[: end + 1], rules)[end]
    for end in range(len(letters))
  ]
  return on_last_bytes(text, np.array(levels, np.int8))


def on_last_bytes(text: str, levels: np.ndarray) -> np.ndarray:
  ends = np.cumsum([len(c.encode()) for c in text], dtype=np.int64)
  result = np.zeros(ends[-1] if len(ends) else 0, np.int8)
  result[ends - 1] = levels
  return result


# ----- comparison with recorded cases ---------------------------------------

NEWLINE_FOLLOWS = "white space before a newline: the official cut looks ahead"


WORD_FOLLOWS = "white space before a word: the official cut looks ahead"


DIGITS_FOLLOW = "digits of punct, from the right there, from the left here"


BROKEN = "bytes that are no characters: the official code drops some"


UNEXPLAINED = "unexplained"


@dataclasses.dataclass
class Agreement:
  """What `compare` found for one strategy."""

  cases: int = 0
  bytes: int = 0
  equal_cases: int = 0
  no_result: int = 0  # cases in which the official code raised an exception
  wrong_length: int = 0  # or returned levels for another number of bytes
  kinds: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )


def compare(cases: Iterable[dict]) -> dict[str, Agreement]:
  """Our levels against recorded ones, by strategy.

  Args: cases: objects with `strategy` (official names joined by +), `levels`
    (one digit a byte), and `text` or `tokens` (with BOS and EOS).
  """
  found: dict[str, Agreement] = collections.defaultdict(Agreement)
  splitters = {}
  for case in cases:
    result = found[case["strategy"]]
    result.cases += 1
    if "levels" not in case:
      result.no_result += 1
      continue
    if case.get("length_mismatch"):
      result.wrong_length += 1
      continue
    rules = [
      re.sub(r"^word(\d+)$", r"word@\1", name)
      for name in case["strategy"].split("+")
    ]
    splitter = splitters.setdefault(tuple(rules), Splitter(rules))
    official = np.array([int(digit) for digit in case["levels"]], np.int8)
    tokens = np.array(case.get("tokens", [*case.get("text", "").encode()]), int)
    result.bytes += len(tokens)
    differing = 0
    for start, end in _documents(tokens):
      kinds = _differences(
        bytes(tokens[start:end].tolist()), official[start:end], splitter
      )
      result.kinds.update(kinds)
      differing += len(kinds)
    result.equal_cases += not differing
  return dict(found)


def _documents(tokens: np.ndarray) -> list[tuple[int, int]]:
  """Spans of text between BOS and EOS."""
  ends = [*np.flatnonzero((tokens == BOS) | (tokens == EOS)), len(tokens)]
  starts = [0, *(end + 1 for end in ends[:-1])]
  return [(s, e) for s, e in zip(starts, ends, strict=True) if e > s]


def _differences(
  data: bytes, official: np.ndarray, splitter: Splitter
) -> list[str]:
  """The kind of each byte's difference."""
  differing = np.flatnonzero(splitter.levels(data) != official)
  try:
    text = data.decode()
  except UnicodeDecodeError:
    return [BROKEN] * len(differing)
  letters = class_letters(text)
  whole = character_levels(letters, splitter.rules)
  ours = splitter.levels(data)
  ends = np.cumsum([len(c.encode()) for c in text], dtype=np.int64) - 1
  kinds = []
  for position in differing:
    place = int(np.searchsorted(ends, position))
    prefix = character_levels(letters[: place + 1], splitter.rules)[place]
    after = letters[place + 1 :]
    # Known kinds: the expressions on the whole text give what is recorded,
    # and on the text up to here what we give, or digits are grouped otherwise.
    if whole[place] != official[position] or ends[place] != position:
      kinds.append(UNEXPLAINED)
    elif letters[place] == "D" and "punct" in splitter.rules:
      kinds.append(DIGITS_FOLLOW)
    elif prefix != ours[position] or letters[place] not in "nsw":
      kinds.append(UNEXPLAINED)
    elif "n" in after[: len(after) - len(after.lstrip("nsw"))]:
      kinds.append(NEWLINE_FOLLOWS)
    else:
      kinds.append(WORD_FOLLOWS)
  return kinds


def report(found: dict[str, Agreement]) -> str:
  """`compare`'s result as a Markdown table, then differing bytes by kind."""
  lines = [
    "| strategy | cases | no result | wrong length | bytes | equal cases | "
    "differing bytes |",
    "|---|---|---|---|---|---|---|",
  ]
  kinds = collections.Counter()
  for strategy, result in found.items():
    kinds.update(result.kinds)
    lines.append(
      f"| {strategy} | {result.cases} | {result.no_result} | "
      f"{result.wrong_length} | {result.bytes} | {result.equal_cases} | "
      f"{result.kinds.total()} |"
    )
  lines += ["", "| kind of difference | bytes |", "|---|---|"]
  lines += [f"| {kind} | {count} |" for kind, count in kinds.most_common()]
  return "\n".join(lines)


def main(paths: Sequence[str]) -> int:
  if not paths:
    print("usage: python -m aunet_jax.split_reference RECORDED.jsonl…")
    return 2
  for path in paths:
    with pathlib.Path(path).open(encoding="utf-8") as lines:
      found = compare(json.loads(line) for line in lines)
    print(f"{path}\n\n{report(found)}\n")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
