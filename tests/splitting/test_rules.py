"""What each splitting rule means, written down a second time.

As expressions over the classes of a finished text's characters, as levels
recorded from the official code, and as the drawings of docs/splitting.md.
"""

import json
import pathlib
import re
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from aunet_jax import splitting
from aunet_jax.splitting import rules, splitter, unicode_table
from aunet_jax.splitting.splitter import Splitter
from benchmarks import split_reference

HERE = pathlib.Path(__file__).parents[1]
SHARED = HERE.parents[1] / "shared"

# Time is not what these tests are about.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# ----- what the rules mean --------------------------------------------------


@pytest.mark.parametrize(
  "names",
  [
    ["word@1"],
    ["word@2"],
    ["word@3"],
    ["word@1", "word@2", "word@4"],
    ["pretok"],
    ["pretok", "word@1"],
  ],
  ids=",".join,
)
@hypothesis.given(text=st.text(" \n\r\ta1²., é中\u0301\u2028", max_size=16))
def test_cuts_are_the_official_ones_while_the_text_ends_there(names, text):
  np.testing.assert_array_equal(
    Splitter(names).levels(text.encode()),
    split_reference.prefix_levels(text, names),
  )


@hypothesis.given(text=st.text(" \na1²., \u0301", max_size=24))
def test_punct_groups_digits_from_the_left(text):
  letters = split_reference.class_letters(text)
  starts = {m.start() for m in re.finditer("D{1,3}|p{1,3}n*", letters)}
  after = {m.end() for m in re.finditer("p{1,3}n*", letters)}
  for match in re.finditer("[nsw]+", letters):
    # Newlines right after punctuation are part of it; the white space after
    # those is another one. A cut falls where a white space opens in a newline.
    if letters[match.start()] == "n" and not (
      letters[: match.start()].endswith("p") or match.start() in after
    ):
      starts.add(match.start())
  levels = Splitter(["punct"]).levels(text.encode())
  np.testing.assert_array_equal(
    levels,
    split_reference.on_last_bytes(
      text, np.array([i in starts for i in range(len(text))], np.int8)
    ),
  )


@pytest.mark.parametrize("num_words", [1, 2, 4])
@hypothesis.given(
  text=st.text(" \na中ก\u0301.1", max_size=40)
  | st.text("aก\u0301", min_size=10, max_size=80)
)
@hypothesis.example(text="a" + "\u0301" * 40)
def test_anyscript_cuts_long_words_and_keeps_marks(num_words, text):
  letter_of = {
    unicode_table.LETTER: "l",
    unicode_table.IDEOGRAPH: "i",
    unicode_table.SYLLABIC: "y",
    unicode_table.MARK: "m",
    unicode_table.DIGIT: "D",
    unicode_table.NEWLINE: "n",
    unicode_table.SPACE: "s",
    unicode_table.OTHER: "p",
  }
  classes, _ = unicode_table.load_classes()
  letters = "".join(letter_of[int(classes[ord(c)])] for c in text)
  ends = {m.end() - 1 for m in re.finditer("(?<=[^ns])[ns]", letters)}
  resets = {m.end() - 1 for m in re.finditer("(?<![^ns])[ns]", letters)}
  words = re.compile("l[lm]{0,15}|i[im]?m{0,14}|y[ym]{0,3}m{0,12}")
  cuts, masked = set(), list(letters)
  for run in re.finditer("[liy][liym]*", letters):
    masked[run.start() : run.end()] = "L" * len(run[0])
    place, kind = run.start(), None
    while place < run.end():
      if letters[place] == "m":  # too many marks for one word: the next
        rest = letters[place : run.end()]
        pattern = {"l": "[lm]{1,16}", "i": "[im]{1,2}m{0,14}"}.get(
          kind, "[ym]{1,4}m{0,12}"
        )
        end = place + re.match(pattern, rest).end()
      else:
        kind = letters[place]
        end = words.match(letters, place, run.end()).end()
      if place > run.start():
        ends.add(place)
      place = end
  # Marks after anything but letters are punctuation.
  official = "".join("p" if letter == "m" else letter for letter in masked)
  for match in re.finditer("D{1,3}|p{1,3}n*", official):
    cuts.add(match.start())
  for match in re.finditer("[ns]+", official):
    before = official[: match.start()]
    if official[match.start()] == "n" and not before.endswith("p"):
      cuts.add(match.start())
  count = 0
  for place in range(len(text)):
    if place in resets:
      count = 0
    if place in ends:
      count += 1
      if count == num_words:
        cuts.add(place)
        count = 0
  np.testing.assert_array_equal(
    Splitter([f"anyscript@{num_words}"]).levels(text.encode()),
    split_reference.on_last_bytes(
      text, np.array([i in cuts for i in range(len(text))], np.int8)
    ),
  )


