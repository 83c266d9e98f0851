"""A small HTTP server that writes with a model, for one machine's own use.

  GET  /                the page; ?prompt=TEXT&run=1 starts at once
  GET  /model           JSON: number of stages and their rules
  POST /generate        JSON as `protocol.parse_request` reads it; answers JSON
                        lines: {"text": …} as it comes, then
                        {"characters": […], "reason": …}
  GET  /v1/models       the one model, as OpenAI's clients ask for it
  POST /v1/completions  OpenAI-compatible, see `completions`
  POST /v1/chat/completions  of a model tuned on conversations

It listens on 127.0.0.1 and answers one request at a time. Pages of other sites
are kept out: a request must name this machine as its host, since a foreign name
may have been pointed here, and a page that sends one must come from here. A bad
request is answered by a 4xx and one line of JSON; one that does not come to its
end within `READ_SECONDS` is cut off. Standard library only.
"""

import contextlib
import importlib.resources
import json
import re
import socket
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from aunet_jax.generate import chat_completions, completions, protocol
from aunet_jax.generate.generator import Generator

MAX_REQUEST = 1 << 20  # bytes of a request's body
READ_SECONDS = 20  # for all of a request to arrive
WRITE_SECONDS = 60  # for a reader to take some of an answer
HOSTS = ("127.0.0.1", "localhost", "[::1]")
_MAX_MESSAGE = 500  # characters of an error


