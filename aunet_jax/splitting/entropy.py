"""Cuts where the next byte is hard to guess: the rule `entropy@FILE`.

As the Byte Latent Transformer (arXiv 2412.09871, Section 2.3) cuts patches: at
a byte after which the entropy of the next one, as a small trained byte model
gives it, is above a threshold, or above the entropy before it by a threshold.
`fit_entropy` makes FILE.

The model's entropy depends on all bytes before, in floats that differ in their
last digits between a batch and a single step, so a cut near the threshold
would not be the same in training and in decoding. What is kept of the model is
therefore a table: its mean entropy, in 256 steps from 0 to 8 bits, after each
sequence of three bytes (of two or one where three did not occur). That is an
automaton: exact, and stable under later text.
"""

import hashlib
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from aunet_jax import arrays
from aunet_jax.compiled import compiled

STEPS_PER_BIT = 255 / 8


MODES = ("threshold", "rise")


_CONTEXT = 0xFFFFFF  # three bytes


_FIELDS = ("index", "blocks", "mode", "threshold")  # of a file


_LARGEST_FILE = (1 << 16) * 257 + 2  # numbers: a block for each pair of bytes


@compiled
def _run(data, cuts, context, before, index, blocks, rise, threshold):
  """Fills `cuts` for `data`; returns the context and entropy after it."""
  for i in range(data.size):
    context = ((context << 8) | data[i]) & _CONTEXT
    entropy = np.int64(blocks[index[context >> 8], context & 0xFF])
    cuts[i] = entropy - (before if rise else 0) > threshold
    before = entropy
  return context, before


class Entropy:
  """Entropies after three bytes, as a rule that runs by itself.

  A state is the last three bytes (0 before the text) and the entropy after
  them.

  Args:
    index: uint16 (65536,), the block of each pair of bytes before the last.
    blocks: uint8 (blocks, 256), entropy after them and the last byte.
    mode: one of MODES. threshold: in the steps of `blocks`.
  Raises: ValueError for arrays of another kind, and for an index past the
    blocks: the compiled loop would read memory that is not its own.
  """

  start = np.array([0, 255], np.int32)

  def __init__(
    self, index: np.ndarray, blocks: np.ndarray, mode: str, threshold: int
  ):
    if mode not in MODES:
      raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}.")
    for name, array in (("index", index), ("blocks", blocks)):
      if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, not {array.dtype}.")
    if index.shape != (1 << 16,):
      raise ValueError(f"index has shape {index.shape}, not ({1 << 16},).")
    if blocks.ndim != 2 or blocks.shape[1] != 256:
      raise ValueError(f"blocks has shape {blocks.shape}, not (blocks, 256).")
    if not 0 <= index.min() <= index.max() < len(blocks):
      raise ValueError(
        f"index names blocks {index.min()} to {index.max()}; there are "
        f"{len(blocks)}, from 0."
      )
    if not 0 <= blocks.min() <= blocks.max() <= 255:
      raise ValueError("blocks must be from 0 to 255.")
    if not -255 <= threshold <= 255:
      raise ValueError(f"threshold={threshold} must be from -255 to 255.")
    self.index = np.ascontiguousarray(index, np.uint16)
    self.blocks = np.ascontiguousarray(blocks, np.uint8)
    self.mode = mode
    self.threshold = int(threshold)
    digest = hashlib.sha256(f"{mode} {self.threshold}".encode())
    digest.update(self.index.astype("<u2").tobytes() + self.blocks.tobytes())
    self.hash = digest.hexdigest()[:16]

  def scan(
    self, data_N: np.ndarray, state: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Where to cut: bool (n,), and the state after. data_N: uint8 (n,).

    Raises: ValueError for a state that no text leads to.
    """
    if not (0 <= state[0] <= _CONTEXT and 0 <= state[1] <= 255):
      raise ValueError(f"{state} is no state of entropies after three bytes.")
    cuts_N = np.empty(data_N.size, np.bool_)
    context, before = _run(
      data_N,
      cuts_N,
      int(state[0]),
      int(state[1]),
      self.index,
      self.blocks,
      self.mode == "rise",
      self.threshold,
    )
    return cuts_N, np.array([context, before], np.int32)

  def step(
    self, state_BK: jax.Array, byte_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """One byte of 0-255 a row: next states int32 (B, 2), cuts bool (B,)."""
    context_B = (state_BK[:, 0] << 8 | byte_B) & _CONTEXT
    block_B = jnp.asarray(self.index)[context_B >> 8].astype(jnp.int32)
    entropy_B = jnp.asarray(self.blocks)[block_B, context_B & 0xFF]
    entropy_B = entropy_B.astype(jnp.int32)
    before_B = state_BK[:, 1] if self.mode == "rise" else 0
    cut_B = entropy_B - before_B > self.threshold
    return jnp.stack([context_B, entropy_B], axis=1), cut_B

  def save(self, path: str) -> None:
    with open(path, "wb") as file:
      np.savez_compressed(
        file,
        index=self.index,
        blocks=self.blocks,
        mode=np.array(self.mode),
        threshold=np.array(self.threshold),
      )


def load(path: str) -> Entropy:
  """Reads what `Entropy.save` wrote.

  Raises: ValueError if the file is missing, damaged or something else.
  """
  if not os.path.exists(path):
    raise ValueError(
      f"splitting rule entropy@{path}: no such file; make one with "
      "python -m aunet_jax.fit_entropy."
    )
  try:
    headers = arrays.read_headers(path, _FIELDS)
    for name in ("mode", "threshold"):
      if headers[name].shape:
        raise ValueError(f"{name} has shape {headers[name].shape}")
    if headers["threshold"].dtype.kind not in "iu":
      raise ValueError(f"threshold is {headers['threshold'].dtype}")
    size = sum(math.prod(header.shape) for header in headers.values())
    if size > _LARGEST_FILE:
      raise ValueError(f"it holds {size} numbers, at most {_LARGEST_FILE}")
    found = arrays.read(path, _FIELDS)
    return Entropy(
      found["index"],
      found["blocks"],
      str(found["mode"]),
      int(found["threshold"]),
    )
  except (OSError, ValueError) as error:
    raise ValueError(
      f"splitting rule entropy@{path}: not a file of "
      f"python -m aunet_jax.fit_entropy ({error})."
    ) from None
