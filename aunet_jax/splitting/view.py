"""Draws the stages of a text: for a terminal, and as a page for a browser.

A byte that is also a position of deeper stages is drawn in the colour of the
deepest of them. Characters that would not show, or would change what the reader
sees of the rest (controls, bidirectional marks), are drawn as their names.
"""

import html
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# One for each stage from the second on, dark enough for black letters on top:
# as terminal colour (of 256) and as web colour. The last one serves the rest.
_COLOURS = (
  (117, "#8fd0ff"),
  (215, "#ffb968"),
  (204, "#ff7d95"),
  (183, "#d0a7ff"),
  (120, "#86ea86"),
)


_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


class Character(NamedTuple):
  """A character as drawn; of what is not UTF-8, one byte."""

  start: int  # its first byte
  end: int  # the byte after its last
  shown: str
  level: int  # of its last byte, or the highest in it for rules that cut in it


def characters(data: bytes, levels: np.ndarray) -> Iterator[Character]:
  """The characters of `data`, whose bytes have `levels`."""
  start = 0
  for character in data.decode("utf-8", "surrogateescape"):
    size = len(character.encode("utf-8", "surrogateescape"))
    level = int(levels[start : start + size].max())
    yield Character(start, start + size, _shown(character), level)
    start += size


def _shown(character: str) -> str:
  code = ord(character)
  if character == "\n":
    return "⏎\n"
  if character == "\t":
    return "→   "
  if 0xDC80 <= code < 0xDD00:  # a byte that is no UTF-8
    return f"‹{code - 0xDC00:02X}›"
  if code < 0x20:
    return chr(0x2400 + code)
  return character if character.isprintable() else f"‹U+{code:04X}›"


def _colour(level: int) -> tuple[int, str]:
  return _COLOURS[min(level, len(_COLOURS)) - 1]


def _terminal(text: str, level: int, colour: bool) -> str:
  if not level:
    return text
  body, newline = (text[:-1], "\n") if text.endswith("\n") else (text, "")
  if not colour:
    number = "".join(_SUPERSCRIPTS[int(digit)] for digit in str(level + 1))
    return body + number + newline
  return f"\x1b[30;48;5;{_colour(level)[0]}m{body}\x1b[0m{newline}"


def legend(rules: Sequence[str], colour: bool) -> str:
  """One line that says which mark means which stage."""
  if not rules:
    return "one stage: no byte is a position of a deeper one"
  marks = [
    _terminal(f" stage {level + 1}: {rule} ", level, colour)
    for level, rule in enumerate(rules, 1)
  ]
  return "kept as positions of " + " ".join(marks)


def draw(data: bytes, levels: np.ndarray, colour: bool) -> str:
  """The text for a terminal.

  Args: levels: int8, one a byte. colour: with escape sequences; without, the
    number of the deepest stage follows each byte that has one.
  """
  return "".join(
    _terminal(character.shown, character.level, colour)
    for character in characters(data, levels)
  )


def on_one_line(data: bytes) -> str:
  """A piece of text as drawn, on one line, with its spaces visible."""
  drawn = characters(data, np.zeros(len(data), np.int8))
  shown = "".join(character.shown for character in drawn)
  return shown.replace("\n", "").replace(" ", "·")


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
pre { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border-top: 1px solid #8886; padding-top: 1rem; }
b { font-weight: inherit; color: #000; border-radius: 3px; padding: 1px; }
label { margin-right: 1.2rem; white-space: nowrap; }
label i { border-radius: 3px; display: inline-block; height: .9em; width: .9em;
  vertical-align: -.1em; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .15rem .8rem; text-align: right; }
th { border-bottom: 1px solid #8886; }
"""


def page(
  title: str,
  data: bytes,
  levels: np.ndarray,
  rules: Sequence[str],
  table: Sequence[Sequence[str]],
) -> str:
  """A page that needs nothing else: the text, and a stage to look at.

  Choosing a stage shades every other segment of it. Resting on a segment
  names its bytes. Args: table: rows of a table to show, headings first.
  """
  style, choices = [_STYLE], []
  for level, rule in enumerate(rules, 1):
    web = _colour(level)[1]
    style.append(
      f"b.l{level} {{ background: {web}; }}\n"
      f"#s{level}:checked ~ pre .o{level} {{ background: {web}55; }}\n"
    )
    checked = " checked" if level == 1 else ""
    choices.append(
      f'<input type="radio" name="stage" id="s{level}"{checked}>'
      f'<label for="s{level}"> <i style="background: {web}"></i> '
      f"stage {level + 1}: {html.escape(rule)}</label>"
    )
  heads, *rows = [[html.escape(cell) for cell in row] for row in table]
  cells = "".join(f"<th>{cell}</th>" for cell in heads)
  body = "".join(
    "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n"
    for row in rows
  )
  return (
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width">\n'
    f"<title>{html.escape(title)}</title>\n<style>{''.join(style)}</style>\n"
    f"<h1>{html.escape(title)}</h1>\n"
    "<p>A coloured byte is also a position of deeper stages: what they know "
    "of the text up to it helps to predict the bytes after it. Its colour is "
    "that of the deepest of them.</p>\n"
    f"<table><tr>{cells}</tr>\n{body}</table>\n"
    f"{''.join(choices)}\n<pre>{_page_text(data, levels, len(rules))}</pre>\n"
    "</html>\n"
  )


def _page_text(data: bytes, levels: np.ndarray, num_levels: int) -> str:
  """One span for each segment of stage 2, marked where others are odd."""
  parts, segment = [], []
  odd = [False] * (num_levels + 1)  # of the segment under way, per level
  start = 0

  def close(end: int) -> None:
    names = " ".join(f"o{k}" for k in range(1, num_levels + 1) if odd[k])
    parts.append(
      f'<span class="{names}" title="bytes {start} to {end - 1}, '
      f'{end - start} in all">{"".join(segment)}</span>'
    )
    segment.clear()

  for character in characters(data, levels):
    shown = html.escape(character.shown)
    if not character.level:
      segment.append(shown)
      continue
    newline = "\n" if shown.endswith("\n") else ""
    shown = shown.removesuffix(newline)
    segment.append(f'<b class="l{character.level}">{shown}</b>{newline}')
    close(character.end)
    start = character.end
    for level in range(1, character.level + 1):
      odd[level] = not odd[level]
  if segment:
    close(len(data))
  return "".join(parts)
