"""The command `generate`: what it prints and how it ends."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from aunet_jax.config import Config, DataConfig
from aunet_jax.data import roles
from aunet_jax.generate import __main__ as generate_main
from aunet_jax.generate import chat
from aunet_jax.workdir import load
from tests.toy_generator import make_config, make_params, talker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("model")
  config = make_config()
  params = jax.tree.map(jnp.asarray, make_params(config))
  load.save_params(path, Config(model=config), params)
  return path


def command(*arguments, stdin=""):
  """(exit status, stdout, stderr) of `main`, in this process."""
  out, err = io.StringIO(), io.StringIO()
  old, sys.stdin = sys.stdin, io.StringIO(stdin)
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      status = generate_main.main([str(argument) for argument in arguments])
  finally:
    sys.stdin = old
  return status, out.getvalue(), err.getvalue()


def test_the_command_prints_the_prompt_and_its_continuation(workdir):
  flags = ("--prompt=ab c", "--max_bytes=24", "--temperature=0.7", "--seed=3")
  status, text, _ = command(f"--workdir={workdir}", *flags)
  assert status == 0 and text.startswith("ab c") and len(text) > 10
  status, again, _ = command("--workdir", workdir, *flags, "--top_p", "1")
  assert again == text
  status, line, _ = command(f"--workdir={workdir}", *flags, "--json")
  record = json.loads(line)
  assert "ab c" + record["text"] + "\n" == text
  assert len(record["bytes"]) == len(record["logprobs"]) == 24


def test_an_empty_prompt_is_refused_and_none_starts_a_document(workdir):
  status, _, error = command(f"--workdir={workdir}", "--prompt=")
  assert status == 2 and error.startswith("error: --prompt is empty")
  status, text, _ = command(f"--workdir={workdir}", "--max_bytes=8")
  assert status == 0 and text.strip()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_text_that_is_no_utf8_goes_in_and_comes_out(
  workdir, encoding, monkeypatch
):
  cut = "né中".encode()[:-1]  # ends inside a character
  typed = io.TextIOWrapper(io.BytesIO(b"a\xff" + cut + b"\n"), "utf-8")
  monkeypatch.setattr(sys, "stdin", typed)
  begins = ("a\ufffdné", "> ")
  for flags, begin in zip(
    (
      (b"--prompt=a\xff" + cut, b"--stop=\xad", b"--stop=\xe4\xb8"),
      (b"--interactive",),
    ),
    begins,
    strict=True,
  ):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding))
    arguments = [os.fsdecode(flag) for flag in flags]
    status = generate_main.main(
      [f"--workdir={workdir}", "--max_bytes=8", *arguments]
    )
    text = screen.getvalue()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdin", typed)
    assert status == 0 and b"error" not in text and b"udc" not in text
    assert begin.encode(encoding, "backslashreplace") in text


def test_an_open_character_of_the_prompt_is_completed(workdir):
  flags = ("--max_bytes=30", "--utf8", "--json")
  prompt = os.fsdecode("né中".encode()[:-1])
  status, line, _ = command(
    f"--workdir={workdir}", f"--prompt={prompt}", *flags
  )
  record = json.loads(line)
  assert status == 0 and record["prompt"] == "né"
  data = bytes(record["prompt_bytes"] + record["bytes"])
  assert data.decode() == record["prompt"] + record["text"]
  status, text, _ = command(
    f"--workdir={workdir}", f"--prompt={prompt}", *flags[:2]
  )
  assert text == data.decode() + "\n"


def test_stop_strings_end_the_text(workdir):
  flags = (f"--workdir={workdir}", "--prompt=ab c", "--max_bytes=24", "--json")
  _, line, _ = command(*flags)
  free = bytes(json.loads(line)["bytes"])
  # Not UTF-8, as a shell hands it over.
  stop = os.fsdecode(free[10:12])
  _, line, _ = command(*flags, f"--stop={stop}", "--stop=never this")
  record = json.loads(line)
  assert record["reason"] == "stop"
  assert bytes(record["bytes"]) == free[: free.index(free[10:12])]


def test_interactive_goes_on_until_the_input_ends(workdir):
  status, text, _ = command(
    f"--workdir={workdir}",
    "--max_bytes=8",
    "--interactive",
    stdin="first\n\nsecond\n",
  )
  assert status == 0
  assert text.count("> ") >= 4 and "(new document)" in text


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--temperature=-1",), "temperature=-1"),
    (("--top_p=2",), "top_p=2"),
    (("--max_bytes=0",), "max_bytes=0"),
    (("--max_bytes=1000000000000",), "max_bytes=1000000000000"),
    (("--stop=",), "a stop string is empty"),
    (("--top_k=0",), "top_k=0"),
    (("--seed=-1",), "seed=-1"),
    (("--samples=0",), "num_samples=0"),
  ],
)
def test_bad_flags_are_errors_without_a_traceback(workdir, flags, message):
  status, _, error = command(f"--workdir={workdir}", "--prompt=x", *flags)
  assert status == 2 and message in error and "Traceback" not in error


def test_a_workdir_without_a_model_is_an_error(tmp_path):
  for path in (tmp_path, tmp_path / "nowhere"):
    status, _, error = command(f"--workdir={path}", "--prompt=x")
    assert status == 2 and str(path) in error


@pytest.mark.slow
def test_ctrl_c_ends_the_command_cleanly(workdir):
  process = subprocess.Popen(
    [sys.executable, "-m", "aunet_jax.generate", f"--workdir={workdir}"]
    + ["--prompt=abc ", "--max_bytes=100000000"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert process.stdout.read(40)  # it writes
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 130
  assert b"Traceback" not in err


# ----- conversations ----------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  path = tmp_path_factory.mktemp("tuned")
  config = make_config()
  params = jax.tree.map(jnp.asarray, make_params(config))
  data = DataConfig(train="x.jsonl", format="chat")
  load.save_params(path, Config(model=config, data=data), params)
  return path


def test_a_conversation_goes_on_until_it_is_forgotten(tuned):
  flags = (f"--workdir={tuned}", "--chat", "--max_bytes=12", "--system=be it")
  status, text, _ = command(*flags, stdin="one\ntwo\n\none\n")
  assert status == 0 and "(new conversation)" in text
  turns, expected = [roles.turn_of("system", "be it")], []
  for line in ("one", "two"):
    turns.append(roles.turn_of("user", line))
    (answer,) = talker().generate(
      [chat.prompt_of(talker(), turns, 12)],
      max_bytes=12,
      stop=chat.STOPS,
      settings=generate_main.Sampling(temperature=0.8),
    )
    turns.append(chat.answered(answer))
    expected.append(answer.text)
  said = text.split("> ")
  assert [said[1].rstrip("\n"), said[2].rstrip("\n")] == expected
  assert said[4].rstrip("\n") == expected[0]


def test_a_conversation_with_no_terminal_is_one_answer(tuned):
  flags = (f"--workdir={tuned}", "--chat", "--max_bytes=12", "--seed=2")
  status, text, _ = command(*flags, "--prompt=one")
  assert status == 0 and text and "> " not in text


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--chat", "--utf8"), "--utf8 and --chat"),
    (("--chat", "--json"), "--json and --chat"),
    (("--chat", "--samples=2"), "--samples and --chat"),
    (("--system=x",), "--system is for --chat"),
    (("--chat", "--prompt=x"), "not tuned on conversations"),
  ],
)
def test_what_does_not_go_with_a_conversation_is_said(workdir, flags, message):
  status, out, error = command(f"--workdir={workdir}", *flags)
  assert status == 2 and message in error and error.count("\n") == 1
