"""A web page that writes with a model and shows how it reads.

  python -m aunet_jax.serve --workdir=runs/quickstart --port=8000

The page streams the text, then colours every character by the model's surprise
(bits) and marks where each stage of the network ended a segment. Standard
library only; for one machine's own use: it listens on 127.0.0.1 and answers one
request at a time.

  GET  /          the page; ?prompt=TEXT&run=1 starts at once
  GET  /model     JSON: number of stages and their rules
  POST /generate  JSON request as `Request`; answers JSON lines: {"text": …} as
                  it comes, then {"characters": […], "reason": …}
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from aunet_jax.generate.generator import Completion, Generator
from aunet_jax.generate.sampling import Sampling

MAX_REQUEST = 1 << 20  # bytes of a request's body


_SETTINGS = {
  "prompt": str,
  "max_bytes": int,
  "temperature": float,
  "top_k": int,
  "top_p": float,
  "min_p": float,
  "no_repeat": int,
  "seed": int,
}


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>AU-Net</title>
<style>
  body { font: 16px/1.6 system-ui, sans-serif; max-width: 50rem;
         margin: 2rem auto; padding: 0 1rem; }
  textarea { width: 100%; height: 6rem; font: inherit; box-sizing: border-box }
  input { width: 5rem; font: inherit } label { margin-right: 1rem }
  button { font: inherit; padding: .3rem 1rem }
  #out { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 1rem;
         font: 16px/2.4 ui-monospace, monospace }
  #out span { padding-bottom: 3px }
  .l1 { border-right: 2px solid #4a90d9 }
  .l2 { border-right: 3px solid #d9534a }
  .l3 { border-right: 4px solid #2f9e44 }
  .given { opacity: .75 } #error { color: #b00020 } #note { color: #666 }
</style>
<h1>AU-Net</h1>
<form id="form">
  <textarea id="prompt" aria-label="Text to continue"></textarea><p>
  <label>bytes <input id="max_bytes" type="number" value="300"></label>
  <label>temperature
    <input id="temperature" type="number" step="0.05" value="0.8"></label>
  <label>top p <input id="top_p" type="number" step="0.01" value="1"></label>
  <label>seed <input id="seed" type="number" value="0"></label>
  <button>Write</button></p>
</form>
<p id="note"></p><p id="error" role="alert"></p><div id="out"></div>
<script>
"use strict";
const get = (id) => document.getElementById(id);
fetch("/model").then((r) => r.json()).then((model) => {
  get("note").textContent = model.stages + " stages. The redder a character, "
    + "the more bits it took. Bars: ends of " + (model.rules.map(
      (rule, i) => rule + " (stage " + (i + 2) + ")").join(", ")
      || "nothing, bytes only") + ".";
});
function show(characters) {
  const out = get("out");
  out.replaceChildren();
  for (const c of characters) {
    const span = document.createElement("span");
    span.textContent = c.text;
    span.title = c.bits.toFixed(2) + " bits, level " + c.level;
    const heat = Math.min(1, c.bits / 10);
    span.style.backgroundColor = "rgba(255, 80, 40, " + heat.toFixed(3) + ")";
    span.className = "l" + c.level + (c.given ? " given" : "");
    out.append(span);
  }
}
async function write() {
  const request = { prompt: get("prompt").value };
  for (const id of ["max_bytes", "temperature", "top_p", "seed"])
    request[id] = Number(get(id).value);
  get("error").textContent = "";
  get("out").textContent = request.prompt;
  const answer = await fetch("/generate", {
    method: "POST", body: JSON.stringify(request) });
  const reader = answer.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += decoder.decode(value || new Uint8Array(), { stream: !done });
    const lines = rest.split("\\n");
    rest = lines.pop();
    for (const line of lines) {
      const message = JSON.parse(line);
      if (message.error) get("error").textContent = message.error;
      if (message.text) get("out").append(message.text);
      if (message.characters) {
        show(message.characters);
        document.body.dataset.done = message.reason;
      }
    }
    if (done) return;
  }
}
get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write().catch((error) => { get("error").textContent = error; });
});
const query = new URLSearchParams(location.search);
for (const [key, value] of query) if (get(key)) get(key).value = value;
if (query.has("run")) write();
</script></html>
"""


