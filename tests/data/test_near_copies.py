"""Near copies: which texts are alike, and that they stay on one side."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_corpora import open_corpora, open_texts, write

from aunet_jax import prepare
from aunet_jax.data import near_copies, reading

WORDS = np.array([f"word{number}" for number in range(5000)])


def some_text(rng, size=200):
  return " ".join(rng.choice(WORDS, size))


def changed(rng, text, count=1):
  """The text with `count` words replaced."""
  words = text.split()
  for at in rng.choice(len(words), count, replace=False):
    words[at] = "another" + str(rng.integers(1e9))
  return " ".join(words)


def alike(one, other):
  pair = [near_copies.sketch(t.encode()) for t in (one, other)]
  return bool((pair[0] == pair[1]).any())


def runs(text):
  """The runs of five words, with four empty words in front."""
  words = [""] * 4 + text.split()
  return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


# ----- likeness -------------------------------------------------------------


@pytest.mark.parametrize(
  ("count", "least", "most"),
  [(1, 0.99, 1.0), (4, 0.9, 1.0), (16, 0.03, 0.35), (40, 0.0, 0.02)],
)
def test_pairs_are_found_as_often_as_the_bands_say(count, least, most):
  rng = np.random.default_rng(count)
  found, expected = [], []
  for _ in range(300):
    text = some_text(rng)
    other = changed(rng, text, count)
    share = len(runs(text) & runs(other)) / len(runs(text) | runs(other))
    expected.append(1 - (1 - share**8) ** near_copies.NUM_BANDS)
    found.append(alike(text, other))
  assert least <= np.mean(found) <= most
  # Three standard deviations of 300 draws.
  assert abs(np.mean(found) - np.mean(expected)) <= 0.09


@given(st.text("ab,. \nZÉ9", max_size=30), st.sampled_from([" ", ", ", "\n\n"]))
@settings(deadline=None)
def test_case_and_punctuation_do_not_count(text, between):
  words = text.replace(",", " ").replace(".", " ").split()
  swapped = "".join(c.swapcase() if c.isascii() else c for c in text)
  plain = near_copies.sketch(" ".join(words).encode())
  for other in (between.join(words), swapped, f"--{text}?!"):
    if words:
      np.testing.assert_array_equal(near_copies.sketch(other.encode()), plain)


def test_short_texts_and_texts_without_words_are_like_their_copies_alone():
  texts = ["a", "b", "a b", "b a", "...", "....", "\n", "é", "你", "你好"]
  for one in texts:
    for other in texts:
      assert alike(one, other) == (one == other), (one, other)


def test_a_script_without_spaces_is_compared_by_characters():
  rng = np.random.default_rng(0)
  text = "".join(map(chr, rng.integers(0x4E00, 0x9FFF, 300)))
  assert alike(text, text[:150] + "一二" + text[150:])
  assert not alike(text, text[::-1])


# ----- sides ----------------------------------------------------------------


def plain_trains(waiting, training):
  """As `near_training`, by comparing all pairs."""
  near = [any((w == t).any() for t in training) for w in waiting]
  while True:
    more = [
      n or any((w == v).any() for v, m in zip(waiting, near, strict=True) if m)
      for w, n in zip(waiting, near, strict=True)
    ]
    if more == near:
      return near
    near = more


def written(path, rows):
  file = near_copies.SketchWriter(path)
  for row in rows:
    file.add(row)
  return file.finish()


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_near_copies_and_theirs_go_to_training(
  tmp_path_factory, num_waiting, num_training, seed
):
  rng = np.random.default_rng(seed)
  directory = tmp_path_factory.mktemp("sketches")
  bands = rng.integers(
    0, 60, (num_waiting + num_training, near_copies.NUM_BANDS), np.uint64
  )
  parts = bands[:num_waiting], bands[num_waiting:]
  files = []
  for name, part in zip("ab", parts, strict=True):
    # In two files, as the parts of an index have them.
    cut = len(part) // 3
    files.append(
      [
        written(directory / f"{name}{i}", rows)
        for i, rows in enumerate((part[:cut], part[cut:]))
      ]
    )
  found = near_copies.near_training(*files)
  assert found.tolist() == plain_trains(*parts)


def test_sketches_are_read_as_they_were_written(tmp_path, monkeypatch):
  monkeypatch.setattr(near_copies, "_BLOCK", 8)
  monkeypatch.setattr(near_copies, "_BLOCKS_AT_ONCE", 2)
  rng = np.random.default_rng(0)
  for count in (0, 1, 7, 8, 9, 16, 17, 40):
    rows = rng.integers(0, 2**63, (count, near_copies.NUM_BANDS), np.uint64)
    file = written(tmp_path / "s", rows)
    for band in range(near_copies.NUM_BANDS):
      read = np.concatenate([[], *file.band(band)]).astype(np.uint64)
      assert len(read) == count
      parts = list(file.band(band))
      assert not count or (np.concatenate(parts) == rows[:, band]).all()


def families(seed, count=40, size=4):
  """Texts of which `size` each are near copies, and as many unlike any."""
  rng = np.random.default_rng(seed)
  near = []
  for _ in range(count):
    text = some_text(rng, 400)
    near.append([changed(rng, text) for _ in range(size)])
  return near, [some_text(rng, 20) for _ in range(count)]


def falls(text, fraction):
  return reading.is_heldout(reading.document_digest(text.encode()), fraction)


def test_near_copies_are_on_one_side_in_any_order(tmp_path):
  near, single = families(0, count=40)
  texts = [text for family in near for text in family] + single
  order = np.random.default_rng(1).permutation(len(texts))
  sides = []
  for name, some in (("a", texts), ("b", [texts[i] for i in order])):
    lines = []
    train, heldout = open_texts(
      tmp_path / name, some, lines=lines, heldout_fraction=0.3
    )
    sides.append({text for _, text in heldout.documents()})
    assert train.num_documents + heldout.num_documents == len(texts)
    kept = {text for _, text in train.documents()}
    assert kept | sides[-1] == {text.encode() for text in texts}
    assert not kept & sides[-1]
  assert sides[0] == sides[1]
  held = {text.decode() for text in sides[0]}
  for family in near:
    assert len({text in held for text in family}) == 1
  # Texts that are like no other are where their hash says.
  assert {t for t in single if t in held} == {
    t for t in single if falls(t, 0.3)
  }
  back = [t for f in near for t in f if falls(t, 0.3) and t not in held]
  (line,) = [line for line in lines if line.startswith("near copies: ")]
  assert f"{len(back)} of {len(back) + len(held)} documents" in line
  assert f"({sum(map(len, back)):,} bytes)" in line


def test_exact_copies_are_on_one_side_within_and_across_sources(tmp_path):
  _, single = families(2, count=100)
  one = write(tmp_path / "one.jsonl", single + single[:50])
  two = write(tmp_path / "two.jsonl", single[50:] * 2)
  mixture = [{"path": one, "weight": 1}, {"path": two, "weight": 2}]
  for sources in (one, f"{one},{two}", mixture):
    train, heldout = open_corpora(tmp_path, sources, heldout_fraction=0.3)
    kept = {text for _, text in train.documents()}
    held = {text for _, text in heldout.documents()}
    assert kept and held and not kept & held


def test_a_copy_in_another_source_of_a_mixture_is_reported(tmp_path):
  rng = np.random.default_rng(3)
  text = next(t for t in (some_text(rng) for _ in range(99)) if falls(t, 0.3))
  near = next(
    t for t in (changed(rng, text) for _ in range(99)) if not falls(t, 0.3)
  )
  one = write(tmp_path / "one.jsonl", [text, near])
  two = write(tmp_path / "two.jsonl", [text, some_text(rng, 2), "a", "b"])
  lines = []
  open_corpora(
    tmp_path,
    [{"path": one, "weight": 1}, {"path": two, "weight": 1}],
    lines,
    heldout_fraction=0.3,
  )
  assert any("1 of" in line and "training text" in line for line in lines)


def test_a_corpus_of_near_copies_says_that_nothing_is_held_out(tmp_path):
  (family,), _ = families(4, count=1, size=30)
  lines = []
  train, heldout = open_texts(
    tmp_path, family, lines=lines, heldout_fraction=0.3
  )
  assert heldout is None and train.num_documents == 30
  assert any("near copies: " in line for line in lines)
  assert any("no document is held out" in line for line in lines)


def test_the_index_is_known_by_touched_sources(tmp_path):
  near, single = families(5, count=40)
  texts = [text for family in near for text in family] + single
  path = write(tmp_path / "a.jsonl", texts)
  first, held = open_corpora(tmp_path, path, heldout_fraction=0.3)
  os.utime(path, ns=(1, 1))
  lines = []
  again, same = open_corpora(tmp_path, path, lines, heldout_fraction=0.3)
  assert again.fingerprint == first.fingerprint
  assert same.fingerprint == held.fingerprint
  assert any("comparing its text" in line for line in lines)
  assert not any("indexing" in line for line in lines)
  assert any("near copies: " in line for line in lines)
  assert not list((tmp_path / "cache").glob("*/waiting"))


def test_prepared_shards_keep_near_copies_on_one_side(tmp_path, capsys):
  near, single = families(6, count=40)
  texts = [text for family in near for text in family] + single
  path = write(tmp_path / "a.jsonl", texts)
  output = tmp_path / "out"
  prepare.main(
    [f"--input={path}", f"--output={output}", "--heldout_fraction=0.3"]
  )
  index = json.loads((output / "index.json").read_text())
  train, heldout = open_corpora(
    tmp_path, str(output / "train"), heldout=str(output / "heldout")
  )
  held = {text.decode() for _, text in heldout.documents()}
  assert train.num_documents + len(held) == len(texts)
  for family in near:
    assert len({text in held for text in family}) == 1
  assert index["near_copies"]["documents"] > 0
  assert "near copies: " in capsys.readouterr().err
  assert not (output / "waiting").exists()
