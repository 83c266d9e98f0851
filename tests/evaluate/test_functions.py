"""What the task files call: readers of data, noise, and scores of text."""

import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from aunet_jax.evaluate.tasks import functions  # noqa: E402

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"


def lines(rows) -> str:
  return "".join(json.dumps(row) + "\n" for row in rows)


def pack(path, files: dict[str, str]) -> None:
  with tarfile.open(path, "w:xz") as tar:
    for name, text in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(text.encode())
      tar.addfile(member, io.BytesIO(text.encode()))


# ----- readers ---------------------------------------------------------------


@pytest.mark.parametrize("packing", ["plain", "xz", "tar", "second folder"])
def test_a_file_is_found_however_it_is_packed(tmp_path, packing):
  text = lines([{"a": 1, "b": "ä", "c": None}, {"b": "ö", "a": 2}])
  other, folder = tmp_path / "other", tmp_path / "data"
  (folder / "x").mkdir(parents=True)
  other.mkdir()
  data_dir = str(folder)
  if packing == "plain":
    (folder / "x" / "t.jsonl").write_text(text)
  elif packing == "xz":
    (folder / "x" / "t.jsonl.xz").write_bytes(lzma.compress(text.encode()))
  elif packing == "tar":
    pack(folder / "x.tar.xz", {"t.jsonl": text, "u.jsonl": "no"})
  else:
    (folder / "x" / "t.jsonl").write_text(text)
    data_dir = f"{other},{folder}"
  data = functions.json_lines(
    test="x/t.jsonl", fields=["a", "b"], data_dir=data_dir, version=1
  )
  assert list(data) == ["test"]
  assert list(data["test"]) == [{"a": 1, "b": "ä"}, {"a": 2, "b": "ö"}]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "has nothing in 'test'"),
    ('{"a": 1}\n{"b": 1}\n', "t.jsonl:2 below --data_dir has no a, but b."),
    ('{"a": 1}\n\n{"a"\n', "t.jsonl:3 below --data_dir is no JSON: "),
    ("[1]\n", "t.jsonl:1 below --data_dir is no object."),
    (b"\xff", "t.jsonl below --data_dir is damaged: "),
    (None, "--data_dir={} holds no t.jsonl."),
  ],
)
def test_what_a_file_lacks_is_named(tmp_path, text, message):
  if text is not None:
    text = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "t.jsonl").write_bytes(text)
  with pytest.raises(ValueError) as error:
    functions.json_lines(test="t.jsonl", fields=["a"], data_dir=str(tmp_path))
  assert message.format(tmp_path) in str(error.value)
  with pytest.raises(ValueError, match="say below which folder with"):
    functions.json_lines(test="t.jsonl", fields=["a"])


def test_labels_may_be_in_a_file_of_their_own(tmp_path):
  (tmp_path / "t.jsonl").write_text(lines([{"a": "x"}, {"a": "y"}]))
  (tmp_path / "t.lst").write_text("1\n0\n")
  options = {"test": "t.jsonl", "fields": ["a"], "data_dir": str(tmp_path)}
  data = functions.json_lines(labels="t.lst", **options)
  assert list(data["test"]) == [{"a": "x", "label": 1}, {"a": "y", "label": 0}]
  (tmp_path / "t.lst").write_text("1\n")
  with pytest.raises(ValueError, match="1 labels for 2"):
    functions.json_lines(labels="t.lst", **options)


def test_a_subject_has_its_own_examples(tmp_path):
  (tmp_path / "mmlu").mkdir()
  for name in ("test", "dev"):
    rows = [
      {"question": f"{name} {n}", "subject": "ab"[n % 2], "choices": ["x"],
       "answer": 0}
      for n in range(4)
    ]  # fmt: skip
    (tmp_path / "mmlu" / f"mmlu_{name}.jsonl").write_text(lines(rows))
  data = functions.mmlu(subject="b", data_dir=str(tmp_path))
  found = {split: [r["question"] for r in rows] for split, rows in data.items()}
  assert found == {"test": ["test 1", "test 3"], "examples": ["dev 1", "dev 3"]}


