"""Cuts at the tokens of a tokenizer's vocabulary: the rule `tokens@FILE`.

For baselines that pool where a BPE tokenizer would. A tokenizer decides on a
token once it has seen what follows; a splitter may not, so the vocabulary is
used from left to right: a segment grows while it is still the start of some
token, and the byte that no token goes on with is cut, as the first of the next
segment. What that costs beside the tokenizer itself:

- a cut is known one byte late, at the first byte of a token, not the last;
- a segment can be a mere beginning of a token, where the tokenizer would have
  gone back to a shorter token, and merges that a later byte forbids are made.

The vocabulary is a tree of bytes: too large to be combined with other rules in
one table, so it runs beside them, with one number of state and its edges in a
hash table that is read with a fixed number of probes.
"""

import base64
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax import files
from aunet_jax.compiled import compiled

NUM_PROBES = 8  # slots an edge may be in, side by side


MAX_NODES = 1 << 23  # an edge, node * 256 + byte, is an int32


_MULTIPLIER = 2654435761  # Knuth's multiplicative hash, modulo 2**32


@compiled
def _run(data, cuts, node, first, keys, values, shift):
  """Fills `cuts` for `data`; returns the node after it."""
  for i in range(data.size):
    key = np.int32(node * 256 + data[i])
    slot = np.uint32(np.uint32(key) * np.uint32(_MULTIPLIER)) >> shift
    found = -1
    if node > 0:
      for probe in range(NUM_PROBES):
        if keys[slot + probe] == key:
          found = values[slot + probe]
          break
    cuts[i] = found < 0
    node = found if found >= 0 else first[data[i]]
  return node


class Vocabulary:
  """The tree of a vocabulary's tokens, as a rule that runs by itself.

  Nodes are numbered from 1; 0 is where no segment is under way.

  Attributes:
    start: int32 (1,). hash: names the set of tokens.
  """

  start = np.zeros(1, np.int32)

  def __init__(self, tokens: Iterable[bytes]):
    """Builds the tree.

    Args: tokens: byte strings; the empty one is left out.
    Raises: ValueError for more than MAX_NODES nodes.
    """
    edges: dict[int, int] = {}  # node * 256 + byte -> node
    first = np.zeros(256, np.int32)
    digest = hashlib.sha256()
    num_nodes = 1
    for token in sorted({token for token in tokens if token}):
      digest.update(len(token).to_bytes(4, "little") + token)
      node = int(first[token[0]])
      if not node:
        node = first[token[0]] = num_nodes
        num_nodes += 1
      for byte in token[1:]:
        key = int(node) * 256 + byte
        if key not in edges:
          edges[key] = num_nodes
          num_nodes += 1
        node = edges[key]
      if num_nodes > MAX_NODES:
        raise ValueError(
          f"the vocabulary has more than {MAX_NODES - 1} beginnings of tokens, "
          "which is as many as can be told apart. Drop its longest tokens."
        )
    self.num_nodes = num_nodes
    self.hash = digest.hexdigest()[:16]
    self._first = first
    self._keys, self._values, self._shift = _hash_table(edges)

  def scan(
    self, data_N: np.ndarray, state: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Where to cut: bool (n,), and the state after. data_N: uint8 (n,).

    Raises: ValueError for a state that no text leads to.
    """
    if not 0 <= state[0] < self.num_nodes:
      raise ValueError(f"{state} is no state of {self.num_nodes} beginnings.")
    cuts_N = np.empty(data_N.size, np.bool_)
    node = _run(
      data_N,
      cuts_N,
      int(state[0]),
      self._first,
      self._keys,
      self._values,
      np.uint32(self._shift),
    )
    return cuts_N, np.array([node], np.int32)

  def step(
    self, state_BK: jax.Array, byte_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """One byte of 0-255 a row: next states int32 (B, 1), cuts bool (B,)."""
    node_B = state_BK[:, 0]
    key_B = node_B * 256 + byte_B
    hashed_B = key_B.astype(jnp.uint32) * jnp.uint32(_MULTIPLIER)
    slot_B = (hashed_B >> jnp.uint32(self._shift)).astype(jnp.int32)
    slot_BP = slot_B[:, None] + jnp.arange(NUM_PROBES)[None]
    hit_BP = jnp.asarray(self._keys)[slot_BP] == key_B[:, None]
    next_BP = jnp.where(hit_BP, jnp.asarray(self._values)[slot_BP], 0)
    next_B = jnp.where(node_B > 0, next_BP.sum(axis=1), 0)
    cut_B = next_B == 0
    first_B = jnp.asarray(self._first)[byte_B]
    return jnp.where(cut_B, first_B, next_B)[:, None], cut_B


def _hash_table(edges: dict[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
  """Keys and values of a table in which every key is within NUM_PROBES."""
  bits = max(4, (2 * len(edges)).bit_length())
  while True:
    shift = 32 - bits
    keys = np.full((1 << bits) + NUM_PROBES, -1, np.int32)
    values = np.zeros(len(keys), np.int32)
    for key, value in edges.items():
      slot = (key * _MULTIPLIER & 0xFFFFFFFF) >> shift
      free = np.flatnonzero(keys[slot : slot + NUM_PROBES] < 0)
      if not len(free):
        break
      keys[slot + free[0]], values[slot + free[0]] = key, value
    else:
      return keys, values, shift
    bits += 1


# ----- files ----------------------------------------------------------------


def read_tokens(path: str) -> list[bytes]:
  """The tokens of a vocabulary file, without its special ones.

  Args: path: a `tokenizer.json` of Hugging Face tokenizers (byte-level BPE, or
    pieces with ▁ for a space and <0xNN> for a byte), or a `.tiktoken` file
    (a token in base64 and its rank a line).
  Raises: ValueError if the file is missing or neither of these.
  """
  try:
    raw = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise ValueError(
      f"splitting rule tokens@{path}: {error.strerror}; name a tokenizer.json "
      "or a .tiktoken file."
    ) from None
  try:
    if raw.lstrip().startswith(b"{"):
      tokens = _read_tokenizer_json(files.parse_json(raw))
    else:
      lines = [line.split() for line in raw.splitlines() if line.strip()]
      tokens = [base64.b64decode(token, validate=True) for token, _ in lines]
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise ValueError(
      f"splitting rule tokens@{path}: neither a tokenizer.json nor a "
      f".tiktoken file ({type(error).__name__}: {error})."
    ) from None
  if not any(tokens):
    raise ValueError(f"splitting rule tokens@{path}: it is empty: no token.")
  return tokens


def byte_level_alphabet() -> dict[str, int]:
  """The characters by which byte-level BPE writes bytes.

  Printable characters of Latin-1 stand for themselves; the other bytes, in
  order, for the characters from U+0100 on.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): byte for byte in printable}
  return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _read_tokenizer_json(values: dict) -> list[bytes]:
  vocabulary = values["model"]["vocab"]
  if isinstance(vocabulary, list):  # unigram models: pairs of token and score
    vocabulary = [token for token, _ in vocabulary]
  special = {added["content"] for added in values.get("added_tokens", ())}
  pieces = [token for token in vocabulary if token not in special]
  parts = (values.get("pre_tokenizer"), values.get("decoder"))
  if '"ByteLevel"' in json.dumps(parts):
    alphabet = byte_level_alphabet()
    return [bytes(alphabet[c] for c in piece) for piece in pieces]
  tokens = []
  for piece in pieces:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    text = piece.replace("▁", " ").encode()
    tokens.append(bytes([int(byte[1], 16)]) if byte else text)
  return tokens