def characters(
  data: bytes, logprobs: np.ndarray, levels: np.ndarray, given: bool
) -> list[dict]:
  """One entry per character: its text, bits and deepest level.

  A byte that is part of no character stands alone, as U+FFFD.
  """
  result, first = [], 0
  while first < len(data):
    # A start of a character may be followed by up to three more bytes.
    for size in (1, 2, 3, 4):
      try:
        text = data[first : first + size].decode("utf-8")
        break
      except UnicodeDecodeError:
        continue
    else:
      text, size = "\ufffd", 1
    end = first + len(text.encode()) if text != "\ufffd" else first + size
    result.append(
      {
        "text": text,
        "bits": float(-logprobs[first:end].sum() / np.log(2)),
        "level": int(levels[first:end].max()),
        "given": given,
      }
    )
    first = end
  return result


def all_characters(completion: Completion) -> list[dict]:
  """Of the prompt, then of what was written."""
  return characters(
    completion.prompt,
    completion.prompt_logprobs,
    completion.prompt_levels,
    given=True,
  ) + characters(
    completion.data, completion.logprobs, completion.levels, given=False
  )


def parse_request(body: bytes) -> tuple[bytes, dict]:
  """A request as (prompt, arguments of `Generator.generate`).

  Raises: ValueError for JSON that is none, a field that is not known, or a
    value of the wrong type or range.
  """
  try:
    request = json.loads(body)
  except ValueError as error:
    raise ValueError(f"the request is not JSON: {error}") from None
  if not isinstance(request, dict):
    raise ValueError("the request must be a JSON object.")
  for name, value in request.items():
    if name not in _SETTINGS:
      raise ValueError(f"{name!r} is not one of {', '.join(_SETTINGS)}.")
    kind = _SETTINGS[name]
    if kind is float and type(value) is int:
      continue
    if type(value) is not kind and value is not None:
      raise ValueError(f"{name}={value!r} must be a {kind.__name__}.")
  given = {k: v for k, v in request.items() if v is not None}
  prompt = given.pop("prompt", "").encode("utf-8", errors="replace")
  arguments = {k: given.pop(k) for k in ("max_bytes", "seed") if k in given}
  return prompt, arguments | {"settings": Sampling(**given)}


def make_server(generator: Generator, port: int) -> ThreadingHTTPServer:
  """A server on 127.0.0.1; port 0 picks a free one."""
  busy = threading.Lock()

  class Handler(BaseHTTPRequestHandler):
    def log_message(self, format, *args):
      pass

    def _reply(self, status, kind, body):
      self.send_response(status)
      self.send_header("Content-Type", kind)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def handle(self):
      with contextlib.suppress(ConnectionError):  # the reader left the page
        super().handle()

    def do_GET(self):
      path = self.path.split("?")[0]
      if path == "/":
        self._reply(200, "text/html; charset=utf-8", PAGE.encode())
      elif path == "/model":
        config = generator.config
        model = {"stages": config.num_stages, "rules": list(config.rules)}
        self._reply(200, "application/json", json.dumps(model).encode())
      else:
        self._reply(404, "text/plain", b"no such page\n")

    def do_POST(self):
      if self.path != "/generate":
        self._reply(404, "text/plain", b"no such page\n")
        return
      size = int(self.headers.get("Content-Length") or 0)
      if size > MAX_REQUEST:
        self._reply(413, "text/plain", b"the request is too large\n")
        return
      body = self.rfile.read(size)
      self.send_response(200)
      self.send_header("Content-Type", "application/x-ndjson")
      self.end_headers()

      def send(message):
        self.wfile.write(json.dumps(message).encode() + b"\n")
        self.wfile.flush()

      try:
        with busy:
          prompt, arguments = parse_request(body)
          (completion,) = generator.generate(
            [prompt],
            on_text=lambda row, text: send({"text": text}),
            **arguments,
          )
        send(
          {
            "characters": all_characters(completion),
            "reason": completion.reason,
          }
        )
      except ValueError as error:
        send({"error": str(error)})

  return ThreadingHTTPServer(("127.0.0.1", port), Handler)