def test_squads_questions_have_each_answer_once(tmp_path):
  answers = [{"text": "x", "answer_start": n} for n in (0, 9)]
  asked = [{"question": "q?", "answers": answers}]
  article = {"paragraphs": [{"context": "c", "qas": asked}]}
  (tmp_path / "s.json").write_text(json.dumps({"data": [article]}))
  data = functions.squad(test="s.json", data_dir=str(tmp_path))
  assert list(data["test"]) == [
    {"context": "c", "question": "q?", "answers": ["x"]}
  ]
  (tmp_path / "s.json").write_text("{}")
  with pytest.raises(ValueError, match="s.json is not laid out as SQuAD"):
    functions.squad(test="s.json", data_dir=str(tmp_path))


def test_a_table_has_its_columns_in_every_row(tmp_path):
  (tmp_path / "t.tsv").write_text('x\t1\t\ta "b"\nx\t0\t*\tc\n')
  options = {"columns": list("klmn"), "data_dir": str(tmp_path)}
  data = functions.tab_separated(test="t.tsv", **options)
  assert data["test"][0] == {"k": "x", "l": "1", "m": "", "n": 'a "b"'}
  (tmp_path / "t.tsv").write_text("x\t1\n")
  with pytest.raises(ValueError, match="row 1, has 2 columns, not 4"):
    functions.tab_separated(test="t.tsv", **options)


def test_cute_asks_for_what_its_tables_hold(tmp_path):
  (tmp_path / "cute").mkdir()
  table = "input1\tinput2\tinput3\tlabel\na\tn\tand\tnad\n"
  for part in ("swap_char_rand", "swap_word"):
    (tmp_path / "cute" / f"{part}.tsv").write_text(table)
    (row,) = functions.cute(part=part, data_dir=str(tmp_path))["test"]
    assert row["question"] == (
      'Swap "a" and "n" in "and".'
      if part == "swap_char_rand"
      else 'Swap the words "a" and "n" in "and".'
    )
    assert row["answer"] == "nad"
    assert row["same_case"] == (part == "swap_char_rand")


def test_lines_of_two_languages_stay_together(tmp_path):
  base = "NTREX-128/newstest2019"
  files = {
    "LANGUAGES.tsv": "deu German\nzho-CN  Chinese (Simplified)\n\n",
    f"{base}-src.eng.txt": "one\n\nthree\n",
    f"{base}-ref.deu.txt": "eins\nzwei\n drei \n",
    f"{base}-ref.zho-CN.txt": "一\n",
  }
  pack(tmp_path / "ntrex128.tar.xz", files)
  data_dir = str(tmp_path)
  data = functions.parallel(source="deu", target="eng", data_dir=data_dir)
  names = {"source_name": "German", "target_name": "English"}
  assert list(data["test"]) == [
    {"source": "eins", "target": "one"} | names,
    {"source": "drei", "target": "three"} | names,
  ]
  with pytest.raises(ValueError, match="1 lines of zho-CN and 3 of eng"):
    functions.parallel(source="zho-CN", target="eng", data_dir=data_dir)
  with pytest.raises(ValueError, match="no 'xyz', but eng, deu, zho-CN"):
    functions.parallel(source="xyz", target="eng", data_dir=data_dir)


# ----- noise -----------------------------------------------------------------

TEXT = "Which statement best explains ÜBERMUT, 東京 and 42? " * 20


def test_noise_is_what_its_name_says():
  noised = {kind: functions.noised(TEXT, kind) for kind in functions.NOISES}
  assert noised["clean"] == TEXT
  assert noised["upper"] == TEXT.upper()
  assert noised["case"].lower() == TEXT.lower()
  letters = sum(c != c.swapcase() for c in TEXT)
  changed = sum(a != b for a, b in zip(noised["case"], TEXT, strict=True))
  assert changed / letters == pytest.approx(0.5, abs=0.1)
  size = len(TEXT.replace(" ", ""))
  dropped = len(TEXT) - len(noised["drop"])
  assert dropped / size == pytest.approx(0.1, abs=0.03)
  added = len(noised["repeat"]) - len(TEXT)
  assert added / size == pytest.approx(0.2 * 2, abs=0.1)
  # A swap keeps the characters of every word.
  words = zip(noised["swap"].split(), TEXT.split(), strict=True)
  assert all(sorted(a) == sorted(b) for a, b in words)
  assert 0.1 < sum(
    a != b for a, b in zip(noised["swap"], TEXT, strict=True)
  ) / size < 0.25  # fmt: skip
  for text in noised.values():
    assert [c for c in text if c.isspace()] == [" "] * TEXT.count(" ")


