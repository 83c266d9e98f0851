"""python -m aunet_jax.lm_eval on a task of one's own, without a network."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from aunet_jax import config as config_lib  # noqa: E402
from aunet_jax import lm_eval as command  # noqa: E402
from aunet_jax.evaluate import score  # noqa: E402
from aunet_jax.workdir import load  # noqa: E402
from tests import toy_generator  # noqa: E402

SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA = [SHARED / "eval", SHARED / "multilingual"]

QUESTIONS = [
  {"question": f"{a} and {b} make", "choices": [str(a + b), "naïve", "no"],
   "answer": (a + b) % 3}
  for a in (1, 2) for b in range(3)
]  # fmt: skip
TASK = """
task: little_sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  generator = toy_generator.generator()
  config = config_lib.Config(model=generator.config)
  folder = tmp_path_factory.mktemp("run")
  load.save_params(folder, config, generator.params)
  return folder


@pytest.fixture
def tasks(tmp_path, monkeypatch):
  for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    monkeypatch.setenv(name, "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  folder = tmp_path / "tasks"
  folder.mkdir()
  data = tmp_path / "sums.jsonl"
  data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
  (folder / "sums.yaml").write_text(TASK.format(path=data))
  return folder


def no_fork():
  raise AssertionError("a fork of JAX's threads can hang")


def test_accuracy_is_what_ten_lines_compute(
  workdir, tasks, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(os, "fork", no_fork)
  output = tmp_path / "results.json"
  flags = [
    f"--workdir={workdir}",
    "--tasks=little_sums",
    f"--include_path={tasks}",
  ]
  assert command.main([*flags, f"--output={output}"]) == 0
  results = json.loads(output.read_text())
  loaded = load.load(workdir)
  right, right_norm = [], []
  for question in QUESTIONS:
    text = question["question"].encode()
    scores = score.score(
      loaded.model.config, loaded.params, loaded.splitter,
      [(text, b" " + choice.encode()) for choice in question["choices"]],
    )  # fmt: skip
    nats = np.array([one.nats for one in scores])
    sizes = [len(choice) for choice in question["choices"]]
    right.append(nats.argmax() == question["answer"])
    right_norm.append((nats / sizes).argmax() == question["answer"])
  found = results["results"]["little_sums"]
  assert found["acc,none"] == pytest.approx(np.mean(right))
  assert found["acc_norm,none"] == pytest.approx(np.mean(right_norm))
  assert results["truncated"] == 0
  shown = capsys.readouterr().out
  assert f"little_sums  acc  {np.mean(right):.4f} +- " in shown
  assert "0 requests were longer" in shown


@pytest.mark.parametrize(
  "flags, message",
  [
    pytest.param(  # looks through the harness's own tasks
      ["--tasks=litle_sums"],
      "'litle_sums'. Did you mean little_sums?",
      marks=pytest.mark.slow,
    ),
    (["--tasks=little_sums", "--limit=0"], "--limit=0 must be positive"),
    (["--tasks=little_sums", "--output=/no/such/f.json"], "/no/such"),
    (["--tasks=little_sums", "--workdir=/no/such"], "no such workdir"),
  ],
)
def test_what_cannot_be_scored_is_named(workdir, tasks, capsys, flags, message):
  base = [f"--workdir={workdir}", f"--include_path={tasks}"]
  assert command.main([*base, *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and "Traceback" not in error


def test_a_tuned_model_is_asked_as_a_user(tasks, tmp_path, monkeypatch):
  monkeypatch.setattr(os, "fork", no_fork)
  generator = toy_generator.talker()
  data = config_lib.DataConfig(train="x.jsonl", format="chat")
  config = config_lib.Config(model=generator.config, data=data)
  load.save_params(tmp_path / "run", config, generator.params)
  output = tmp_path / "results.json"
  flags = (
    f"--workdir={tmp_path / 'run'}", "--tasks=little_sums",
    f"--include_path={tasks}", f"--output={output}", "--apply_chat_template",
    "--fewshot_as_multiturn", "--system_instruction=brief",
  )  # fmt: skip
  assert command.main(list(flags)) == 0
  right = []
  for question in QUESTIONS:
    prompt = b"\xf8brief\xf9" + question["question"].encode() + b"\xfa"
    scores = score.score(
      generator.config, generator.params, generator.splitter,
      [(prompt, c.encode() + b"\xfb") for c in question["choices"]],
    )  # fmt: skip
    right.append(np.argmax([one.nats for one in scores]) == question["answer"])
  results = json.loads(output.read_text())
  found = results["results"]["little_sums"]["acc,none"]
  assert found == pytest.approx(np.mean(right))


def test_a_model_of_text_is_not_asked_as_a_user(workdir, tasks, capsys):
  flags = (f"--workdir={workdir}", f"--include_path={tasks}")
  flags += ("--tasks=little_sums", "--apply_chat_template")
  assert command.main(list(flags)) == 2
  assert "tuned on conversations" in capsys.readouterr().err


# ----- the tasks shipped here ------------------------------------------------

with_data = pytest.mark.skipif(
  not all(folder.is_dir() for folder in DATA),
  reason="the benchmarks' data are not there",
)


def run(workdir, tmp_path, *flags) -> dict:
  output = tmp_path / "results.json"
  data_dir = ",".join(map(str, DATA))
  flags = (f"--workdir={workdir}", f"--data_dir={data_dir}", *flags)
  assert command.main([*flags, f"--output={output}"]) == 0
  return json.loads(output.read_text())


@with_data
def test_accuracy_of_a_public_task_is_what_ten_lines_compute(
  workdir, tmp_path, monkeypatch
):
  monkeypatch.setattr(os, "fork", no_fork)
  results = run(workdir, tmp_path, "--tasks=aunet_arc_easy", "--limit=16")
  with open(DATA[0] / "arc" / "arc_easy_test.jsonl") as file:
    rows = [json.loads(line) for line in file][:16]
  pairs, cut = [], 0
  for row in rows:
    text = f"{row['query']}\nAnswer:".encode()
    for answer in (f" {choice}".encode() for choice in row["choices"]):
      room = 127 - len(answer)  # of a row of 128, one is for BOS
      cut += len(text) > room
      pairs.append((text[-room:], answer))
  loaded = load.load(workdir)
  scores = score.score(
    loaded.model.config, loaded.params, loaded.splitter, pairs
  )
  right, right_norm, right_bytes = [], [], []
  for n, row in enumerate(rows):
    nats = np.array([one.nats for one in scores[4 * n : 4 * n + 4]])
    characters = [len(choice) for choice in row["choices"]]
    sizes = [len(choice.encode()) for choice in row["choices"]]
    right.append(nats.argmax() == row["gold"])
    right_norm.append((nats / characters).argmax() == row["gold"])
    right_bytes.append((nats / sizes).argmax() == row["gold"])
  found = results["results"]["aunet_arc_easy"]
  assert found["acc,none"] == np.mean(right) > 0
  assert found["acc_norm,none"] == np.mean(right_norm) > 0
  assert found["acc_bytes,none"] == np.mean(right_bytes)
  assert results["truncated"] == cut > 0


@with_data
def test_parts_of_a_group_and_patterns_are_tasks(workdir, tmp_path, capsys):
  tasks = "--tasks=aunet_blimp::adjunct_island,aunet_[lr][at][me]*"
  results = run(workdir, tmp_path, tasks, "--limit=2")
  found = results["results"]
  assert set(found) == {
    "aunet_blimp::adjunct_island", "aunet_lambada", "aunet_rte"
  }  # fmt: skip
  assert found["aunet_lambada"]["bits_per_byte,none"] > 0
  (context, sentence) = results["samples"]["aunet_blimp::adjunct_island"][0][
    "arguments"
  ][0]
  assert context == "" and sentence.startswith("Who should Derek hug ")
  shown = capsys.readouterr()
  assert "aunet_rte  acc  " in shown.out
  assert "Custom kwargs" not in shown.err


@pytest.fixture
def roomy(tmp_path):
  """A workdir whose rows hold any choice of the first questions."""
  model = toy_generator.make_config()
  byte, word = model.stages
  stages = (
    dataclasses.replace(byte, capacity=512),
    dataclasses.replace(word, capacity=256),
  )
  config = config_lib.Config(model=dataclasses.replace(model, stages=stages))
  params = toy_generator.make_params(config.model)
  load.save_params(tmp_path / "roomy", config, params)
  return tmp_path / "roomy"


@with_data
@pytest.mark.slow
def test_every_task_shipped_runs(roomy, tmp_path, capsys):
  assert command.main(["--tasks=list"]) == 0
  names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
  files = [path for path in command.TASKS.glob("*.yaml") if path.name[0] != "_"]
  assert len(names) == len(set(names)) == len(files)
  results = run(
    roomy, tmp_path, f"--tasks={','.join(names)}", "--limit=2", "--run_code"
  )
  for name in names:
    metrics = {
      key: value
      for key, value in results["results"][name].items()
      if "," in key and "_stderr" not in key
    }
    assert metrics and all(np.isfinite(list(metrics.values()))), name
  for name, samples in results["samples"].items():
    assert len(samples) == 2, name
  assert results["n-shot"]["aunet_cute::spell"] == 4
  ((prompt, _),) = results["samples"]["aunet_cute::spell"][0]["arguments"]
  assert prompt.count('Answer: "') == 5 and prompt.endswith('Answer: "')


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--tasks=aunet_lambda"], "'aunet_lambda'. Did you mean aunet_lambada?"),
    (["--tasks=aunet_cutes::spell"], "Did you mean aunet_cute"),
    (["--tasks=,"], "--tasks names no task"),
    (["--tasks=aunet_sst2"], "glue/sst2_val.jsonl: say below which folder"),
    (["--tasks=aunet_cute::spel"], "cute/spell.tsv: say below which folder"),
    (["--tasks=aunet_sst2", "--data_dir=."], "--data_dir=. holds no glue/sst2"),
    (["--tasks=aunet_sst2", "--data_dir=/no/such"], "=/no/such: there is no"),
    (["--tasks=x", "--include_path=/no/such"], "=/no/such: there is no"),
    (["--tasks=aunet_sst2", "--workdir="], "/sst2_val.jsonl: say"),
  ],
)
def test_tasks_and_data_that_are_not_there_are_named(
  workdir, tmp_path, capsys, flags, message
):
  output = tmp_path / "results.json"
  flags = [f"--workdir={workdir}", f"--output={output}", *flags]
  assert command.main(flags) == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert error.startswith("error: ") and message in error
  assert not output.exists()


@with_data
@pytest.mark.parametrize(
  "task, message",
  [
    ("aunet_humaneval", "allow it with --run_code"),
    ("aunet_cute::spel", "aunet_cute has no task 'spel'. Did you mean "),
  ],
)
def test_what_a_task_may_not_do_is_named(workdir, capsys, task, message):
  flags = [f"--workdir={workdir}", f"--tasks={task}", f"--data_dir={DATA[0]}"]
  assert command.main(flags) == 2
  assert message in capsys.readouterr().err


def test_a_task_of_ones_own_goes_before_ours(tasks, workdir, tmp_path):
  text = (tasks / "sums.yaml").read_text()
  (tasks / "sums.yaml").write_text(text.replace("little_sums", "aunet_sst2"))
  output = tmp_path / "results.json"
  assert command.main([
    f"--workdir={workdir}", "--tasks=aunet_sst2", f"--include_path={tasks}",
    f"--output={output}",
  ]) == 0  # fmt: skip
  samples = json.loads(output.read_text())["samples"]["aunet_sst2"]
  assert [one["doc"] for one in samples] == QUESTIONS
