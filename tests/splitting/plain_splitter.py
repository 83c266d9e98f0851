"""A splitter in plain Python, without tables: the oracle of the tests.

Characters are what Python's own decoder makes of the bytes, and a rule's step
function is called for each.
"""

import numpy as np

from aunet_jax.splitting import rules, unicode_table, vocabulary


def walk(names, data: bytes) -> np.ndarray:
  """Levels in plain Python: no tables, characters as Python decodes them.

  A byte's level is that of the character it completes; a piece that only the
  next byte shows to be broken moves the rules on and has level 0.
  """
  plain = {"tokens": segments, "entropy": surprises}
  machines = [
    plain.get(name.partition("@")[0], rules.make_rule)(name) for name in names
  ]
  states = [rule.start for rule in machines]
  levels = np.zeros(len(data), np.int8)
  characters, surprised = characters_of(data)
  for position in range(len(data)):
    complete = position in characters
    for number, rule in enumerate(machines):
      seen = [characters[position]] if complete else []
      if rule.every_byte:
        seen = [data[position : position + 1]]
      elif position in surprised:
        seen = [None, *seen]
      cut = False
      for character in seen:
        states[number], cut = rule.step(states[number], told(rule, character))
      if cut and (complete or rule.every_byte):
        levels[position] = number + 1
  return levels


def segments(name: str) -> rules.Rule:
  """`tokens@FILE` without a tree: grows a segment while a token begins so."""
  tokens = vocabulary.read_tokens(name.partition("@")[2])

  def step(segment, byte):
    if any(token.startswith(segment + byte) for token in tokens) and segment:
      return segment + byte, False
    known = any(token.startswith(byte) for token in tokens)
    return byte if known else b"", True

  return rules.Rule(b"", step, every_byte=True)


def surprises(name: str) -> rules.Rule:
  """`entropy@FILE`, straight from the file."""
  with np.load(name.partition("@")[2]) as file:
    index, blocks = file["index"], file["blocks"]
    mode, threshold = str(file["mode"]), int(file["threshold"])

  def step(state, byte):
    last, before = state
    last = (last + byte)[-3:]
    first, second, third = last
    entropy = int(blocks[index[256 * first + second]][third])
    rise = entropy - before if mode == "rise" else entropy
    return (last, entropy), rise > threshold

  return rules.Rule((b"\0\0\0", 255), step, every_byte=True)


def told(rule: rules.Rule, character: str | bytes | None) -> int | str | bytes:
  """What a rule's step is given; None = bytes that are no character."""
  if isinstance(character, bytes):
    return character
  if character is None:
    return unicode_table.MALFORMED
  if character in rule.apart:
    return character
  return int(unicode_table.load_classes()[0][ord(character)])


def characters_of(data: bytes) -> tuple[dict[int, str | None], set[int]]:
  """Each character by its last byte, and the bytes that end a broken piece.

  Python's decoder says what is broken: it replaces each longest broken piece.
  """
  characters, surprised = {}, set()
  start = 0
  while start < len(data) and data[start] & 0xC0 == 0x80:
    start += 1  # the end of a character that began before the text
  while start < len(data):
    for size in range(1, 5):
      piece = data[start : start + size]
      try:
        characters[start + size - 1] = piece.decode()
        start += size
        break
      except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
          if start + size >= len(data):
            return characters, surprised
          continue
        length = error.end - error.start
        if length == size:
          characters[start + size - 1] = None
        else:
          surprised.add(start + length)
        start += length
        break
  return characters, surprised
