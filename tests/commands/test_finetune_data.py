"""Recipes: files as they are published -> records that can be trained on."""

import json
import lzma

import pytest

from aunet_jax import config as config_lib
from aunet_jax import finetune_data, terminal
from aunet_jax.data import conversations
from aunet_jax.data.records import Document
from aunet_jax.splitting.splitter import Splitter

SST2 = [{"sentence": "fine film ", "label": 1}, {"sentence": "bad", "label": 0}]
TWO = [{"sentence1": "It rains.", "sentence2": "It is wet.", "label": 1}]
SQUAD = {
  "data": [
    {
      "paragraphs": [
        {
          "context": "Ann met Bo.",
          "qas": [
            {"question": "Who?", "answers": [{"text": "Bo"}, {"text": "b"}]},
            {"question": "When?", "answers": []},
          ],
        }
      ]
    }
  ]
}
PEP = {"text": "PEP: 1\nTitle: A\n  longer title\nStatus: x\n\n\nBody here."}
PLAY = (
  "A:\nHear me.\n\nB:\nSpeak.\n\nA:\nI do.\n\nB:\nGood,\ngood.\n\nA:\nEnd.\n"
)


def lines(records) -> str:
  return "".join(json.dumps(record) + "\n" for record in records)


def convert(tmp_path, recipe, content, *flags, name="in.jsonl"):
  """(status, all records in order of the files)."""
  (tmp_path / name).write_text(content)
  output = tmp_path / "out"
  status = finetune_data.main(
    [recipe, f"--input={tmp_path / name}", f"--output={output}", *flags]
  )
  found = [
    json.loads(line)
    for path in sorted(output.glob("*.jsonl"), reverse=True)
    for line in path.read_text().splitlines()
  ]
  return status, found


@pytest.mark.parametrize(
  ("recipe", "content", "expected"),
  [
    (
      "sst2",
      lines(SST2),
      [
        ("fine film\nPositive or negative?", "positive"),
        ("bad\nPositive or negative?", "negative"),
      ],
    ),
    (
      "rte",
      lines(TWO),
      [("It rains.\nDoes it follow that It is wet.", "no")],
    ),
    (
      "mrpc",
      lines(TWO),
      [("It rains.\nDoes it mean the same as It is wet.", "yes")],
    ),
    (
      "squad",
      json.dumps(SQUAD),
      [("Ann met Bo.\nWho?", "Bo"), ("Ann met Bo.\nWhen?", "no answer")],
    ),
    ("summarise", lines([PEP]), [("Body here.\nA title:", "A longer title")]),
  ],
)
def test_a_recipe_gives_prompts_and_completions(
  tmp_path, recipe, content, expected
):
  status, found = convert(tmp_path, recipe, content, "--heldout_fraction=0")
  assert status == 0
  assert [(r["prompt"], r["completion"]) for r in found] == expected


def test_a_play_gives_conversations(tmp_path):
  status, found = convert(tmp_path, "dialogue", PLAY, "--heldout_fraction=0")
  assert status == 0
  (talk,) = found
  said = [(m["role"], m["content"]) for m in talk["messages"]]
  assert said == [
    ("user", "Hear me."), ("assistant", "Speak."), ("user", "I do."),
    ("assistant", "Good,\ngood."),
  ]  # fmt: skip


def test_what_is_no_exchange_is_left_out_and_counted(tmp_path, capsys):
  long = f"A:\n{'x' * 801}\n\nB:\nYes.\n\n" + "A:\nNo.\n\nB:\nSo.\n\n"
  twice = "A:\nOne.\n\nA:\nTwo.\n\nA:\nThree.\n\nB:\nFour.\n\n"
  play = long + long.replace("xx", "x", 1) + twice + twice + PLAY
  flags = ("--heldout_fraction=0", "--limit=2")
  status, found = convert(tmp_path, "dialogue", play, *flags)
  assert status == 0 and len(found) == 2
  assert "x" * 800 in found[0]["messages"][0]["content"]
  out = capsys.readouterr().out
  assert "left out: 1, a speech of over 800 characters\n" in out
  assert "left out: 2, one speaker twice in a row\n" in out


