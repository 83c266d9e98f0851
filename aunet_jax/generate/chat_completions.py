"""The OpenAI-compatible chat completions: JSON to arguments and back.

As in `completions`, a token is a byte. `messages` become turns (see
`data.roles`), and the text of a message cannot make a mark. Fields that would
change the text and are not implemented are refused.
"""

import dataclasses
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from aunet_jax.data import roles
from aunet_jax.generate import chat
from aunet_jax.generate.completions import (
  MAX_ROWS,
  MODEL,
  finite,
  token_name,
)
from aunet_jax.generate.generator import Completion, Generator
from aunet_jax.generate.protocol import check_kinds, read_object
from aunet_jax.generate.sampling import MAX_TOP, Sampling, check_stops
from aunet_jax.generate.streaming import Piece

MAX_BYTES = 256  # of an answer, unless the request says more
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "no_repeat")
_KINDS = {
  "model": str,
  "max_tokens": int,
  "max_completion_tokens": int,
  "temperature": float,
  "top_p": float,
  "n": int,
  "stream": bool,
  "stream_options": dict,
  "logprobs": bool,
  "top_logprobs": int,
  "seed": int,
  "user": str,
  "presence_penalty": float,
  "frequency_penalty": float,
  "logit_bias": dict,
  # Not of the protocol, but of `Sampling`.
  "top_k": int,
  "min_p": float,
  "no_repeat": int,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What a request asks for; `arguments` are those of `Generator.generate`."""

  prompt: bytes
  arguments: dict
  model: str
  num_samples: int
  logprobs: bool
  num_top: int
  stream: bool
  usage_at_end: bool


def parse_request(body: bytes, generator: Generator) -> Request:
  """Raises: ValueError for a request that cannot be met, with the reason."""
  given = read_object(body)
  turns = _turns(given.pop("messages", None))
  stop = given.pop("stop", [])
  stop = [stop] if isinstance(stop, str) else stop
  if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
    raise ValueError("stop must be text or a list of texts.")
  check_kinds(given, _KINDS)
  nothing = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
  for name, value in nothing.items():
    if given.get(name, value) != value:
      raise ValueError(f"{name} is not implemented; leave it out.")
  max_bytes = given.get("max_tokens", MAX_BYTES)
  max_bytes = given.get("max_completion_tokens", max_bytes)
  if max_bytes < 1:
    raise ValueError(f"max_tokens={max_bytes} must be at least 1.")
  num_samples = given.get("n", 1)
  if not 1 <= num_samples <= MAX_ROWS:
    raise ValueError(f"n={num_samples} must be from 1 to {MAX_ROWS}.")
  num_top = given.get("top_logprobs", 0)
  if not 0 <= num_top <= MAX_TOP:
    raise ValueError(f"top_logprobs={num_top} must be from 0 to {MAX_TOP}.")
  if num_top and not given.get("logprobs"):
    raise ValueError("top_logprobs needs logprobs: true.")
  arguments = {
    "max_bytes": max_bytes,
    "num_samples": num_samples,
    "seed": given.get("seed", secrets.randbits(32)),
    "stop": check_stops([*chat.STOPS, *map(roles.encode_text, stop)]),
    "settings": Sampling(**{k: given[k] for k in _SAMPLING if k in given}),
    "top_logprobs": MAX_TOP if num_top else 0,  # one program for all
  }
  return Request(
    prompt=chat.prompt_of(generator, turns, max_bytes),
    arguments=arguments,
    model=given.get("model", MODEL),
    num_samples=num_samples,
    logprobs=given.get("logprobs", False),
    num_top=num_top,
    stream=given.get("stream", False),
    usage_at_end=given.get("stream_options", {}).get("include_usage") is True,
  )


def _turns(messages: Any) -> list[roles.Turn]:
  if not isinstance(messages, list) or not messages:
    raise ValueError("messages must be a list of at least one message.")
  turns = []
  for number, message in enumerate(messages, start=1):
    if not isinstance(message, dict):
      raise ValueError(f"message {number} must be a JSON object.")
    role = message.get("role")
    role = "system" if role == "developer" else role  # its newer name
    content = message.get("content")
    if isinstance(content, list):
      content = _joined(content, number)
    if not isinstance(content, str):
      raise ValueError(f"the content of message {number} must be text.")
    turns.append(roles.turn_of(role, content))
  return turns


def _joined(parts: list, number: int) -> str:
  """The text of a content in parts."""
  texts = []
  for part in parts:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
      raise ValueError(f"message {number} has a part that is not text.")
    texts.append(part["text"])
  return "".join(texts)


# ----- answers --------------------------------------------------------------


def _logprobs(
  request: Request,
  data: bytes,
  logprobs: Iterable[float],
  top: Sequence[dict[int, float]],
) -> dict | None:
  if not request.logprobs:
    return None

  def entry(byte, logprob):
    shown = list(bytes([byte])) if byte < 256 else None
    return {
      "token": token_name(byte), "logprob": finite(logprob), "bytes": shown
    }  # fmt: skip

  tops = top if request.num_top else [{}] * len(data)
  content = []
  for byte, logprob, best in zip(data, logprobs, tops, strict=True):
    best = list(best.items())[: request.num_top]
    content.append(
      entry(byte, logprob) | {"top_logprobs": [entry(*one) for one in best]}
    )
  return {"content": content, "refusal": None}


def _finish_reason(completion: Completion) -> str:
  return "stop" if completion.reason in ("eos", "stop") else "length"


def _usage(request: Request, completions: Sequence[Completion]) -> dict:
  tokens = sum(len(completion.data) for completion in completions)
  return {
    "prompt_tokens": len(request.prompt),
    "completion_tokens": tokens,
    "total_tokens": len(request.prompt) + tokens,
  }


class Answer:
  """One answer, complete or in chunks that share its name and time."""

  def __init__(self, request: Request):
    self.request = request
    self._fields = {
      "id": f"chatcmpl-{secrets.token_hex(12)}",
      "object": "chat.completion" + (".chunk" if request.stream else ""),
      "created": int(time.time()),
      "model": request.model,
    }

  def complete(self, completions: Sequence[Completion]) -> dict:
    choices = [
      {
        "index": row,
        "message": {
          "role": "assistant", "content": one.text, "refusal": None
        },
        "logprobs": _logprobs(
          self.request, one.data, one.logprobs, one.top_logprobs
        ),
        "finish_reason": _finish_reason(one),
      }
      for row, one in enumerate(completions)
    ]  # fmt: skip
    usage = _usage(self.request, completions)
    return self._fields | {"choices": choices, "usage": usage}

  def _chunk(self, row, delta, logprobs=None, reason=None) -> dict:
    choice = {
      "index": row,
      "delta": delta,
      "logprobs": logprobs,
      "finish_reason": reason,
    }
    return self._fields | {"choices": [choice]}

  def first(self) -> Iterator[dict]:
    """The chunks before the text: who speaks."""
    for row in range(self.request.num_samples):
      yield self._chunk(row, {"role": "assistant", "content": ""})

  def piece(self, row: int, piece: Piece) -> dict:
    """The chunk for what was just written."""
    logprobs = _logprobs(
      self.request, piece.data, piece.logprobs, piece.top_logprobs
    )
    return self._chunk(row, {"content": piece.text}, logprobs)

  def last(self, completions: Sequence[Completion]) -> Iterator[dict]:
    """The chunks after the text: how each row ended, and what was used."""
    for row, completion in enumerate(completions):
      yield self._chunk(row, {}, None, _finish_reason(completion))
    if self.request.usage_at_end:
      usage = _usage(self.request, completions)
      yield self._fields | {"choices": [], "usage": usage}
