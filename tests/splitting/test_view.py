"""The stages of a text as drawn: every byte once, nothing hidden."""

import pytest

from aunet_jax.splitting import view
from aunet_jax.splitting.splitter import Splitter

TEXT = "The cat's 12345 dogs, e.g. ran.\n\n猫 is <b>&amp; \x1b[31m\u202e\n"
ODD = TEXT.encode() + b"\x80\xff \xe4\xb8 a\t\r\n"
RULES = ["word@1", "word@2"]


@pytest.mark.parametrize("rules", [[], RULES, ["bytes"], ["stride@3"]])
def test_every_byte_is_drawn_once_with_its_level(rules):
  levels = Splitter(rules).levels(ODD)
  drawn = list(view.characters(ODD, levels))
  assert [c.start for c in drawn[1:]] == [c.end for c in drawn[:-1]]
  assert drawn[0].start == 0 and drawn[-1].end == len(ODD)
  for character in drawn:
    assert character.level == levels[character.start : character.end].max()
  plain = view.draw(ODD, levels * 0, colour=True)
  assert "\x1b" not in plain and "‹FF›" in plain and "猫" in plain
  assert view.draw(b"", levels[:0], colour=False) == ""


def test_a_level_is_a_colour_or_a_number_of_its_stage():
  levels = Splitter(RULES).levels(b"one two\n")
  assert view.draw(b"one two\n", levels, colour=False) == "one ²two⏎³\n"
  drawn = view.draw(b"one two\n", levels, colour=True)
  assert drawn.count("\x1b[30;48;5;") == 2 and drawn.endswith("⏎\x1b[0m\n")


def test_levels_past_the_last_colour_share_it():
  rules = ["bytes"] * 9
  drawn = view.draw(b"a", Splitter(rules).levels(b"a"), colour=True)
  assert f"48;5;{view._COLOURS[-1][0]}m" in drawn
  assert "¹⁰" in view.draw(b"a", Splitter(rules).levels(b"a"), colour=False)


def test_a_piece_of_text_is_shown_on_one_line():
  assert view.on_one_line(b"a b\n\tc\xff") == "a·b⏎→···c‹FF›"


def test_markup_in_rules_and_titles_is_text():
  levels = Splitter(["bytes"]).levels(b"<u>")
  page = view.page("<tt>", b"<u>", levels, ["<rule>"], [["<h9>"], ["<c>"]])
  for name in ("tt", "u", "rule", "h9", "c"):
    assert f"<{name}>" not in page
  assert "&lt;rule&gt;" in page and "&lt;tt&gt;" in page
