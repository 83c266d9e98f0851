"""The web page: requests over a socket, and once in a real browser."""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest

from aunet_jax.aunet import network, sharding
from aunet_jax.config import ModelConfig, StageConfig
from aunet_jax.generate.generator import Generator
from aunet_jax.generate.server import characters, make_server
from aunet_jax.splitting.splitter import Splitter


@functools.cache
def generator():
  stages = (
    StageConfig(dim=32, num_layers=1, head_dim=16, window=16, capacity=128),
    StageConfig(
      dim=32, num_layers=1, head_dim=16, window=8, capacity=64, rule="word@1"
    ),
  )
  config = ModelConfig(stages=stages, dtype="float32")
  rng = np.random.default_rng(0)
  boxed = jax.eval_shape(lambda: network.init_params(config, jax.random.key(0)))
  params = jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32),
    sharding.unbox(boxed),
  )
  return Generator(config, params, Splitter(config.rules))


@pytest.fixture
def url():
  with make_server(generator(), 0) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def post(url, body):
  with urllib.request.urlopen(url + "/generate", data=body) as answer:
    return [json.loads(line) for line in answer]


def test_text_streams_and_ends_with_its_characters(url):
  request = {"prompt": "the é", "max_bytes": 40, "seed": 2}
  *pieces, last = post(url, json.dumps(request).encode())
  assert len(pieces) > 1
  given = [c["text"] for c in last["characters"] if c["given"]]
  assert given == list("the é")
  written = "".join(c["text"] for c in last["characters"] if not c["given"])
  assert written.replace("\ufffd", "") == "".join(
    piece["text"] for piece in pieces
  ).replace("\ufffd", "")
  (expected,) = generator().generate(
    [request["prompt"].encode()], **{"max_bytes": 40, "seed": 2}
  )
  bits = sum(c["bits"] for c in last["characters"] if not c["given"])
  assert bits == pytest.approx(-expected.logprobs.sum() / np.log(2), rel=1e-4)
  levels = Splitter(["word@1"]).levels("the é".encode())
  assert last["characters"][3]["level"] == levels[3]


def test_characters_keep_every_byte():
  data = "aé".encode() + b"\xff" + "中".encode()[:2] + "\ufffd".encode() + b"z"
  ones = -np.log(2) * np.ones(len(data), np.float32)
  levels = np.arange(len(data), dtype=np.int8)
  result = characters(data, ones, levels, given=True)
  assert [c["text"] for c in result] == [*"aé", *["\ufffd"] * 4, "z"]
  assert sum(c["bits"] for c in result) == pytest.approx(len(data))
  assert [c["level"] for c in result] == [0, 2, 3, 4, 5, 8, 9]


@pytest.mark.parametrize(
  "body, message",
  [
    (b"{", "not JSON"),
    (b"[1]", "JSON object"),
    (b'{"promt": "x"}', "promt"),
    (b'{"prompt": 3}', "prompt=3"),
    (b'{"top_p": 7}', "top_p=7"),
    (b'{"max_bytes": 0}', "max_bytes=0"),
  ],
)
def test_bad_requests_are_answered_with_the_reason(url, body, message):
  (answer,) = post(url, body)
  assert message in answer["error"]


def test_other_paths_do_not_exist(url):
  with pytest.raises(urllib.error.HTTPError, match="404"):
    urllib.request.urlopen(url + "/etc/passwd")
  with urllib.request.urlopen(url + "/model") as answer:
    assert json.load(answer) == {"stages": 2, "rules": ["word@1"]}


class Browser:
  """A headless chromium, driven over its debugging pipe."""

  def __init__(self, path, profile):
    to_browser, self._commands = os.pipe()
    self._answers, from_browser = os.pipe()

    # Chromium reads descriptor 3 and writes 4: a Python in between puts the
    # pipes there. Copied high first, for they may lie at 3 and 4 the other way.
    place_pipes = (
      "import os, sys\n"
      "read, write, *command = sys.argv[1:]\n"
      "os.dup2(int(read), 103), os.dup2(int(write), 104)\n"
      "os.dup2(103, 3), os.dup2(104, 4)\n"
      "os.execv(command[0], command)\n"
    )
    self._process = subprocess.Popen(
      [
        sys.executable,
        "-c",
        place_pipes,
        str(to_browser),
        str(from_browser),
        path,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
      ],
      pass_fds=(to_browser, from_browser),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    self._buffer, self._number, self._session = b"", 0, None

  def call(self, method, **params):
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._commands, json.dumps(message).encode() + b"\0")
    while True:
      while b"\0" not in self._buffer:
        piece = os.read(self._answers, 1 << 16)
        assert piece, "the browser ended"
        self._buffer += piece
      line, self._buffer = self._buffer.split(b"\0", 1)
      answer = json.loads(line)
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]

  def open(self, url):
    target = self.call("Target.createTarget", url=url)["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]

  def evaluate(self, script):
    result = self.call("Runtime.evaluate", expression=script)["result"]
    return result.get("value")

  def wait_for(self, script, seconds=60):
    end = time.monotonic() + seconds
    while not self.evaluate(script):
      assert time.monotonic() < end, f"never true: {script}"
      time.sleep(0.05)

  def close(self):
    self._session = None
    self.call("Browser.close")
    os.close(self._commands)
    os.close(self._answers)
    self._process.wait()


@pytest.fixture
def browser(tmp_path):
  path = shutil.which("chromium") or shutil.which("google-chrome")
  if path is None:
    pytest.skip("no chromium here; Debian's package is called chromium")
  browser = Browser(path, tmp_path)
  yield browser
  browser.close()


def test_the_page_works_in_a_browser(url, browser):
  browser.open(f"{url}/?prompt=one%20two&max_bytes=30")
  browser.wait_for("document.readyState === 'complete'")
  browser.wait_for("document.getElementById('note').textContent !== ''")
  note = browser.evaluate("document.getElementById('note').textContent")
  assert "2 stages" in note and "word@1 (stage 2)" in note
  browser.evaluate("document.querySelector('button').click()")
  browser.wait_for("document.body.dataset.done")
  spans = "[...document.querySelectorAll('#out span')]"
  given = browser.evaluate(
    f"{spans}.filter(s => s.matches('.given')).map(s => s.textContent).join('')"
  )
  assert given == "one two"
  assert browser.evaluate(f"{spans}.length") >= len("one two") + 5
  # The space ends a word: it has a bar, and every character has its heat.
  levels = Splitter(["word@1"]).levels(b"one two")
  shown = browser.evaluate(f"{spans}.slice(0, 7).map(s => s.classList[0])+''")
  assert shown == ",".join(f"l{level}" for level in levels)
  heats = browser.evaluate(
    f"new Set({spans}.map(s => s.style.backgroundColor)).size"
  )
  assert heats > 5
  # A request that cannot be met is shown, not lost.
  browser.evaluate("document.getElementById('top_p').value = 3")
  browser.evaluate("document.querySelector('button').click()")
  browser.wait_for("document.getElementById('error').textContent !== ''")
  error = browser.evaluate("document.getElementById('error').textContent")
  assert "top_p=3" in error
