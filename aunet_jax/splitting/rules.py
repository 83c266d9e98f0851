"""Splitting rules: small machines over the characters of a text.

A rule says at which characters a text is cut: the byte at which a cut falls,
the last one of its character, becomes a position of the stage the rule feeds.
A rule is a function

    step(state, character) -> (next state, cut here?)

of any hashable state and one of the character classes of `unicode_table`, or
a character itself that the rule asks to be told apart. It sees one character
at a time and nothing of what follows, so no later text can move an earlier
cut: the requirement of the AU-Net paper, Section 2.1 ("stable
to rightward insertion"), holds for every rule that can be written here. The
number of states a rule can reach must be finite; `automaton` finds them and
makes tables of them.

To add a rule, write its step function here and name it in `RULES`, or keep it
in a module of your own and call it "my_module:my_rule". docs/splitting.md
shows how.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Hashable

from aunet_jax.config import runs_code
from aunet_jax.splitting.unicode_table import (
  DIGIT,
  IDEOGRAPH,
  LETTER,
  LETTERS,
  MARK,
  NEWLINE,
  NUMBERS,
  SPACE,
  SPACES,
  SYLLABIC,
  WHITESPACE,
)

Step = Callable[[Hashable, int | str], tuple[Hashable, bool]]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A machine that reads a text and says where to cut it."""

  start: Hashable  # state at the start of every document
  step: Step  # (state, character class) -> (next state, cut?)
  apart: str = ""  # characters that `step` gets as they are, not their class
  every_byte: bool = False  # step at each byte, whatever the character


def bytes_() -> Rule:
  """Cuts at every byte."""
  return stride(1)


def stride(num_bytes: int) -> Rule:
  """Cuts at every `num_bytes`-th byte: fixed windows, as in MegaByte."""

  def step(count, character):
    count = (count + 1) % num_bytes
    return count, count == 0

  return Rule(0, step, every_byte=True)


def word(num_words: int = 1) -> Rule:
  """Cuts after every `num_words` words, and at numbers and punctuation.

  The rule of the released AU-Net checkpoints (facebookresearch/lingua,
  `word1`, `word2`, …), which cuts

  - at the white space after each `num_words`-th word, counted from the last
    such cut and afresh after two white spaces in a row;
  - at the first of up to three numbers, at the first of up to three other
    characters that are no letters (newlines may follow those), and at a
    newline that opens white space.

  The official code also cuts, later on, at white space once a newline turns
  out to follow it. No rule that sees only the past can do that, so this one
  answers what the official code answers while the text ends there.
  """

  def step(state, character):
    words, in_word, marks = state
    marks, starts = _digits_and_punctuation(marks, character, NUMBERS)
    if character not in SPACES:
      return (words, True, marks), starts
    words = words + 1 if in_word else 0
    ends = words == num_words
    return (0 if ends else words, False, marks), starts or ends

  return Rule((0, False, _NOTHING), step)


def punct() -> Rule:
  """Cuts at numbers, punctuation and newlines, never at a word's end.

  The official `punct`, with two differences. It groups the digits of a number
  in thousands from the right, which needs the digits to come; this groups
  them from the left. White space before a newline is as in `word`.
  """

  def step(state, character):
    return _digits_and_punctuation(state, character, {DIGIT})

  return Rule(_NOTHING, step)


_NOTHING = ("nothing", 0)


def _digits_and_punctuation(state, character, digits):
  """Cuts at the first of three digits or of three others, and at newlines.

  Args: state: the run the last character is in, and how many of it there are.
    digits: the classes that are digits; numbers that are not act as letters.
  Returns: the next state, and whether the character starts a group.
  """
  run, length = state
  if character in SPACES:
    if character == NEWLINE and run == "punctuation":
      return ("punctuation", 3), False  # its newlines belong to it
    return ("white", 0), character == NEWLINE and run != "white"
  if character in digits:
    kind = "digit"
  elif character in LETTERS or character in NUMBERS:
    return _NOTHING, False
  else:
    kind = "punctuation"
  if run == kind and length < 3:
    return (kind, length + 1), False
  return (kind, 1), True


def anyscript(num_words: int = 1) -> Rule:
  """`word`, with words of bounded length in every script.

  For text in scripts that put no space between words (Chinese, Japanese,
  Thai, Lao, Khmer, Burmese, …), where `word` finds whole sentences, and in
  scripts with vowel signs (Hindi, Tamil, …), where it takes each sign for
  punctuation and cuts in the middle of words. Here

  - a word is at most 2 ideographs or kana, 4 characters of a joined script,
    16 of any other; the first letter past that starts the next word and ends
    the one before, and so does a letter of another of these three kinds;
  - marks belong to the letter before them, except that no word has more than
    16 characters with its marks.

  There are no dictionaries in it: cuts fall inside some words. All else is as
  in `word`.
  """
  longest = {"ideograph": 2, "syllabic": 4, "letter": 16}
  kinds = {LETTER: "letter", IDEOGRAPH: "ideograph", SYLLABIC: "syllabic"}

  def step(state, character):
    words, in_word, kind, length, marks = state
    starts = False
    if character in kinds or (character == MARK and kind):
      current = kinds.get(character, kind)
      limit = 16 if character == MARK else longest[current]
      ends = kind is not None and (current != kind or length >= limit)
      kind, length, marks = current, 1 if ends else length + 1, _NOTHING
    else:
      ends = character in SPACES and in_word
      kind, length = None, 0
      marks, starts = _digits_and_punctuation(marks, character, NUMBERS)
    if ends:
      words += 1
    elif character in SPACES:
      words = 0
    cut = words == num_words
    words = 0 if cut else words
    in_word = character not in SPACES
    return (words, in_word, kind, length, marks), cut or starts

  return Rule((0, False, None, 0, _NOTHING), step)


