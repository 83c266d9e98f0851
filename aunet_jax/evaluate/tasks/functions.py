"""What the task files beside this one call: readers, and scores of text.

A reader (`custom_dataset`) takes the task's `dataset_kwargs`, and `data_dir`
(--data_dir, folders joined by commas). Files are named as below one of them; a
file may be packed as FILE.xz, a folder as FOLDER.tar.xz. What else a reader is
given is the task's metadata, which does not concern it.

A score (`process_results`) takes a document and the model's answers.
"""

import functools
import json
import lzma
import random
import re
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets

from aunet_jax.evaluate.tasks import sandbox
from aunet_jax.evaluate.word_overlap import word_f1, words

# ----- files -----------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _unpacked(archive: Path) -> dict[str, bytes]:
  with tarfile.open(archive) as tar:
    return {
      member.name: tar.extractfile(member).read()
      for member in tar
      if member.isfile()
    }


def _bytes(data_dir: str | None, name: str) -> bytes:
  """Raises: ValueError where no folder has the file."""
  if data_dir is None:
    raise ValueError(
      f"the task reads {name}: say below which folder with --data_dir=DIR "
      f"(docs/evaluation.md)."
    )
  for folder in map(Path, data_dir.split(",")):
    path = folder / name
    if path.is_file():
      return path.read_bytes()
    packed = path.with_name(path.name + ".xz")
    if packed.is_file():
      return lzma.decompress(packed.read_bytes())
    for parent in Path(name).parents:
      archive = folder / f"{parent}.tar.xz"
      member = Path(name).relative_to(parent).as_posix()
      if archive.is_file() and member in (files := _unpacked(archive)):
        return files[member]
  raise ValueError(f"--data_dir={data_dir} holds no {name}.")


def _text(data_dir: str | None, name: str) -> str:
  try:
    return _bytes(data_dir, name).decode("utf-8-sig")
  except (UnicodeDecodeError, lzma.LZMAError, EOFError, tarfile.TarError) as e:
    raise ValueError(f"{name} below --data_dir is damaged: {e}.") from None


def _only(record, fields: Iterable[str], where: str) -> dict:
  if not isinstance(record, dict):
    raise ValueError(f"{where} is no object.")
  lacks = [field for field in fields if field not in record]
  if lacks:
    there = ", ".join(record) or "nothing"
    raise ValueError(f"{where} has no {', '.join(lacks)}, but {there}.")
  return {field: record[field] for field in fields}


@functools.lru_cache(maxsize=2)  # parts of a benchmark share a file
def _records(
  data_dir: str | None, name: str, fields: tuple[str, ...]
) -> list[dict]:
  rows = []
  for number, line in enumerate(_text(data_dir, name).split("\n"), start=1):
    if not line.strip():
      continue
    where = f"{name}:{number} below --data_dir"
    try:
      rows.append(_only(json.loads(line), fields, where))
    except json.JSONDecodeError as error:
      raise ValueError(f"{where} is no JSON: {error}.") from None
  return rows


def _dataset(**splits: list[dict] | None) -> dict[str, datasets.Dataset]:
  found = {}
  for split, rows in splits.items():
    if rows is not None:
      if not rows:
        raise ValueError(f"the data of a task has nothing in {split!r}.")
      found[split] = datasets.Dataset.from_list(rows)
  return found


# ----- readers ---------------------------------------------------------------


def json_lines(
  *,
  test: str,
  fields: list[str],
  examples: str | None = None,
  labels: str | None = None,
  data_dir: str | None = None,
  **_,
):
  """Of every JSON line the fields named, in `test`, and in `examples`.

  labels: a file with a number a line, the field `label` of `test`.
  """
  rows = _records(data_dir, test, tuple(fields))
  if labels is not None:
    numbers = _text(data_dir, labels).split()
    if len(numbers) != len(rows):
      raise ValueError(f"{labels} has {len(numbers)} labels for {len(rows)}.")
    rows = [
      {**row, "label": int(number)}
      for row, number in zip(rows, numbers, strict=True)
    ]
  others = _records(data_dir, examples, tuple(fields)) if examples else None
  return _dataset(test=rows, examples=others)