def test_noise_is_the_same_everywhere():
  """Scores of other machines and days stay comparable."""
  short = "Which statement best explains it?"
  for kind, expected in {
    "case": "WHICH StaTEmEnt bEst EXPLaInS it?",
    "drop": "Whch tatement bst explains i?",
    "repeat": "WWhich staaatement bbbbest eexpllllainssss it?",
    "swap": "Whihc tstaeemnt ebst explains ti?",
  }.items():
    assert functions.noised(short, kind) == expected


def test_noise_changes_the_question_alone(tmp_path):
  row = {"query": "what is it", "choices": ["one", "two"], "gold": 1}
  (tmp_path / "t.jsonl").write_text(lines([row]))
  data = functions.noisy(noise="upper", test="t.jsonl", data_dir=str(tmp_path))
  assert list(data["test"]) == [{**row, "query": "WHAT IS IT"}]


# ----- scores ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("score", "doc", "answer", "expected"),
  [
    ("answers", {"answers": ["x y", "the cat"]}, "A cat!",
     {"exact_match": 1.0, "f1": 1.0}),
    ("answers", {"answers": ["cat", "x"]}, "big cat",
     {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}),
    ("answer", {"answer": ["1972", "in 1972"]}, " in 1972.",
     {"exact_match": 1.0, "f1": 1.0}),
    ("aliases", {"answer": "Onion", "aliases": ["Onions"]}, "onion",
     {"exact_match": 1.0, "f1": 1.0}),
    ("aliases", {"answer": "Onion", "aliases": ["Onions"]}, "onions",
     {"exact_match": 1.0, "f1": 1.0}),
    ("number", {"answer": "<<1+1=2>>\n#### 1,200"}, "so #### $1200.00 a",
     {"exact_match": 1.0, "last_number": 1.0}),
    ("number", {"answer": "#### -3"}, "it is 3, or -3",
     {"exact_match": 0.0, "last_number": 1.0}),
    ("number", {"answer": "#### 3"}, "#### 4\n3",
     {"exact_match": 0.0, "last_number": 1.0}),
    ("number", {"answer": "#### 3"}, "",
     {"exact_match": 0.0, "last_number": 0.0}),
    ("quoted", {"answer": "t h e", "same_case": True}, 't h e" x',
     {"exact_match": 1.0}),
    ("quoted", {"answer": "The", "same_case": True}, "the",
     {"exact_match": 0.0}),
    ("quoted", {"answer": "The", "same_case": False}, "the",
     {"exact_match": 1.0}),
    ("translation", {"target": "x"}, " y ",
     {"bleu": ("x", "y"), "chrf": ("x", "y")}),
    ("program", {"prompt": "def f():\n", "entry_point": "f",
                 "test": "def check(g):\n  assert g() == 1"}, "  return 1",
     {"pass@1": 1.0}),
    ("program", {"prompt": "def f():\n", "entry_point": "f",
                 "test": "def check(g):\n  assert g() == 1"}, "  return 2",
     {"pass@1": 0.0}),
  ],
)  # fmt: skip
def test_an_answer_is_scored(score, doc, answer, expected):
  assert getattr(functions, score)(doc, [answer]) == expected


def test_a_continuation_has_bits_of_its_bytes():
  doc = {"continuation": "é"}  # 2 bytes and the space
  assert functions.continuation(doc, [(-2.0, True)]) == {
    "acc": 1.0, "perplexity": -2.0, "bits_per_byte": (-2.0, 3),
  }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the data are not there")
def test_the_solutions_of_humaneval_pass_and_empty_ones_do_not():
  data = functions.json_lines(
    test="humaneval/human_eval.jsonl",
    fields=["task_id", "prompt", "canonical_solution", "test", "entry_point"],
    data_dir=str(SHARED),
  )
  for doc in data["test"]:
    solved = functions.program(doc, [doc["canonical_solution"]])
    assert solved == {"pass@1": 1.0}, doc["task_id"]
  for doc in list(data["test"])[:8]:
    assert functions.program(doc, ["    pass"]) == {"pass@1": 0.0}
