"""python -m aunet_jax.lm_eval on a task of one's own, without a network."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from aunet_jax import config as config_lib  # noqa: E402
from aunet_jax import lm_eval as command  # noqa: E402
from aunet_jax.evaluate import score  # noqa: E402
from aunet_jax.workdir import load  # noqa: E402
from tests import toy_generator  # noqa: E402

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
    (["--tasks=litle_sums"], "'litle_sums'. Did you mean little_sums?"),
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
