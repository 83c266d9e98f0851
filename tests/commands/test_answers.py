"""How often a tuned model answers as the data does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aunet_jax import answers, finetune_data, terminal
from aunet_jax.config import Config, DataConfig
from aunet_jax.evaluate import score
from aunet_jax.workdir import load
from tests.toy_generator import make_config, make_params, talker

ROOT = Path(__file__).parents[2]
RECORDS = [
  {"prompt": f"{n}?", "completion": ("yes", "no")[n % 3 > 0]} for n in range(6)
]


@pytest.fixture
def workdir(tmp_path):
  data = DataConfig(train="x.jsonl", format="completion")
  params = jax.tree.map(jnp.asarray, make_params(make_config()))
  config = Config(model=make_config(), data=data)
  load.save_params(tmp_path / "run", config, params)
  lines = "".join(json.dumps(r) + "\n" for r in RECORDS)
  (tmp_path / "asked.jsonl").write_text(lines)
  return tmp_path / "run"


def ask(workdir, *flags) -> int:
  data = workdir.parent / "asked.jsonl"
  return answers.main([f"--workdir={workdir}", f"--data={data}", *flags])


def test_the_likeliest_label_is_the_answer(workdir, capsys):
  assert ask(workdir, "--labels=yes,no") == 0
  total = json.loads(capsys.readouterr().out.splitlines()[-1])
  right = 0
  for record in RECORDS:
    prompt = b"\xf9" + record["prompt"].encode() + b"\xfa"
    yes, no = score.score(
      talker().config, talker().params, talker().splitter,
      [(prompt, b"yes\xfb"), (prompt, b"no\xfb")],
    )  # fmt: skip
    right += ("no", "yes")[yes.nats > no.nats] == record["completion"]
  assert total == {"questions": 6, "exact": right / 6, "word_f1": right / 6}


def test_without_labels_it_writes(workdir, tmp_path):
  output = tmp_path / "out.jsonl"
  flags = ("--limit=3", "--max_bytes=8", f"--output={output}")
  assert ask(workdir, *flags) == 0
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row["expected"] for row in rows] == ["yes", "no", "no"]
  assert all(0 < len(row["answer"]) <= 8 for row in rows)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--limit=0"], "--limit=0 must be positive"),
    (["--data=/no/such.jsonl"], "/no/such.jsonl"),
    (["--workdir=/no/such"], "no such workdir"),
  ],
)
def test_what_cannot_be_asked_is_named(workdir, capsys, flags, message):
  assert ask(workdir, *flags) == terminal.EXIT_BAD_INPUT
  assert message in capsys.readouterr().err


def run(module: str, *flags: str) -> str:
  """A command in a process of its own, on one device."""
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", module, *flags]
  done = subprocess.run(
    command, env=env, cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def example(recipe: str, n: int) -> dict:
  """The n-th of 64 made-up examples as the recipe's source writes them."""
  number, yes = n * 37 % 101, n * n % 5 % 2
  if recipe == "sst2":
    return {"sentence": f"film {n * n} was seen {n % 7}", "label": yes}
  if recipe in ("rte", "mrpc"):
    first, second = f"it rained {n * n} times", f"{n % 7} wet days"
    return {"sentence1": first, "sentence2": second, "label": yes}
  if recipe == "squad":
    question = f"What had the king of {900 + n}?"
    answers = [{"text": f"{number} towns"}]
    return {
      "context": f"In {900 + n} a king of {number} towns met {n % 9} men.",
      "qas": [{"question": question, "answers": answers}],
    }
  about = f"It is about {n * n} things."
  return {"text": f"PEP: {n}\nTitle: Rule {number}\n\n\n{about}"}


def write_64(recipe: str, path) -> None:
  """64 examples as the recipe's source has them."""
  if recipe == "dialogue":
    speeches = [f"I say {n * n * 37 % 1009} to {n % 13}." for n in range(256)]
    named = [f"{'AB'[n % 2]}:\n{said}" for n, said in enumerate(speeches)]
    path.write_text("\n\n".join(named))
  elif recipe == "translate":
    path.mkdir()
    for name, word in {"src.eng": "house", "ref.deu": "Haus"}.items():
      text = [f"{word} {n * n * 37 % 1009}\n" for n in range(64)]
      (path / f"{name}.txt").write_text("".join(text))
  else:
    examples = [example(recipe, n) for n in range(64)]
    lines = "".join(json.dumps(e) + "\n" for e in examples)
    squad = json.dumps({"data": [{"paragraphs": examples}]})
    path.write_text(squad if recipe == "squad" else lines)


@pytest.mark.slow  # a training of a minute or more each
@pytest.mark.parametrize(
  "recipe",
  ["sst2", "rte", "mrpc", "squad", "translate", "summarise", "dialogue"],
)
def test_64_records_are_memorised_to_the_byte(recipe, tmp_path):
  write_64(recipe, tmp_path / "in")
  pairs = ["--pairs=deu-eng"] if recipe == "translate" else []
  made = [recipe, f"--input={tmp_path / 'in'}", f"--output={tmp_path}"]
  assert finetune_data.main([*made, *pairs, "--heldout_fraction=0"]) == 0
  model = "--config.model.stages"
  flags = (
    f"--config=configs/{recipe}.py", f"--workdir={tmp_path / 'run'}",
    "--config.train.init_from=None", "--config.data.heldout=None",
    "--config.data.heldout_fraction=0",
    f"--config.data.train={tmp_path / 'train.jsonl'}",
    f"{model}[0].dim=64", f"{model}[1].dim=128", f"{model}[1].num_layers=2",
    f"{model}[0].capacity=512", f"{model}[1].capacity=160",
    "--config.train.num_steps=300", "--config.optimizer.learning_rate=3e-3",
  )  # fmt: skip
  run("aunet_jax.train", *flags)
  data = f"--data={tmp_path / 'train.jsonl'}"
  out = run("aunet_jax.answers", f"--workdir={tmp_path / 'run'}", data)
  total = json.loads(out.splitlines()[-1])
  assert total == {"questions": 64, "exact": 1.0, "word_f1": 1.0}
