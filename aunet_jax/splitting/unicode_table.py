"""The frozen table of character classes every splitting rule reads.

A checkpoint must split the same text the same way for ever, so the class of a
character comes from `unicode_classes.npz` in this package and never from the
interpreter's own Unicode data. Making that file again, which is due only when
a newer Unicode version is wanted and changes the hash of every splitter:

    pip install unicodedata2 && python -m aunet_jax.splitting.unicode_table

writes the version it used into the file and prints what changed.
"""

import functools
import pathlib

import numpy as np

from aunet_jax import arrays

# One class per character; rules are written over these. Order is part of the
# frozen file: append, never reorder.
LETTER = 0  # general categories L*, in a script written with spaces


DIGIT = 1  # Nd


NUMBER = 2  # other N*: fractions, superscripts, Roman numerals


NEWLINE = 3  # carriage return and line feed only


SPACE = 4  # U+0020 only


WHITESPACE = 5  # White_Space other than the two above


OTHER = 6  # punctuation, symbols, controls, unassigned


MARK = 7  # M*: accents, vowel signs; drawn on the letter before them


IDEOGRAPH = 8  # letters: Han, kana and the like; a word is one or two


SYLLABIC = 9  # letters of scripts that join words: Thai, Lao, Khmer, Burmese


MALFORMED = 10  # bytes that are not UTF-8; never in the table


NUM_CLASSES = 11


CLASS_NAMES = (
  "letter",
  "digit",
  "number",
  "newline",
  "space",
  "whitespace",
  "other",
  "mark",
  "ideograph",
  "syllabic",
  "malformed",
)


LETTERS = frozenset((LETTER, IDEOGRAPH, SYLLABIC))  # Unicode's L*


NUMBERS = frozenset((DIGIT, NUMBER))  # N*


SPACES = frozenset((NEWLINE, SPACE, WHITESPACE))  # White_Space


NUM_CODE_POINTS = 0x110000


FILE = pathlib.Path(__file__).with_name("unicode_classes.npz")


# Unicode's White_Space property: str.isspace adds U+001C to U+001F to it.
_WHITE_SPACE = (
  *range(0x09, 0x0E),
  *(0x20, 0x85, 0xA0, 0x1680),
  *range(0x2000, 0x200B),
  *(0x2028, 0x2029, 0x202F, 0x205F, 0x3000),
)


# Starts of the character names of scripts that put no spaces between words.
_IDEOGRAPH_NAMES = (
  "CJK ",
  "HIRAGANA ",
  "KATAKANA",
  "HALFWIDTH KATAKANA",
  "HENTAIGANA ",
  "BOPOMOFO ",
  "IDEOGRAPHIC ",
  "YI SYLLABLE",
  "TANGUT ",
  "NUSHU ",
  "KHITAN ",
)


_SYLLABIC_NAMES = (
  "THAI ",
  "LAO ",
  "KHMER ",
  "MYANMAR ",
  "TIBETAN ",
  "TAI LE ",
  "NEW TAI LUE ",
  "TAI THAM ",
  "TAI VIET ",
  "JAVANESE ",
  "BALINESE ",
)


@functools.cache
def load_classes() -> tuple[np.ndarray, str]:
  """The class of every code point, uint8 (0x110000,), and Unicode's version.

  Raises: ValueError where the package's file is damaged.
  """
  try:
    found = arrays.read(FILE, ("starts", "classes", "unicode_version"))
    starts, values = found["starts"], found["classes"]
    if starts.dtype != np.int32 or values.dtype != np.uint8:
      raise ValueError("its arrays are of another type")
    if starts.ndim != 1 or starts.shape != values.shape:
      raise ValueError("its arrays are of another shape")
    lengths = np.diff(starts, append=NUM_CODE_POINTS)
    if starts[0] or lengths.min() < 1 or values.max() >= MALFORMED:
      raise ValueError("its ranges or classes are out of bounds")
  except ValueError as error:
    raise ValueError(
      f"{FILE} is damaged ({error}); install aunet_jax again."
    ) from None
  classes = np.repeat(values, lengths)
  classes.flags.writeable = False
  return classes, str(found["unicode_version"])


def _classify(database, code_point: int) -> int:
  character = chr(code_point)
  if character in "\r\n":
    return NEWLINE
  if character == " ":
    return SPACE
  if code_point in _WHITE_SPACE:
    return WHITESPACE
  category = database.category(character)
  if category[0] == "N":
    return DIGIT if category == "Nd" else NUMBER
  if category[0] == "M":
    return MARK
  if category[0] == "L":
    name = database.name(character, "")
    if name.startswith(_IDEOGRAPH_NAMES):
      return IDEOGRAPH
    return SYLLABIC if name.startswith(_SYLLABIC_NAMES) else LETTER
  return OTHER


def _make(path: pathlib.Path) -> None:
  """Writes the table from the newest Unicode database that is installed."""
  try:
    import unicodedata2 as database
  except ImportError:
    import unicodedata as database
  classes = np.array(
    [_classify(database, code) for code in range(NUM_CODE_POINTS)], np.uint8
  )
  if path.exists():
    before, version = load_classes()
    print(f"{path.name} held Unicode {version}")
    print(f"{(before != classes).sum()} code points change class")
  starts = np.flatnonzero(np.diff(classes.astype(np.int16), prepend=-1))
  np.savez_compressed(
    path,
    starts=starts.astype(np.int32),
    classes=classes[starts],
    unicode_version=np.array(database.unidata_version),
  )
  print(f"wrote Unicode {database.unidata_version}, {len(starts)} ranges")
  for number, name in enumerate(CLASS_NAMES):
    print(f"  {name:10s} {(classes == number).sum():8d} code points")


if __name__ == "__main__":
  _make(FILE)
