"""Bytes to text while they come: whole characters, no half stop strings."""

import codecs
from collections.abc import Callable, Sequence

import numpy as np

from aunet_jax.config import EOS
from aunet_jax.generate.decode import Output

OnText = Callable[[int, str], None]


class RowText:
  """Collects one row's bytes; says which text is safe to show."""

  def __init__(self, stop: Sequence[bytes] = ()):
    self.stop = tuple(stop)
    self.data = bytearray()
    self.logprobs: list[float] = []
    self.levels: list[int] = []
    self.reason: str | None = None
    self._shown = 0
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def add(self, byte: int, level: int, logprob: float) -> None:
    if byte == EOS:
      self.reason = "eos"
      return
    self.data.append(byte)
    self.levels.append(level)
    self.logprobs.append(logprob)
    for text in self.stop:
      if self.data.endswith(text):
        del self.data[-len(text) :]
        self.reason = "stop"
        return

  def show(self, done: bool) -> str:
    """Text not shown yet: whole characters, no start of a stop string."""
    end = len(self.data)
    if done:
      self.reason = self.reason or "length"
    else:
      held = [
        size
        for text in self.stop
        for size in range(1, min(len(text), end + 1))
        if self.data.endswith(text[:size])
      ]
      end -= max(held, default=0)
    new = bytes(self.data[self._shown : end])
    self._shown = max(self._shown, end)
    return self._decoder.decode(new, final=done)


def hand_out(
  texts: Sequence[RowText],
  output: Output,
  done_B: np.ndarray,
  on_text: OnText | None,
) -> None:
  """Adds what one call of the loop generated, and shows what may be shown."""
  for b, text in enumerate(texts):
    if text.reason is not None:
      continue
    for t in range(int(output.count_B[b])):
      text.add(
        int(output.byte_BT[b, t]),
        int(output.level_BT[b, t]),
        float(output.logprob_BT[b, t]),
      )
    new = text.show(bool(done_B[b]))
    if on_text is not None and new:
      on_text(b, new)