def test_strides_count_bytes_and_bytes_cuts_everywhere():
  data = "aé中👍 text".encode()
  positions = np.arange(1, len(data) + 1)
  levels = Splitter(["bytes", "stride@4"]).levels(data)
  np.testing.assert_array_equal(levels, np.where(positions % 4, 1, 2))


def test_the_papers_example():
  data = b"The cat's 12345 dogs, e.g. ran.\n\nNew para here now. Ok\n"
  drawn = "...1...2.22..2.1....22.2.21...22....1....2....1...22..2"
  levels = Splitter(["word@1", "word@2"]).levels(data)
  assert "".join(str(level) for level in levels).replace("0", ".") == drawn


def test_thai_khmer_and_chinese_have_short_words():
  texts = {
    "吾輩は猫である名前はまだ無いどこで生れたか": 9,
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน": 21,
    "មនុស្សទាំងអស់កើតមកមានសេរីភាព": 21,
  }
  for text, longest in texts.items():
    data = text.encode()
    cuts = np.flatnonzero(Splitter(["anyscript@1"]).levels(data))
    gaps = np.diff([-1, *cuts, len(data)])
    assert gaps.max() <= longest, text
    assert len(cuts) >= len(data) // longest - 1


def test_hindi_words_are_not_cut_at_vowel_signs():
  data = "हिन्दी भाषा".encode()
  levels = Splitter(["anyscript@1"]).levels(data)
  assert np.flatnonzero(levels).tolist() == [data.index(b" ")]


# ----- the official code ----------------------------------------------------


def cases(path: pathlib.Path) -> list[dict]:
  if not path.exists():
    pytest.skip(f"no {path.name}: the shared data is not on this machine")
  with path.open(encoding="utf-8") as lines:
    return [json.loads(line) for line in lines]


RECORDED = [
  HERE / "golden" / "split_text.jsonl",
  HERE / "golden" / "split_bytes.jsonl",
  SHARED / "golden" / "split_text.jsonl",
  SHARED / "golden" / "split_bytes.jsonl",
]


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: f"{p.parts[-3:]}")
def test_recorded_levels_differ_only_where_the_official_code_looks_ahead(path):
  found = split_reference.compare(cases(path))
  assert sum(result.bytes for result in found.values()) > 500
  for result in found.values():
    assert split_reference.UNEXPLAINED not in result.kinds
    compared = result.cases - result.no_result - result.wrong_length
    assert result.equal_cases >= 0.7 * compared
  assert "| word1 |" in split_reference.report(found)


@pytest.mark.parametrize(
  "path", [p for p in RECORDED if "text" in p.name], ids=lambda p: p.parts[-3]
)
def test_the_published_expressions_give_the_recorded_levels(path):
  """So the reference that our rules are compared with is the right one."""
  for case in cases(path):
    if "levels" in case:
      names = [re.sub(r"(?<=word)(\d)", r"@\1", name)
               for name in case["strategy"].split("+")]  # fmt: skip
      levels = split_reference.whole_text_levels(case["text"], names)
      assert "".join(map(str, levels)) == case["levels"], case["text"]