class Refusal(Exception):
  """A request that is answered by an error."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Server(ThreadingHTTPServer):
  """Holds what requests share."""

  request_queue_size = 64

  def __init__(self, generator: Generator, port: int, hosts: Iterable[str]):
    self.generator = generator
    self.proxies = {host.lower() for host in hosts}
    self.hosts = self.proxies.union(HOSTS)
    self.busy = threading.Lock()  # one request at a time has the model
    self.read_seconds = READ_SECONDS
    files = importlib.resources.files("aunet_jax.generate")
    self.page = files.joinpath("page.html").read_bytes()
    super().__init__(("127.0.0.1", port), _Handler)


def make_server(
  generator: Generator, port: int, hosts: Iterable[str] = ()
) -> Server:
  """A server on 127.0.0.1; port 0 picks a free one.

  Args: hosts: names under which it is reached too, through a proxy.
  Raises: ValueError for a port that is none, OSError for one that is taken.
  """
  if not 0 <= port < 2**16:
    raise ValueError(f"port={port} must be between 0 and {2**16 - 1}.")
  return Server(generator, port, hosts)


def _name(host: str) -> str | None:
  """The name in `name:port`, in small letters; None where it is neither."""
  parts = r"(\[[0-9a-f:.]+\]|[^\[\]:@/\s]+)(:\d{1,5})?"
  match = re.fullmatch(parts, host.lower())
  return match and match[1]


class _Handler(BaseHTTPRequestHandler):
  server: Server
  timeout = WRITE_SECONDS
  default_request_version = "HTTP/1.0"

  # ----- a connection -------------------------------------------------------

  def setup(self):
    super().setup()
    self._begun = False  # an answer is under way
    # A sender of one byte now and then would hold the thread for ever.
    self._deadline = threading.Timer(
      self.server.read_seconds, self._stop_reading
    )
    self._deadline.daemon = True
    self._deadline.start()

  def _stop_reading(self):
    with contextlib.suppress(OSError):
      self.connection.shutdown(socket.SHUT_RD)

  def handle(self):
    try:
      # The reader left, or takes nothing.
      with contextlib.suppress(ConnectionError, TimeoutError):
        super().handle()
    finally:
      self._deadline.cancel()

  def log_request(self, code="-", size="-"):
    pass

  def log_message(self, format, *args):
    pass

  def parse_request(self):
    self.request_version = self.default_request_version
    if not self.raw_requestline.strip():
      self.send_error(400, "the request is empty.")
      return False
    return super().parse_request()

  # ----- requests -----------------------------------------------------------

  def do_GET(self):
    path = self.path.split("?")[0]
    with self._refusing():
      self._check_sender()
      if path == "/":
        self._reply(200, "text/html; charset=utf-8", self.server.page)
      elif path == "/model":
        config = self.server.generator.config
        self._reply_json(
          200,
          {
            "stages": config.num_stages,
            "rules": list(config.rules),
            "chat": self.server.generator.splitter.has_roles,
          },
        )
      elif path == "/v1/models":
        self._reply_json(200, completions.models())
      else:
        raise Refusal(404, "no such page.")

  def do_POST(self):
    answers = {
      "/generate": self._generate,
      "/v1/completions": self._complete,
      "/v1/chat/completions": self._chat,
    }
    with self._refusing():
      self._check_sender()
      answer = answers.get(self.path.split("?")[0])
      if answer is None:
        raise Refusal(404, "no such page.")
      answer(self._read_body())

  def _check_sender(self):
    """Raises: Refusal unless this machine is meant, by a page of its own."""
    hosts = self.headers.get_all("Host", [])
    if len(hosts) != 1:
      raise Refusal(400, "a request has one Host header.")
    (host,) = hosts
    if _name(host) not in self.server.hosts:
      raise Refusal(
        403,
        f"the host {host!r} is not this machine; if it is a proxy of yours, "
        f"start the server with --host=NAME.",
      )
    for origin in self.headers.get_all("Origin", []):
      _, _, site = origin.partition("://")
      same = site.lower() == host.lower()
      if not same and _name(site) not in self.server.proxies:
        raise Refusal(403, f"a page of {origin!r} may not use this server.")

  def _read_body(self) -> bytes:
    lengths = self.headers.get_all("Content-Length", [])
    if "Transfer-Encoding" in self.headers or len(lengths) != 1:
      raise Refusal(411, "a request has one Content-Length, and no encoding.")
    (length,) = lengths
    if not re.fullmatch("[0-9]{1,20}", length.strip(" \t")):
      raise Refusal(400, f"Content-Length {length!r} is no number of bytes.")
    if int(length) > MAX_REQUEST:
      raise Refusal(413, f"a request has at most {MAX_REQUEST} bytes.")
    body = self.rfile.read(int(length))
    if len(body) < int(length):
      raise Refusal(408, f"the request ended after {len(body)} of its bytes.")
    self._deadline.cancel()
    return body

  def _generate(self, body: bytes):
    prompt, arguments = protocol.parse_request(body)

    def send(message):
      self._send(json.dumps(message) + "\n", "application/x-ndjson")

    with self.server.busy:
      (completion,) = self.server.generator.generate(
        [prompt], on_text=lambda row, text: send({"text": text}), **arguments
      )
    send(
      {
        "characters": protocol.characters(completion),
        "reason": completion.reason,
      }
    )

  def _complete(self, body: bytes):
    request = completions.parse_request(body)
    answer = completions.Answer(request)

    def send(message):
      self._send(f"data: {message}\n\n", "text/event-stream")

    def on_piece(row, piece):
      if request.max_bytes:
        send(json.dumps(answer.piece(row, piece)))

    with self.server.busy:
      finished = self.server.generator.generate(
        request.prompts,
        on_piece=on_piece if request.stream else None,
        **request.arguments,
      )
    if not request.stream:
      self._reply_json(200, answer.complete(finished))
      return
    for chunk in answer.last(finished):
      send(json.dumps(chunk))
    send("[DONE]")

  def _chat(self, body: bytes):
    generator = self.server.generator
    request = chat_completions.parse_request(body, generator)
    answer = chat_completions.Answer(request)

    def send(message):
      self._send(f"data: {message}\n\n", "text/event-stream")

    def send_all(chunks):
      if not self._begun:
        for chunk in answer.first():
          send(json.dumps(chunk))
      for chunk in chunks:
        send(json.dumps(chunk))

    def on_piece(row, piece):
      send_all([answer.piece(row, piece)])

    with self.server.busy:
      finished = generator.generate(
        [request.prompt],
        on_piece=on_piece if request.stream else None,
        **request.arguments,
      )
    if not request.stream:
      self._reply_json(200, answer.complete(finished))
      return
    send_all(answer.last(finished))
    send("[DONE]")

  # ----- answers ------------------------------------------------------------

  @contextlib.contextmanager
  def _refusing(self):
    """Answers what is wrong with a request, and says defects of ours."""
    try:
      yield
    except Refusal as refusal:
      self.send_error(refusal.status, str(refusal))
    except ValueError as error:
      self.send_error(400, str(error))
    except (ConnectionError, TimeoutError):
      raise
    except Exception:
      self.send_error(500, "the server failed; its terminal has the reason.")
      raise

  def _begin(self, status, kind, size=None):
    self._begun = True
    # Whatever version a request claims: HTTP/0.9 would have no status line.
    self.request_version = self.default_request_version
    self.send_response(status)
    self.send_header("Content-Type", kind)
    if size is not None:
      self.send_header("Content-Length", str(size))
    self.end_headers()

  def _reply(self, status: int, kind: str, body: bytes):
    self._begin(status, kind, len(body))
    self.wfile.write(body)

  def _reply_json(self, status: int, message: dict):
    body = json.dumps(message).encode() + b"\n"
    self._reply(status, "application/json", body)

  def _send(self, text: str, kind: str):
    """The next part of an answer; nothing is sent before there is one."""
    if not self._begun:
      self._begin(200, kind)
    self.wfile.write(text.encode())
    self.wfile.flush()

  def send_error(self, code, message=None, explain=None):
    """One line of JSON; the library calls this for what is not even HTTP."""
    self.close_connection = True
    if self._begun:
      return
    # Its "not implemented" and "version not supported" are the sender's doing.
    status = {501: 405, 505: 400}.get(code, code)
    message = " ".join(str(message or "bad request").split())[:_MAX_MESSAGE]
    path = getattr(self, "path", "")
    if path.startswith("/v1/"):
      self._reply_json(status, completions.error(message, status))
    else:
      self._reply_json(status, {"error": message})
    self._drop_the_rest()

  def _drop_the_rest(self):
    """Reads what still comes, since closing on it would lose the answer."""
    with contextlib.suppress(OSError):
      self.wfile.flush()
      self.connection.shutdown(socket.SHUT_WR)
      self.connection.settimeout(1)
      while self.rfile.read(1 << 16):  # until the deadline at most
        pass