def mmlu(*, subject: str, data_dir: str | None = None, **_):
  """One subject, with its five examples."""
  splits = {"test": "mmlu/mmlu_test.jsonl", "examples": "mmlu/mmlu_dev.jsonl"}
  fields = ("question", "subject", "choices", "answer")
  return _dataset(
    **{
      split: [
        row
        for row in _records(data_dir, name, fields)
        if row["subject"] == subject
      ]
      for split, name in splits.items()
    }
  )


def _table(data_dir: str | None, name: str, columns: list[str] | None):
  lines = _text(data_dir, name).splitlines()
  rows = [line.split("\t") for line in lines if line]
  columns = columns or rows.pop(0)
  for number, row in enumerate(rows, start=1):
    if len(row) != len(columns):
      raise ValueError(
        f"{name}, row {number}, has {len(row)} columns, not {len(columns)}."
      )
  return [dict(zip(columns, row, strict=True)) for row in rows]


def tab_separated(
  *, test: str, columns: list[str], data_dir: str | None = None, **_
):
  """A table without a line of headings."""
  return _dataset(test=_table(data_dir, test, columns))


def squad(*, test: str, data_dir: str | None = None, **_):
  """SQuAD's layout: context, question, answers (its texts, without copies)."""
  rows, text = [], _text(data_dir, test)
  try:
    articles = json.loads(text)["data"]
    for paragraph in (p for one in articles for p in one["paragraphs"]):
      for asked in paragraph["qas"]:
        answers = dict.fromkeys(answer["text"] for answer in asked["answers"])
        row = {"context": paragraph["context"], "question": asked["question"]}
        rows.append({**row, "answers": list(answers)})
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{test} is not laid out as SQuAD: {error!r}.") from None
  return _dataset(test=rows)


# Of CUTE: what is asked, of the columns of its tables. `_rand` files have the
# same columns; `_word` ones a sentence for a word, words for letters.
CUTE = {
  "spell": 'Spell "{0}" with a space between letters.',
  "spell_inverse": 'Write "{0}" as one word.',
  "contains_char": 'Is there a "{0}" in "{1}"?',
  "contains_word": 'Is the word "{0}" in "{1}"?',
  "orth": 'Which is spelled more like "{0}": "{1}" or "{2}"?',
  "sem": 'Which is closer in meaning to "{0}": "{1}" or "{2}"?',
  "ins_char": 'Put "{0}" behind every "{1}" in "{2}".',
  "ins_word": 'Put the word "{0}" behind every "{1}" in "{2}".',
  "del_char": 'Take every "{0}" out of "{1}".',
  "del_word": 'Take the word "{0}" out of "{1}".',
  "sub_char": 'Put "{1}" in place of every "{0}" in "{2}".',
  "sub_word": 'Put the word "{1}" in place of every "{0}" in "{2}".',
  "swap_char": 'Swap "{0}" and "{1}" in "{2}".',
  "swap_word": 'Swap the words "{0}" and "{1}" in "{2}".',
}


def cute(*, part: str, data_dir: str | None = None, **_):
  """A table of CUTE as question, answer, and whether case counts."""
  template = CUTE[part.removesuffix("_rand")]
  rows = []
  for row in _table(data_dir, f"cute/{part}.tsv", None):
    *inputs, answer = row.values()
    question = template.format(*inputs)
    same_case = not part.endswith("_word")
    rows.append(
      {"question": question, "answer": answer, "same_case": same_case}
    )
  return _dataset(test=rows)


def parallel(*, source: str, target: str, data_dir: str | None = None, **_):
  """Lines of NTREX in two languages, by its names of them, and theirs."""
  folder = "ntrex128/NTREX-128/newstest2019"
  table = _text(data_dir, "ntrex128/LANGUAGES.tsv")
  rows = (line.split(maxsplit=1) for line in table.splitlines())
  names = {"eng": "English"} | {row[0]: row[-1] for row in rows if row}

  def lines(language: str) -> list[str]:
    if language not in names:
      raise ValueError(f"NTREX has no {language!r}, but {', '.join(names)}.")
    kind = "src" if language == "eng" else "ref"
    return _text(data_dir, f"{folder}-{kind}.{language}.txt").splitlines()

  ours, theirs = lines(source), lines(target)
  if len(ours) != len(theirs):
    raise ValueError(
      f"NTREX has {len(ours)} lines of {source} and {len(theirs)} of {target}: "
      f"they are not one text."
    )
  rows = [
    {
      "source": a.strip(), "target": b.strip(),
      "source_name": names[source], "target_name": names[target],
    }
    for a, b in zip(ours, theirs, strict=True)
  ]  # fmt: skip
  return _dataset(test=[row for row in rows if row["source"] and row["target"]])