@pytest.fixture
def languages(tmp_path):
  folder = tmp_path / "texts"
  folder.mkdir()
  for name, words in {
    "src.eng": ["one", "two", ""],
    "ref.eng-GB": ["one", "two", ""],
    "ref.deu": ["eins", "zwei", "drei"],
    "ref.fra": ["un", "deux", "trois"],
  }.items():
    (folder / f"{name}.txt").write_text("".join(w + "\n" for w in words))
  return folder


def test_many_languages_are_translated_into_one(tmp_path, languages):
  flags = ["translate", f"--input={languages}", f"--output={tmp_path / 'out'}"]
  flags += ["--pairs=*-eng", "--heldout_fraction=0"]
  assert finetune_data.main(flags) == 0
  found = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
  assert [tuple(json.loads(line).values()) for line in found] == [
    ("deu to eng:\neins", "one"),
    ("deu to eng:\nzwei", "two"),
    ("fra to eng:\nun", "one"),
    ("fra to eng:\ndeux", "two"),
  ]


def test_examples_that_share_a_text_are_held_out_together():
  many = [(str(n // 5), {"prompt": str(n)}) for n in range(500)]
  found, _ = finetune_data.split(many, 0.3)
  numbers = {
    name: {int(json.loads(line)["prompt"]) // 5 for line in some}
    for name, some in found.items()
  }
  assert not numbers["train"] & numbers["heldout"]
  assert 15 <= len(numbers["heldout"]) <= 45


def test_compressed_text_is_read(tmp_path):
  path = tmp_path / "in.jsonl.xz"
  path.write_bytes(lzma.compress(lines([PEP]).encode()))
  flags = ["summarise", f"--input={path}", f"--output={tmp_path / 'out'}"]
  assert finetune_data.main([*flags, "--heldout_fraction=0"]) == 0
  assert "longer title" in (tmp_path / "out" / "train.jsonl").read_text()


@pytest.mark.parametrize(
  ("recipe", "content", "flags", "message"),
  [
    ("sst2", '{"text": 1}\n', (), "in.jsonl:1 is no object with sentence"),
    ("sst2", "not JSON\n", (), "in.jsonl:1 is no object"),
    ("sst2", "", (), "holds no example"),
    ("squad", "[1]", (), "not laid out as SQuAD"),
    ("dialogue", "words\n", (), "holds no example"),
    ("sst2", lines(SST2), ("--heldout_fraction=1",), "must be in [0, 1)"),
    ("translate", "", (), "needs --pairs"),
    ("translate", "", ("--pairs=deu-eng",), "there is no 'deu'"),
  ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_written(
  tmp_path, capsys, recipe, content, flags, message
):
  status, found = convert(tmp_path, recipe, content, *flags)
  error = capsys.readouterr().err
  assert status == terminal.EXIT_BAD_INPUT and not found
  assert message in error and error.count("\n") == 1
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", finetune_data.RECIPES)
def test_every_recipe_has_a_config_that_reads_its_records(recipe):
  config = config_lib.parse_flags([f"--config=configs/{recipe}.py"])
  splitter = Splitter(config.model.rules, config.has_roles)
  reader = conversations.make_reader(
    config.data, splitter, config.model.capacities
  )
  record = {"prompt": "a", "completion": "b"}
  if recipe == "dialogue":
    talk = ("user", "a"), ("assistant", "b")
    record = {"messages": [{"role": r, "content": c} for r, c in talk]}
  assert isinstance(reader.document(record, "x", 1), Document)


def test_a_recipe_takes_the_model_of_a_run(tmp_path):
  other = config_lib.parse_flags(["--config=tests/tiny.py"])
  (tmp_path / "config.json").write_text(other.to_json())
  path = f"--config=configs/sst2.py:{tmp_path / 'config.json'}"
  config = config_lib.parse_flags([path])
  assert config.model == other.model and config.data.format == "completion"