def pretok() -> Rule:
  """Cuts at the start of every token of the paper's Appendix B.

  Tokens are up to 16 letters or up to 3 marks that are neither letters nor
  numbers, each with the space before it, if any (after marks, the newlines
  that follow too); up to 3 numbers; and white space, up to its last newline
  or to its end. The cut is at the first character of a token.

  Which token a white space belongs to can depend on what follows. As in
  `word`, a cut is made where the official code (`pretok` there) makes it
  while the text ends there, so two spaces before a word are one token with it.
  """
  longest = {"letter": 16, "punctuation": 3, "number": 3}

  def step(state, character):
    run, length = state
    if character in SPACES:
      if character == NEWLINE and run in (
        "punctuation",
        "punctuation, newline",
      ):
        return ("punctuation, newline", 0), False
      in_white = run in ("space", "white", "newline")
      # White space after a newline is a token of its own until another
      # newline comes and joins them.
      cut = not in_white or (run == "newline" and character != NEWLINE)
      names = {SPACE: "space", NEWLINE: "newline", WHITESPACE: "white"}
      return (names[character], 0), cut
    if character in LETTERS:
      kind = "letter"
    elif character in NUMBERS:
      kind = "number"
    else:
      kind = "punctuation"
    if run == "space" and kind != "number":
      return (kind, 1), False
    if run == kind and length < longest[kind]:
      return (kind, length + 1), False
    return (kind, 1), True

  return Rule(("nothing", 0), step)


# What may stand before the @ of a rule in a config; after it, one integer.
RULES = {
  "word": word,
  "anyscript": anyscript,
  "pretok": pretok,
  "punct": punct,
  "stride": stride,
  "bytes": bytes_,
}


def source_of(name: str) -> str:
  """The file that "my_module:my_rule" would run. Nothing is run to find it."""
  package = name.partition(":")[0].split(".")[0]  # parents would be imported
  try:
    spec = importlib.util.find_spec(package)
  except (ImportError, ValueError):
    spec = None
  if spec is None:
    return f"a module {package!r} that is not found here"
  return spec.origin or ", ".join(spec.submodule_search_locations or ())


def _imported(name: str, module: str, attribute: str) -> Callable:
  """The user's function. Raises: ValueError where there is none."""
  try:
    function = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, TypeError, ValueError) as error:
    raise ValueError(
      f"splitting rule {name!r}: {error}. It names a function in a module "
      "that Python can import from here."
    ) from None
  except SyntaxError as error:
    raise ValueError(
      f"splitting rule {name!r}: {error.filename} does not parse: {error}"
    ) from None
  if not callable(function):
    raise ValueError(f"splitting rule {name!r} names no function.")
  return function


def make_rule(name: str) -> Rule:
  """The rule a config calls `name`: "word@2", or "my_module:my_rule@2".

  A module is imported and its function runs: who takes a name from a file of
  somebody else asks `runs_code` first.

  Raises: ValueError if there is no such rule or its number is not one.
  """
  base, at, argument = name.partition("@")
  if runs_code(name):
    module, _, attribute = base.partition(":")
    factory = _imported(name, module, attribute)
  elif base in RULES:
    factory = RULES[base]
  else:
    if base == "level_head":
      raise ValueError(
        'splitting rule "level_head": a model\'s level head splits only what '
        "the model writes, with --levels=head of aunet_jax.generate. It gives "
        "no levels for a text to train on: those must exist before the model."
      )
    close = difflib.get_close_matches(base, RULES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
      f"splitting rule {name!r} is none of {', '.join(RULES)}.{hint}"
    )
  if at and not (argument.isascii() and argument.isdigit() and int(argument)):
    raise ValueError(
      f"splitting rule {name!r}: what follows the @ must be a whole number "
      f"from 1, such as {base}@2."
    )
  arguments = (int(argument),) if at else ()
  try:
    inspect.signature(factory).bind(*arguments)
  except TypeError as error:
    raise ValueError(
      f"splitting rule {name!r}: {error}; {base} takes "
      f"{'no' if at else 'a'} number after an @."
    ) from None
  rule = factory(*arguments)
  if not isinstance(rule, Rule):
    raise ValueError(
      f"splitting rule {name!r} gave a {type(rule).__name__}; its function "
      "must return a Rule (see docs/splitting.md)."
    )
  return rule