# ----- noise -----------------------------------------------------------------


def _some(share: float, change: Callable[[random.Random, str], str]):
  """Changes that share of what is no space."""

  def noise(draw: random.Random, text: str) -> str:
    return "".join(
      change(draw, c) if not c.isspace() and draw.random() < share else c
      for c in text
    )

  return noise


def _swap(draw: random.Random, text: str) -> str:
  """A tenth of the characters change places with the next one of the word."""
  characters, at = list(text), 0
  while at + 1 < len(characters):
    pair = characters[at : at + 2]
    if not any(c.isspace() for c in pair) and draw.random() < 0.1:
      characters[at : at + 2] = pair[::-1]
      at += 1
    at += 1
  return "".join(characters)


NOISES: dict[str, Callable[[random.Random, str], str]] = {
  "clean": lambda draw, text: text,
  "upper": lambda draw, text: text.upper(),
  "case": _some(0.5, lambda draw, c: c.swapcase()),
  "drop": _some(0.1, lambda draw, c: ""),
  "repeat": _some(0.2, lambda draw, c: c * draw.randint(2, 4)),
  "swap": _swap,
}


def noised(text: str, kind: str) -> str:
  """The same for the same text, on every machine."""
  return NOISES[kind](random.Random(f"{kind} {text}"), text)


def noisy(*, noise: str, test: str, data_dir: str | None = None, **_):
  """Questions with choices, the question with noise of one of NOISES."""
  rows = _records(data_dir, test, ("query", "choices", "gold"))
  return _dataset(
    test=[{**row, "query": noised(row["query"], noise)} for row in rows]
  )


# ----- scores ----------------------------------------------------------------


def continuation(doc: dict, results: list) -> dict:
  """Of `doc["continuation"]` after a space: LAMBADA's last word."""
  ((nats, is_greedy),) = results
  size = len(f" {doc['continuation']}".encode())
  return {
    "acc": float(is_greedy),
    "perplexity": nats,
    "bits_per_byte": (nats, size),
  }


def _overlap(answer: str, accepted: list[str]) -> dict:
  said = words(answer)
  return {
    "exact_match": float(any(said == words(text) for text in accepted)),
    "f1": max(word_f1(answer, text) for text in accepted),
  }


def answers(doc: dict, results: list) -> dict:
  """The best match with one of the answers, in words, as SQuAD counts."""
  return _overlap(results[0], doc["answers"])


def answer(doc: dict, results: list) -> dict:
  """The same where the field is `answer`, a list (Natural Questions)."""
  return _overlap(results[0], doc["answer"])


def aliases(doc: dict, results: list) -> dict:
  """The same where it is an answer and its aliases (TriviaQA)."""
  return _overlap(results[0], [doc["answer"], *doc["aliases"]])


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _number(text: str) -> float:
  return float(text.replace(",", ""))


def number(doc: dict, results: list) -> dict:
  """GSM8K's: the number after ####, or the last one that is written."""
  expected = _number(NUMBER.findall(doc["answer"])[-1])
  marked = NUMBER.match(results[0].partition("####")[2].strip(" $"))
  every = NUMBER.findall(results[0])
  return {
    "exact_match": float(bool(marked) and _number(marked[0]) == expected),
    "last_number": float(bool(every) and _number(every[-1]) == expected),
  }


def quoted(doc: dict, results: list) -> dict:
  """CUTE's: what stands before the next quote."""
  said, wanted = results[0].partition('"')[0].strip(), doc["answer"]
  if not doc["same_case"]:
    said, wanted = said.lower(), wanted.lower()
  return {"exact_match": float(said == wanted)}


def translation(doc: dict, results: list) -> dict:
  pair = (doc["target"], results[0].strip())
  return {"bleu": pair, "chrf": pair}


def program(doc: dict, results: list) -> dict:
  """HumanEval's: whether prompt and completion pass the tests, when run."""
  source = f"{doc['prompt']}{results[0]}\n{doc['test']}\n"
  source += f"check({doc['entry_point']})\n"
  return {"pass@1": float(sandbox.passes(source))}
