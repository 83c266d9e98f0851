"""Prompts and messages become rows in which only answers are learned."""

import json

import numpy as np
import pytest

from aunet_jax.config import DataConfig
from aunet_jax.data import conversations, corpora, loader, roles
from aunet_jax.data.records import Document, Skip
from aunet_jax.splitting.splitter import Splitter
from tests import toy_tokens

SPLITTER = Splitter(["word@1"], has_roles=True)
CAPACITIES = (64, 24)


def reader(**settings) -> conversations.Reader:
  cfg = DataConfig(train="x.jsonl", **{"format": "completion"} | settings)
  return conversations.make_reader(cfg, SPLITTER, CAPACITIES)


def say(*pairs) -> dict:
  return {"messages": [{"role": r, "content": t} for r, t in pairs]}


def test_text_needs_no_reader():
  assert conversations.make_reader(DataConfig(), SPLITTER, CAPACITIES) is None


def test_fields_may_have_other_names():
  named = reader(prompt_field="question", completion_field="answer")
  record = {"question": "1+1?", "answer": "2", "other": None}
  found = named.document(record, "here", 9)
  assert found == Document("here", b"\xf91+1?\xfa2\xfb")


@pytest.mark.parametrize(
  ("settings", "record", "reason", "detail"),
  [
    ({}, {"question": "a"}, "no such field", "no 'prompt' among: question"),
    ({}, {"prompt": "a"}, "no such field", "no 'completion' among: prompt"),
    (
      {},
      {"prompt": "a", "completion": None},
      "text of a wrong type",
      "'completion' is null",
    ),
    ({}, {"prompt": "a", "completion": ""}, "empty answer", ""),
    ({}, [1], "not an object", "a list"),
    (
      {},
      {"prompt": "", "completion": "x" * 62},
      "answer longer than a row",
      "62 bytes",
    ),
    (
      {},
      {"prompt": "", "completion": " a" * 25},
      "answer longer than a row",
      "50 bytes",
    ),
    ({"format": "chat"}, {"messages": "hi"}, "messages of a wrong type", "str"),
    ({"format": "chat"}, {"messages": ["hi"]}, "not an object", "a str"),
    ({"format": "chat"}, {"text": "hi"}, "no such field", "no 'messages'"),
    (
      {"format": "chat"},
      say(("assistant", "b"), ("user", "a")),
      "roles out of order",
      "turn 1 is the assistant's",
    ),
    (
      {"format": "chat"},
      say(("user", "a")),
      "roles out of order",
      "the last turn is the user's",
    ),
    ({"format": "chat"}, say(), "roles out of order", "no turn of a user"),
    (
      {"format": "chat"},
      say(("user", "a"), ("tool", "b")),
      "no such role",
      "'tool' is none of",
    ),
    ({"format": "chat"}, say(({}, "a")), "no such role", "{}"),
    (
      {"format": "chat"},
      say(("user", ["a"]), ("assistant", "b")),
      "text of a wrong type",
      "content of message 1' is a list",
    ),
  ],
)
def test_a_wrong_record_is_skipped_with_its_reason(
  settings, record, reason, detail
):
  found = reader(**settings).document(record, "file:3", 70)
  assert isinstance(found, Skip)
  assert (found.where, found.reason, found.lost_bytes) == ("file:3", reason, 70)
  assert detail in found.detail and "\n" not in found.detail


def test_a_long_prompt_loses_its_left_and_that_is_counted():
  record = {"prompt": "word " * 20 + "end", "completion": "the answer"}
  found = reader().document(record, "x", 1)
  (user, assistant) = roles.decode(found.text)
  assert assistant.text == b"the answer" and user.text.endswith(b"word end")
  assert found.cut_bytes == len(record["prompt"]) - len(user.text) > 0
  assert len(found.text) < CAPACITIES[0]
  # One byte more would not fit: stage 1 is full, or stage 2.
  assert len(found.text) + 1 == CAPACITIES[0] or (
    (SPLITTER.levels(found.text) > 0).sum() + 1 == CAPACITIES[1]
  )


def test_many_words_are_cut_for_the_deeper_stage():
  record = {"prompt": "a b " * 13, "completion": "c"}
  found = reader().document(record, "x", 1)
  assert len(found.text) < 50 and found.cut_bytes
  assert (SPLITTER.levels(found.text) > 0).sum() + 1 <= CAPACITIES[1]


def test_tokens_fill_a_row_and_what_is_cut_is_counted():
  tokenizer = toy_tokens.tokenizer()
  cfg = DataConfig(train="x", format="completion", tokenizer=tokenizer.path)
  of_tokens = conversations.make_reader(
    cfg, Splitter((), has_roles=True), (16,), tokenizer
  )
  record = {"prompt": "é the cat" * 20, "completion": "sat on the mat"}
  document = of_tokens.document(record, "here", 9)
  whole = b"\xf9" + record["prompt"].encode() + b"\xfasat on the mat\xfb"
  assert document.cut_bytes == len(whole) - len(document.text) > 0
  assert whole.endswith(document.text[1:]) and document.text[:1] == b"\xf9"
  assert len(tokenizer.encode(document.text)) == 15  # and BOS
  document.text[1:-1].replace(b"\xfa", b"").decode()
  long = of_tokens.document(record | {"completion": "z" * 14}, "here", 9)
  assert long.reason == "answer longer than a row"


