"""Bytes to text while they come: whole characters, no half stop strings."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from aunet_jax.config import EOS
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.generate import utf8
from aunet_jax.generate.decode import Output
from aunet_jax.generate.sampling import Top


class Piece(NamedTuple):
  """Text of a row that may be shown, and the bytes it was made of."""

  text: str
  start: int  # its first byte, counted from the end of the prompt
  data: bytes
  logprobs: list[float]  # of each byte of `data`
  top_logprobs: list[dict[int, float]]  # empty if they were not asked for


OnPiece = Callable[[int, Piece], None]
OnText = Callable[[int, str], None]


class RowText:
  """Collects one row's bytes; says which text is safe to show.

  Attributes:
    data, logprobs, levels, top_logprobs: of every byte so far; a token's nats
      are at its first byte, its others have 0.
    reason: why the row has ended; None = it has not.
  """

  def __init__(
    self,
    stop: Sequence[bytes] = (),
    prompt: bytes = b"",
    whole_characters: bool = False,
    max_bytes: int | None = None,
    tokenizer: Tokenizer | None = None,
  ):
    """Args: prompt: a character that it leaves open becomes part of the text.
    whole_characters: whatever ends the row leaves no part of a character.
    tokenizer: where tokens are added, not bytes."""
    # Of those that end at one byte the longest is cut off.
    self.stop = sorted(stop, key=len, reverse=True)
    self.whole_characters = whole_characters
    self.max_bytes, self.tokenizer = max_bytes, tokenizer
    self.data = bytearray()
    self.logprobs: list[float] = []
    self.levels: list[int] = []
    self.top_logprobs: list[dict[int, float]] = []
    self.reason: str | None = None
    self._open = utf8.unfinished(prompt)
    self._waiting = self._open  # until its character is complete
    self._shown = 0  # bytes of `data`

  def add(
    self,
    unit: int,
    level: int,
    logprob: float,
    top: dict[int, float] | None = None,
  ) -> None:
    """Takes a byte or a token, up to where the row ends inside it."""
    if self.tokenizer is None:
      eos, data = EOS, bytes([unit]) if unit != EOS else b""
    else:
      eos, data = self.tokenizer.eos, self.tokenizer.decode([unit])
    if unit == eos:
      self.reason = "eos"
    for byte in data:
      self.data.append(byte)
      self.levels.append(level)
      self.logprobs.append(logprob)
      logprob = 0.0
      if top is not None:
        self.top_logprobs.append(top)
      for text in self.stop:
        if self.data.endswith(text):
          self._keep(len(self.data) - len(text))
          self.reason = "stop"
          return
      if len(self.data) == self.max_bytes:
        self.reason = "length"
        return

  def _keep(self, size: int) -> None:
    for values in (self.data, self.logprobs, self.levels, self.top_logprobs):
      del values[size:]

  def end(self, reason: str) -> None:
    """Nothing more comes; for `reason`, if the row has not ended itself."""
    self.reason = self.reason or reason
    if self.whole_characters:
      last = utf8.unfinished(self._open + bytes(self.data))
      self._keep(max(0, len(self.data) - len(last)))

  def show(self, done: bool) -> Piece:
    """What was not shown yet: complete characters, no start of a stop string.

    Args: done: the row ends here; what was held back is shown too.
    """
    if done:
      self.end("length")
    start, end = self._shown, len(self.data)
    if not done:
      held = [
        size
        for text in self.stop
        for size in range(1, min(len(text), end + 1))
        if self.data.endswith(text[:size])
      ]
      end -= max(held, default=0)
    new = bytes(self.data[start:end])
    before = self._waiting
    if not done:
      size = len(utf8.unfinished(before + new))
      if size > len(new):
        before, new = b"", b""  # still inside the prompt's last character
      else:
        self._waiting = b""
        new = new[: len(new) - size]
    self._shown = end = start + len(new)
    return Piece(
      text=(before + new).decode("utf-8", errors="replace"),
      start=start,
      data=new,
      logprobs=self.logprobs[start:end],
      top_logprobs=self.top_logprobs[start:end],
    )


def hand_out(
  texts: Sequence[RowText],
  output: Output,
  count_B: np.ndarray,
  done_B: np.ndarray,
  top: Top | None,
  on_piece: OnPiece | None,
) -> None:
  """Adds what one call of the loop generated, and shows what may be shown.

  Args: count_B, done_B: of the state after the call. top: as it was then.
  """
  for b, text in enumerate(texts):
    if text.reason is not None:
      continue
    new = int(output.count_B[b])
    for t in range(new):
      at = int(count_B[b]) - new + t
      text.add(
        int(output.byte_BT[b, t]),
        int(output.level_BT[b, t]),
        float(output.logprob_BT[b, t]),
        most_likely(top, b, at % top.byte_BTK.shape[1]) if top else None,
      )
      if text.reason is not None:  # tokens may come after the end of a row
        break
    piece = text.show(bool(done_B[b]) or text.reason is not None)
    if on_piece is not None and piece.text:
      on_piece(b, piece)


def most_likely(top: Top, b: int, t: int) -> dict[int, float]:
  """Of row b at place t: byte to log-probability, best first."""
  return dict(
    zip(
      top.byte_BTK[b, t].tolist(), top.logprob_BTK[b, t].tolist(), strict=True
    )
  )
