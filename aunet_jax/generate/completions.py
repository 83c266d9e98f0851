"""The OpenAI-compatible text completions: JSON to arguments and back.

A token is a byte: `max_tokens`, `usage` and log-probabilities count bytes, and
a prompt of token numbers is one of bytes 0 to 255. In log-probabilities a byte
that is no ASCII character is named as "bytes:\\xe4", the end of a document as
"<eos>". Fields of the protocol that would change the text and are not
implemented are refused unless they ask for nothing.
"""

import codecs
import dataclasses
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from aunet_jax.config import EOS
from aunet_jax.generate import utf8
from aunet_jax.generate.generator import Completion
from aunet_jax.generate.protocol import check_kinds, read_object, to_bytes
from aunet_jax.generate.sampling import Sampling, check_stops
from aunet_jax.generate.streaming import Piece

MODEL = "aunet_jax"  # the name of whatever model is served
MAX_ROWS = 64  # texts of one request
MAX_LOGPROBS = 5  # as the protocol has it
_KINDS = {
  "model": str,
  "max_tokens": int,
  "temperature": float,
  "top_p": float,
  "n": int,
  "best_of": int,
  "stream": bool,
  "stream_options": dict,
  "logprobs": int,
  "echo": bool,
  "seed": int,
  "user": str,
  "suffix": str,
  "presence_penalty": float,
  "frequency_penalty": float,
  "logit_bias": dict,
  # Not of the protocol, but of `Sampling`.
  "top_k": int,
  "min_p": float,
  "no_repeat": int,
  "utf8": bool,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What a request asks for; `arguments` are those of `Generator.generate`."""

  prompts: list[bytes]
  arguments: dict
  model: str
  max_bytes: int  # 0 = only the prompt's own log-probabilities
  num_samples: int
  echo: bool
  logprobs: int | None
  stream: bool
  usage_at_end: bool


def parse_request(body: bytes) -> Request:
  """Raises: ValueError for a request that cannot be met, with the reason."""
  given = read_object(body)
  prompts = _prompts(given.pop("prompt", ""))
  stop = given.pop("stop", [])
  stop = [stop] if isinstance(stop, str) else stop
  if not isinstance(stop, list):
    raise ValueError("stop must be text or a list of texts.")
  check_kinds(given, _KINDS)
  num_samples = given.get("n", 1)
  nothing = {
    "suffix": "",
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "best_of": num_samples,
  }
  for name, value in nothing.items():
    if given.get(name, value) != value:
      raise ValueError(f"{name} is not implemented; leave it out.")
  max_bytes = given.get("max_tokens", 16)
  if max_bytes < 0:
    raise ValueError(f"max_tokens={max_bytes} must not be negative.")
  if not 1 <= num_samples <= MAX_ROWS // len(prompts):
    raise ValueError(
      f"n={num_samples} and {len(prompts)} prompts: a request may have 1 to "
      f"{MAX_ROWS} texts."
    )
  if given.get("echo") and given.get("stream"):
    raise ValueError("echo and stream do not go together; leave one out.")
  logprobs = given.get("logprobs")
  if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
    raise ValueError(f"logprobs={logprobs} must be from 0 to {MAX_LOGPROBS}.")
  names = ("temperature", "top_p", "top_k", "min_p", "no_repeat", "utf8")
  arguments = {
    "max_bytes": max(1, max_bytes),
    "num_samples": num_samples,
    "seed": given.get("seed", secrets.randbits(32)),
    "stop": check_stops([to_bytes("stop", text) for text in stop]),
    "settings": Sampling(**{k: given[k] for k in names if k in given}),
    "top_logprobs": MAX_LOGPROBS if logprobs else 0,  # one program for all
  }
  return Request(
    prompts=prompts,
    arguments=arguments,
    model=given.get("model", MODEL),
    max_bytes=max_bytes,
    num_samples=num_samples,
    echo=given.get("echo", False),
    logprobs=logprobs,
    stream=given.get("stream", False),
    usage_at_end=given.get("stream_options", {}).get("include_usage") is True,
  )


def _prompts(given: Any) -> list[bytes]:
  """A text, texts, bytes as numbers, or lists of those, as a list of bytes."""
  if not isinstance(given, list):
    return [to_bytes("prompt", given)]
  if not given:
    raise ValueError("prompt is an empty list; give at least one.")
  if all(type(one) is int for one in given):
    given = [given]
  if len(given) > MAX_ROWS:
    raise ValueError(f"{len(given)} prompts; at most {MAX_ROWS} can be.")
  prompts = []
  for one in given:
    if isinstance(one, list):
      if not all(type(byte) is int and 0 <= byte < 256 for byte in one):
        raise ValueError("a prompt of numbers must have bytes, 0 to 255.")
      prompts.append(bytes(one))
    else:
      prompts.append(to_bytes("prompt", one))
  return prompts


# ----- answers --------------------------------------------------------------


def token_name(byte: int) -> str:
  """A byte as the protocol's texts can show it."""
  if byte == EOS:
    return "<eos>"
  return chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"


def finite(logprob: float) -> float:
  """JSON has no infinity."""
  return max(-9999.0, float(logprob))


def _logprobs(
  request: Request,
  data: bytes,
  logprobs: Iterable[float],
  top: Sequence[dict[int, float]],
  offset: int,
) -> dict | None:
  """Of the bytes `data`, whose first character is number `offset`."""
  if request.logprobs is None:
    return None
  logprobs = [finite(logprob) for logprob in logprobs]
  offsets = []
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  for n in range(len(data)):
    offsets.append(offset)
    offset += len(decoder.decode(data[n : n + 1]))
  most_likely = None
  if request.logprobs:
    most_likely = []
    for byte, logprob, best in zip(data, logprobs, top, strict=True):
      best = list(best.items())[: request.logprobs]
      entry = {token_name(other): finite(x) for other, x in best}
      most_likely.append(entry | {token_name(byte): logprob})
  return {
    "tokens": [token_name(byte) for byte in data],
    "token_logprobs": logprobs,
    "top_logprobs": most_likely,
    "text_offset": offsets,
  }


def _before(prompt: bytes) -> str:
  """A prompt's text up to the character that its continuation completes."""
  complete = prompt.removesuffix(utf8.unfinished(prompt))
  return complete.decode("utf-8", errors="replace")


def _choice(request: Request, row: int, completion: Completion) -> dict:
  data, text = completion.data, completion.text
  logprobs, top = list(completion.logprobs), completion.top_logprobs
  if request.max_bytes == 0:
    data, logprobs, top = b"", [], []
    text = utf8.unfinished(completion.prompt).decode("utf-8", errors="replace")
  if request.echo:
    data = completion.prompt + data
    text = _before(completion.prompt) + text
    logprobs = [*completion.prompt_logprobs, *logprobs]
    top = [*completion.prompt_top_logprobs, *top]
  elif request.max_bytes == 0:
    text = ""
  return {
    "index": row,
    "text": text,
    "logprobs": _logprobs(request, data, logprobs, top, 0),
    "finish_reason": _finish_reason(request, completion),
  }


def _finish_reason(request: Request, completion: Completion) -> str:
  ended = completion.reason in ("eos", "stop") and request.max_bytes > 0
  return "stop" if ended else "length"


def _usage(request: Request, completions: Sequence[Completion]) -> dict:
  prompt_tokens = sum(len(prompt) for prompt in request.prompts)
  tokens = sum(len(c.data) for c in completions) if request.max_bytes else 0
  return {
    "prompt_tokens": prompt_tokens,
    "completion_tokens": tokens,
    "total_tokens": prompt_tokens + tokens,
  }


class Answer:
  """One answer, complete or in chunks that share its name and time."""

  def __init__(self, request: Request):
    self.request = request
    self._fields = {
      "id": f"cmpl-{secrets.token_hex(12)}",
      "object": "text_completion",
      "created": int(time.time()),
      "model": request.model,
    }
    rows = len(request.prompts) * request.num_samples
    self._offsets = [0] * rows  # characters sent of each row

  def complete(self, completions: Sequence[Completion]) -> dict:
    choices = [
      _choice(self.request, row, one) for row, one in enumerate(completions)
    ]
    usage = _usage(self.request, completions)
    return self._fields | {"choices": choices, "usage": usage}

  def _chunk(self, row, text, logprobs, reason=None) -> dict:
    choice = {
      "index": row,
      "text": text,
      "logprobs": logprobs,
      "finish_reason": reason,
    }
    return self._fields | {"choices": [choice]}

  def piece(self, row: int, piece: Piece) -> dict:
    """The chunk for what was just written."""
    logprobs = _logprobs(
      self.request,
      piece.data,
      piece.logprobs,
      piece.top_logprobs,
      self._offsets[row],
    )
    self._offsets[row] += len(piece.text)
    return self._chunk(row, piece.text, logprobs)

  def last(self, completions: Sequence[Completion]) -> Iterator[dict]:
    """The chunks after the text: how each row ended, and what was used."""
    for row, completion in enumerate(completions):
      reason = _finish_reason(self.request, completion)
      yield self._chunk(row, "", None, reason)
    if self.request.usage_at_end:
      usage = _usage(self.request, completions)
      yield self._fields | {"choices": [], "usage": usage}


def models() -> dict:
  model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "user"}
  return {"object": "list", "data": [model]}


def error(message: str, status: int) -> dict:
  kind = "invalid_request_error" if status < 500 else "server_error"
  return {
    "error": {"message": message, "type": kind, "param": None, "code": None}
  }
