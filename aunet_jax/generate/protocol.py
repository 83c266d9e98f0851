"""The page's requests and answers: JSON to arguments, completions to JSON."""

import json
from typing import Any

import numpy as np

from aunet_jax.generate.generator import Completion
from aunet_jax.generate.sampling import Sampling, check_stops
from aunet_jax.splitting import view

_KINDS = {
  "prompt": str,
  "max_bytes": int,
  "temperature": float,
  "top_k": int,
  "top_p": float,
  "min_p": float,
  "no_repeat": int,
  "utf8": bool,
  "seed": int,
  "stop": list,
}


def read_object(body: bytes) -> dict[str, Any]:
  """A JSON object's fields, without those that are null.

  Raises: ValueError for anything else.
  """
  try:
    request = json.loads(body)
  except RecursionError:
    raise ValueError("the request is not JSON: it nests too deep.") from None
  except ValueError as error:
    raise ValueError(f"the request is not JSON: {error}") from None
  if not isinstance(request, dict):
    raise ValueError("the request must be a JSON object.")
  return {name: value for name, value in request.items() if value is not None}


def check_kinds(request: dict[str, Any], kinds: dict[str, type]) -> None:
  """Raises: ValueError for an unknown field or a value of the wrong type."""
  for name, value in request.items():
    if name not in kinds:
      raise ValueError(f"{name!r} is not one of {', '.join(kinds)}.")
    kind, given = kinds[name], type(value)
    if given is not kind and (kind, given) != (float, int):
      raise ValueError(
        f"{name} must be of type {kind.__name__}, not {given.__name__}."
      )


def to_bytes(name: str, text: Any) -> bytes:
  """A JSON string as UTF-8; \\udcXX in it is the byte XX as it is.

  Raises: ValueError for what is no string, or holds other lone surrogates.
  """
  if not isinstance(text, str):
    raise ValueError(f"{name} must be text, not of type {type(text).__name__}.")
  try:
    return text.encode("utf-8", errors="surrogateescape")
  except UnicodeEncodeError:
    raise ValueError(f"{name} holds half a surrogate pair.") from None


def parse_request(body: bytes) -> tuple[bytes, dict]:
  """A request as (prompt, arguments of `Generator.generate`).

  Raises: ValueError for JSON that is none, a field that is not known, or a
    value of the wrong type or range.
  """
  given = read_object(body)
  check_kinds(given, _KINDS)
  prompt = to_bytes("prompt", given.pop("prompt", ""))
  stop = [to_bytes("stop", text) for text in given.pop("stop", ())]
  arguments = {k: given.pop(k) for k in ("max_bytes", "seed") if k in given}
  return prompt, arguments | {
    "stop": check_stops(stop),
    "settings": Sampling(**given),
  }


def characters(completion: Completion) -> list[dict]:
  """Text, bits and deepest level of every character, the prompt's first.

  A byte that is part of no character is one by itself, as U+FFFD.
  """
  data = completion.prompt + completion.data
  logprobs = np.concatenate([completion.prompt_logprobs, completion.logprobs])
  levels = np.concatenate([completion.prompt_levels, completion.levels])
  return [
    {
      "text": data[c.start : c.end].decode("utf-8", errors="replace"),
      "bits": float(-logprobs[c.start : c.end].sum() / np.log(2)),
      "level": c.level,
      "given": c.start < len(completion.prompt),
    }
    for c in view.characters(data, levels)
  ]
