"""The server: requests over a socket, good and bad, and a real browser."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aunet_jax.data import roles
from aunet_jax.generate import chat
from aunet_jax.generate.sampling import Sampling
from aunet_jax.generate.server import MAX_REQUEST, make_server
from aunet_jax.splitting.splitter import Splitter
from tests import toy_tokens
from tests.toy_generator import generator, talker


@contextlib.contextmanager
def running(model=generator, **changes):
  with make_server(model(), 0, ["proxy.example"]) as server:
    for name, value in changes.items():
      setattr(server, name, value)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


@pytest.fixture(scope="module")
def server():
  with running() as server:
    yield server


@pytest.fixture
def url(server):
  return f"http://127.0.0.1:{server.server_port}"


def post(url, body):
  with urllib.request.urlopen(url + "/generate", data=body) as answer:
    return [json.loads(line) for line in answer]


def refused(url, body):
  with pytest.raises(urllib.error.HTTPError) as caught:
    post(url, body)
  assert caught.value.code == 400
  return json.loads(caught.value.read())["error"]


def exchange(server, request, end=True):
  """Sends bytes as they are; returns all that comes back."""
  address = ("127.0.0.1", server.server_port)
  with socket.create_connection(address, timeout=30) as connection:
    with contextlib.suppress(ConnectionError):
      connection.sendall(request)
      if end:
        connection.shutdown(socket.SHUT_WR)
    answer = b""
    with contextlib.suppress(ConnectionError):
      while piece := connection.recv(1 << 16):
        answer += piece
  return answer


def check_refusal(answer, statuses=range(400, 500)):
  """One line of JSON that says what is wrong, under a status of 4xx."""
  head, _, body = answer.partition(b"\r\n\r\n")
  status = int(re.match(rb"HTTP/1.0 (\d+) ", head)[1])
  assert status in statuses, answer
  assert body.endswith(b"\n") and body.count(b"\n") == 1
  error = json.loads(body)["error"]
  assert "Traceback" not in str(error) and len(str(error)) < 600
  return error


def test_a_model_of_tokens_is_served_in_bytes():
  writer = toy_tokens.generator()
  with running(lambda: writer) as server:
    url = f"http://127.0.0.1:{server.server_port}"
    request = {"prompt": "the cat", "max_bytes": 20, "seed": 2}
    *pieces, last = post(url, json.dumps(request).encode())
    body = json.dumps({"prompt": "the", "logprobs": 1}).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
      urllib.request.urlopen(url + "/v1/completions", data=body)
    assert "top_logprobs is of bytes" in caught.value.read().decode()
  (one,) = writer.generate([b"the cat"], max_bytes=20, seed=2)
  assert "".join(piece["text"] for piece in pieces) == one.text
  bits = sum(c["bits"] for c in last["characters"])
  nats = one.logprobs.sum() + one.prompt_logprobs.sum()
  assert bits == pytest.approx(-nats / np.log(2), rel=1e-4)


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


def test_utf8_and_stop_strings_are_the_generators(url):
  prompt = "é".encode()[:1] + b"x"  # as a byte that is no UTF-8
  request = {"prompt": "\udcc3x", "max_bytes": 30, "utf8": True, "seed": 5}
  *pieces, last = post(url, json.dumps(request).encode())
  text = "".join(piece["text"] for piece in pieces)
  assert "\ufffd" not in text and last["reason"] == "length"
  stop = [text[9], text[9:11], "never"]
  *pieces, last = post(url, json.dumps(request | {"stop": stop}).encode())
  assert last["reason"] == "stop"
  shown = "".join(piece["text"] for piece in pieces)
  assert shown == text[: min(text.index(s) for s in stop[:2])]
  assert prompt[:1] == b"\xc3"


# ----- requests that cannot be met ------------------------------------------


@pytest.mark.parametrize(
  "body, message",
  [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff{}", "not JSON"),
    (b"[" * 100_000, "nests too deep"),
    (b'{"stop": ' * 50_000, "nests too deep"),
    (b"1" * 5000, "not JSON"),
    (b"[1]", "JSON object"),
    (b"null", "JSON object"),
    (b'{"promt": "x"}', "promt"),
    (b'{"' + b"x" * 10_000 + b'": 1}', "xxx"),
    (b'{"prompt": 3}', "prompt must be of type str, not int"),
    (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
    (b'{"stop": "x"}', "stop must be of type list"),
    (b'{"stop": [1]}', "stop must be text"),
    (b'{"stop": [""]}', "stop string is empty"),
    (b'{"stop": ["\\udbff"]}', "half a surrogate pair"),
    (b'{"utf8": 1}', "utf8 must be of type bool"),
    (b'{"top_p": 7}', "top_p=7"),
    (b'{"top_p": NaN}', "top_p=nan"),
    (b'{"top_p": [0.5]}', "top_p must be of type float, not list"),
    (b'{"top_k": true}', "top_k must be of type int, not bool"),
    (b'{"top_k": 5.0}', "top_k must be of type int, not float"),
    (b'{"top_k": -1}', "top_k=-1"),
    (b'{"temperature": 1' + b"0" * 400 + b"}", "temperature=inf"),
    (b'{"temperature": 1e400}', "temperature=inf"),
    (b'{"temperature": -Infinity}', "temperature=-inf"),
    (b'{"min_p": -1' + b"0" * 4000 + b"}", "min_p=-inf"),
    (b'{"no_repeat": 1000000000000}', "no_repeat=1000000000000"),
    (b'{"seed": -1}', "seed=-1"),
    (b'{"seed": 1000000000000}', "seed=1000000000000"),
    (b'{"max_bytes": 0}', "max_bytes=0"),
    (b'{"max_bytes": 1000000000000}', "max_bytes=1000000000000"),
    (b'{"max_bytes": "5"}', "max_bytes must be of type int, not str"),
    (b'{"max_bytes": 1, "prompt": "\\udce4", "utf8": true}', "max_bytes=1"),
  ],
)
def test_bad_requests_are_answered_with_the_reason(url, body, message):
  assert message in refused(url, body)


def test_large_numbers_that_mean_something_are_taken(url):
  body = b'{"top_k": 1000000000000, "max_bytes": 3, "min_p": 1e-400}'
  assert post(url, body)[-1]["reason"] == "length"


LOCAL = b"Host: localhost\r\n"


@pytest.mark.parametrize(
  "request_bytes, status",
  [
    (b"\r\n", 400),
    (b"\0\xff\xfe\r\n\r\n", 400),
    (b"GET\r\n\r\n", 400),
    (b"GET /\r\n\r\n", 400),  # no host
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n" + 2 * LOCAL + b"\r\n", 400),
    (b"GET / HTTP/7.0\r\n" + LOCAL + b"\r\n", 400),
    (b"GET /x HTTP/0.9\r\n" + LOCAL + b"\r\n", 404),
    (b"GET / HTTP/1.1\rHTTP/0.9\r\n" + LOCAL + b"\r\n", 400),
    (b"GET / FTP/1.0\r\n" + LOCAL + b"\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    (b"GET / HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n", 403),
    (b"GET / HTTP/1.1\r\nHost: evil@localhost\r\n\r\n", 403),
    (b"GET / HTTP/1.1\r\nHost: localhost:80:80\r\n\r\n", 403),
    (b"GET / HTTP/1.1\r\nHost: [::2]\r\n\r\n", 403),
    (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 403),
    (b"GET /model HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    (b"GET /etc/passwd HTTP/1.1\r\n" + LOCAL + b"\r\n", 404),
    (b"GET /page.html HTTP/1.1\r\n" + LOCAL + b"\r\n", 404),
    (b"POST / HTTP/1.1\r\n" + LOCAL + b"Content-Length: 0\r\n\r\n", 404),
    (b"HEAD / HTTP/1.1\r\n" + LOCAL + b"\r\n", 405),
    (b"OPTIONS /generate HTTP/1.1\r\n" + LOCAL + b"\r\n", 405),
    (b"\xc3\xa9 / HTTP/1.1\r\n" + LOCAL + b"\r\n", 405),
    (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
  ],
)
def test_what_is_no_request_is_refused(server, request_bytes, status):
  check_refusal(exchange(server, request_bytes), [status])


@pytest.mark.parametrize(
  "headers, status",
  [
    (b"", 411),
    (b"Content-Length: abc\r\n", 400),
    (b"Content-Length: -1\r\n", 400),
    (b"Content-Length: +2\r\n", 400),
    (b"Content-Length: 0x2\r\n", 400),
    (b"Content-Length: 2_0\r\n", 400),
    (b"Content-Length: 2.0\r\n", 400),
    (b"Content-Length: \xd9\xa2\r\n", 400),  # a digit, but of another script
    (b"Content-Length: \xb2\r\n", 400),
    (b"Content-Length:\r\n", 400),
    (b"Content-Length: " + b"9" * 5000 + b"\r\n", 400),
    (b"Content-Length: 2\r\nContent-Length: 3\r\n", 411),
    (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", 411),
    (b"Transfer-Encoding: chunked\r\n", 411),
    (b"Content-Length: %d\r\n" % (MAX_REQUEST + 1), 413),
    (b"Content-Length: 99999999999999999999\r\n", 413),
    (b"Content-Length: 3\r\n", 408),
    (b"Content-Length: 2\r\nOrigin: http://evil.example\r\n", 403),
    (b"Content-Length: 2\r\nOrigin: null\r\n", 403),
    (b"Content-Length: 2\r\nOrigin: http://localhost:1\r\n", 403),
    (b"Content-Length: 2\r\nOrigin: http://localhost.evil\r\n", 403),
  ],
)
@pytest.mark.parametrize("path", [b"/generate", b"/v1/completions"])
def test_what_is_no_body_is_refused(server, headers, status, path):
  request = b"POST %s HTTP/1.1\r\n%s%s\r\n{}" % (path, LOCAL, headers)
  error = check_refusal(exchange(server, request), [status])
  if path == b"/v1/completions":
    assert error["type"] == "invalid_request_error"


def test_a_body_over_the_limit_is_answered_and_never_held(server):
  # All of it is sent before the answer is read.
  size = 64 << 20
  head = b"POST /generate HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n"
  request = head % (LOCAL, size) + bytes(size)
  check_refusal(exchange(server, request), [413])


def test_this_machine_is_known_by_its_names(server):
  for host in (
    b"localhost",
    b"LOCALHOST:9000",  # a tunnel from another port
    b"127.0.0.1:80",
    b"[::1]:8000",
    b"proxy.example",
  ):
    for origin in (
      b"",
      b"Origin: http://%s\r\n" % host.lower(),
      b"Origin: https://proxy.example:99\r\n",
    ):
      request = b"GET /model HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (host, origin)
      assert exchange(server, request).startswith(b"HTTP/1.0 200 ")


GOOD = (
  b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 38\r\n\r\n"
  b'{"prompt": "ab", "max_bytes": 4}      '
)


@given(
  at=st.integers(0, len(GOOD)),
  size=st.integers(0, 12),
  new=st.binary(max_size=8)
  | st.text('0123456789-"{}[],:\r\n eE/.x', max_size=8).map(str.encode),
  path=st.sampled_from([b"/generate", b"/v1/completions"]),
)
@settings(
  max_examples=150,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_damaged_request_is_met_or_refused(server, at, size, new, path):
  request = (GOOD[:at] + new + GOOD[at + size :]).replace(b"/generate", path)
  request = (
    request.replace(b"max_bytes", b"max_tokens", 1)
    if b"v1" in path
    else request
  )
  answer = exchange(server, request)
  if not answer.startswith(b"HTTP/1.0 200 "):
    check_refusal(answer)
  else:
    assert answer.partition(b"\r\n\r\n")[2].strip()


@pytest.mark.parametrize(
  "request_bytes",
  [
    b"",
    b"GE",
    b"GET / HTTP/1.1\r\nHost: loc",
    b"POST /generate HTTP/1.1\r\n" + LOCAL + b"Content-Length: 50\r\n\r\n{",
  ],
)
def test_a_half_sent_request_holds_no_thread(request_bytes):
  with running(read_seconds=0.2) as server:
    before = threading.active_count()
    answer = exchange(server, request_bytes, end=False)
    if request_bytes:
      check_refusal(answer)
    end = time.monotonic() + 20
    while threading.active_count() > before:
      assert time.monotonic() < end
      time.sleep(0.01)


def test_a_sender_of_single_bytes_is_cut_off_too():
  with running(read_seconds=0.3) as server:
    address = ("127.0.0.1", server.server_port)
    with socket.create_connection(address, timeout=0.01) as connection:
      with contextlib.suppress(ConnectionError):
        for _ in range(3000):  # half a minute, if nobody minded
          connection.sendall(b"x")
          with contextlib.suppress(TimeoutError):
            assert connection.recv(1) in (b"", b"H")  # an answer has begun
            break
        else:
          raise AssertionError("never cut off")


def test_a_defect_is_answered_and_reported(capsys):
  class Broken:
    def generate(self, *arguments, **options):
      raise RuntimeError("a defect")

  with running(generator=Broken()) as server:
    check_refusal(exchange(server, GOOD), [500])
    reported, end = "", time.monotonic() + 20
    while "RuntimeError: a defect" not in reported:
      assert time.monotonic() < end
      time.sleep(0.01)
      reported += capsys.readouterr().err


@pytest.mark.parametrize("port", [-1, 65536, 10**12])
def test_a_port_that_is_none_is_refused(port):
  with pytest.raises(ValueError, match=f"port={port}"):
    make_server(generator(), port)


def test_the_page_and_the_model_are_there(url):
  with urllib.request.urlopen(url + "/model") as answer:
    assert json.load(answer) == {
      "stages": 2, "rules": ["word@1"], "chat": False
    }  # fmt: skip
  with urllib.request.urlopen(url + "/?prompt=x") as answer:
    assert b"<!doctype html>" in answer.read()


# ----- a browser ------------------------------------------------------------


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
  # Settings of the form reach the request.
  browser.evaluate(
    "document.getElementById('utf8').checked = true;"
    "delete document.body.dataset.done;"
    "document.querySelector('button').click()"
  )
  browser.wait_for("document.body.dataset.done")
  text = browser.evaluate(f"{spans}.map(s => s.textContent).join('')")
  assert "\ufffd" not in text and text.startswith("one two")
  # A request that cannot be met is shown, not lost.
  browser.evaluate("document.getElementById('top_p').value = 3")
  browser.evaluate("document.querySelector('button').click()")
  browser.wait_for("document.getElementById('error').textContent !== ''")
  error = browser.evaluate("document.getElementById('error').textContent")
  assert "top_p=3" in error


def test_the_page_is_a_conversation_with_a_tuned_model(browser):
  with running(talker) as server:
    browser.open(f"http://127.0.0.1:{server.server_port}/?max_bytes=12&seed=3")
    browser.wait_for("document.readyState === 'complete'")
    browser.wait_for("document.getElementById('note').textContent !== ''")
    for number, text in enumerate(("one two", "three"), start=1):
      browser.evaluate(
        f"delete document.body.dataset.done;"
        f"document.getElementById('prompt').value = {text!r};"
        f"document.querySelector('button').click()"
      )
      browser.wait_for("document.body.dataset.done")
      count = "document.querySelectorAll('#talk p').length"
      assert browser.evaluate(count) == 2 * number
    shown = browser.evaluate(
      "[...document.querySelectorAll('#talk p')].map(p => p.textContent)"
      ".join('\\0')"
    ).split("\0")
    turns = []
    for n, role in enumerate(["user", "assistant"] * 2):
      if role == "user":
        turns.append(roles.turn_of(role, shown[n]))
        prompt = chat.prompt_of(talker(), turns, 12)
      else:
        (one,) = talker().generate(
          [prompt], max_bytes=12, seed=3, stop=chat.STOPS,
          settings=Sampling(temperature=0.8),
        )  # fmt: skip
        assert shown[n] == one.text
        turns.append(chat.answered(one))