def write(path, records) -> str:
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return str(path)


def open_(tmp_path, train, **settings):
  lines = []
  cfg = DataConfig(train=train, **{"format": "completion"} | settings)
  found = corpora.open_corpora(
    cfg, SPLITTER, CAPACITIES, tmp_path / "cache", lines.append
  )
  return *found, "\n".join(lines)


def pairs(count, start=0) -> list[dict]:
  return [
    {"prompt": f"what is {n}?", "completion": f"it is {n}."}
    for n in range(start, start + count)
  ]


def test_rows_hold_whole_conversations_and_learn_answers(tmp_path):
  records = pairs(60) + [{"prompt": "long " * 30, "completion": "it is cut"}]
  train, heldout, log = open_(
    tmp_path, write(tmp_path / "a.jsonl", records), heldout_fraction=0.2
  )
  assert train.num_cuts == heldout.num_cuts == 0
  assert "1 records lost" in log and "left of their prompts" in log
  learned = []
  for corpus in (train, heldout):
    for number in range(corpus.num_rows):
      row = corpus.row(number)
      assert row["weights"][row["documents"] == 0].sum() == 0
      answers = bytes(
        row["targets"][row["weights"] > 0].astype(np.uint8)
      ).split(b"\xfb")
      learned += [text.decode() for text in answers[:-1]]
      is_text = row["targets"] != roles.END
      np.testing.assert_array_equal(
        row["target_bytes"], row["weights"] * is_text
      )
  assert sorted(learned) == sorted(r["completion"] for r in records)
  (batch, *_) = loader.evaluation_batches(heldout, batch_size=2)
  assert batch["weights"].dtype == np.int32 == batch["target_bytes"].dtype


def test_several_files_and_weights(tmp_path):
  one = write(tmp_path / "a.jsonl", pairs(30))
  other = write(tmp_path / "b.jsonl", pairs(30, 100))
  mixture = [{"path": one, "weight": 3}, {"path": other, "weight": 1}]
  train, _, _ = open_(tmp_path, mixture, heldout_fraction=0.0)
  assert train.weights == (0.75, 0.25) and train.num_documents == 60
  batches = loader.make_loader(train, seed=0, batch_size=4)
  batch = next(batches)
  assert 0 < batch["weights"].sum() < (batch["documents"] > 0).sum()
  batches.close()


def test_a_json_list_is_read_too_and_chat(tmp_path):
  path = tmp_path / "a.json"
  record = say(
    ("system", "s"), ("user", "u"), ("assistant", "a \ud83d"), ("user", "v"),
    ("assistant", "b"),
  )  # fmt: skip
  path.write_text(json.dumps([record] * 3))
  train, _, _ = open_(tmp_path, str(path), format="chat", heldout_fraction=0.0)
  ((_, text), *_) = train.documents()
  assert text == b"\xf8s\xf9u\xfaa \xed\xa0\xbd\xfb\xf9v\xfab\xfb"


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"question": "a", "answer": "b"}\n' * 3, "no 'prompt' among: question"),
    ("just text\n" * 3, "prompts and messages are read from JSON"),
    ('{"prompt": "a", "completion": ""}\n' * 3, "empty answer"),
  ],
)
def test_a_file_of_another_kind_is_said_and_leaves_nothing(
  tmp_path, content, message
):
  (tmp_path / "a.txt").write_text(content)
  with pytest.raises(ValueError, match=message):
    open_(tmp_path, str(tmp_path / "a.txt"))
  left = [p for p in (tmp_path / "cache").glob("*") if p.suffix != ".lock"]
  assert not left


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "arrow"])
def test_a_table_of_prompts_is_refused_not_read_as_text(tmp_path, kind):
  rows, path = pairs(3), tmp_path / f"a.{kind}"
  if kind in ("csv", "tsv"):
    between = "," if kind == "csv" else "\t"
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    path.write_text("".join(between.join(line) + "\n" for line in lines))
  else:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
      pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
      with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
  with pytest.raises(ValueError, match=f"read from JSON lines, not {kind}"):
    open_(tmp_path, str(path))


def test_other_fields_make_another_index_and_text_keeps_its_own(tmp_path):
  path = write(
    tmp_path / "a.jsonl", [{"prompt": "a b", "completion": "c", "c2": "d"}] * 9
  )
  one, _, _ = open_(tmp_path, path, heldout_fraction=0.0)
  other, _, _ = open_(
    tmp_path, path, heldout_fraction=0.0, completion_field="c2"
  )
  assert one.fingerprint != other.fingerprint
  assert next(other.documents())[1] == b"\xf9a b\xfad\xfb"