def test_a_difference_that_is_not_known_is_called_unexplained():
  case = {"strategy": "word1", "text": "a b c", "levels": "00010"}
  found = split_reference.compare([case])["word1"]
  assert found.kinds == {split_reference.UNEXPLAINED: 1}


# ----- rules of one's own ---------------------------------------------------


def test_the_source_of_a_rule_is_found_without_running_it(
  tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "mine.py").write_text("raise SystemExit")
  (tmp_path / "package" / "sub").mkdir(parents=True)
  assert rules.source_of("mine:rule@2") == str(tmp_path / "mine.py")
  assert rules.source_of("mine.sub:rule") == str(tmp_path / "mine.py")
  assert rules.source_of("package.sub:rule") == str(tmp_path / "package")
  for name in ("not_here:rule", ":rule", "__main__:rule", "..x:rule"):
    assert "not found here" in rules.source_of(name) or name[0] == "_"


@pytest.mark.parametrize(
  "content, name, message",
  [
    ("x = (", "broken:rule", "broken.py does not parse"),
    ("rule = 5", "broken:rule", "names no function"),
    ("", "broken:rule", "no attribute 'rule'"),
    ("", ":rule", "Empty module name"),
    ("", ".x:rule", "relative import"),
  ],
)
def test_a_rule_that_cannot_be_imported_says_why(
  tmp_path, monkeypatch, content, name, message
):
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "broken.py").write_text(content)
  monkeypatch.delitem(sys.modules, "broken", raising=False)
  with pytest.raises(ValueError, match=message):
    rules.make_rule(name)
  sys.modules.pop("broken", None)


# ----- docs/splitting.md ----------------------------------------------------


def test_the_documentation_draws_what_the_rules_do(tmp_path, monkeypatch):
  """The example rule of the page works, and so do the levels drawn there."""
  page = (HERE.parent / "docs" / "splitting.md").read_text(encoding="utf-8")
  blocks = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
  (example,) = [b for kind, b in blocks if "def sentence" in b]
  (tmp_path / "my_rules.py").write_text(example, encoding="utf-8")
  monkeypatch.syspath_prepend(str(tmp_path))
  drawn = 0
  for _, block in blocks:
    text = None
    for line in block.splitlines():
      name, _, rest = line.partition(" ")
      if name == "text":
        text = rest.strip().replace("⏎", "\n")
      elif text is not None:
        levels = Splitter(name.split(",")).levels(text.encode())
        shown = "".join(str(level) for level in levels).replace("0", "·")
        assert rest.strip() == shown, name
        drawn += 1
  assert drawn >= 8


def test_the_documentation_shows_how_the_official_rules_look_ahead():
  page = (HERE.parent / "docs" / "splitting.md").read_text(encoding="utf-8")
  (block,) = re.findall(r"```text\nofficial .*\n([^`]*)```", page)
  lines = block.splitlines()
  assert len(lines) == 3
  for line in lines:
    names, *pairs = line.split()
    for text, shown in (pairs[:2], pairs[2:]):
      text = text.replace("␣", " ").replace("⏎", "\n")
      levels = split_reference.whole_text_levels(text, names.split(","))
      assert "".join(map(str, levels)).replace("0", "·") == shown, line


def test_the_documentation_names_every_rule():
  page = (HERE.parent / "docs" / "splitting.md").read_text(encoding="utf-8")
  for name in rules.RULES:
    assert re.search(rf"\| `{name}(@[KN])?` \|", page), name
  for name in splitter.MACHINES:
    assert f"| `{name}@FILE` |" in page
  for name in unicode_table.CLASS_NAMES:
    assert f"`{name.upper()}`" in page, name
    number = getattr(unicode_table, name.upper())
    assert getattr(splitting, name.upper()) == number  # imported from there
  for name in ("LETTERS", "NUMBERS", "SPACES"):
    assert getattr(splitting, name) == getattr(unicode_table, name)


def test_a_word_rule_without_a_number_is_of_every_word():
  assert Splitter(["word"]).hash == Splitter(["word@1"]).hash
  assert Splitter(["anyscript"]).hash == Splitter(["anyscript@1"]).hash
