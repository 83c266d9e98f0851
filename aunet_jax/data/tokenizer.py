"""A byte-level BPE tokenizer, for the baseline that reads tokens.

Tokens are exact: those of a document, joined, are its bytes, which `encode`
checks. BPE tokenizers read text, so bytes that are not valid UTF-8 are cut out
first and stand as the tokens of single bytes, which every byte-level vocabulary
has; the valid spans between them are encoded each for itself. The names of
special tokens in a text are text.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from aunet_jax.data import roles
from aunet_jax.splitting.vocabulary import byte_level_alphabet

# What Python's "surrogateescape" makes of bytes that are no UTF-8.
_INVALID = re.compile("([\udc80-\udcff])")


def _library():
  try:
    import tokenizers
  except ImportError:
    raise ValueError(
      "reading text as tokens needs the tokenizers library: "
      "pip install 'aunet_jax[bpe]', or pip install tokenizers."
    ) from None
  return tokenizers


class Tokenizer:
  """A `tokenizer.json` with a byte-level BPE vocabulary.

  Attributes:
    size: number of ids, the tokenizer's special ones included.
    bos, eos: `size` and `size` + 1. vocab_size: `size` + 2, what a model needs.
    num_bytes: int32 (vocab_size,), text bytes of every id; 0 for BOS and EOS.
    marks: int32, the tokens of the bytes that mark roles, as `roles.ALL`.
    hash: of the file's content.

  Raises: ValueError where the file is missing, or not byte-level BPE, or the
    `tokenizers` library is.
  """

  def __init__(self, path: str | Path):
    self.path = str(path)
    try:
      content = Path(path).read_bytes()
    except OSError as error:
      raise ValueError(
        f"data.tokenizer={str(path)!r}: {error.strerror}; name a "
        f"tokenizer.json, or make one with python -m aunet_jax.tokenizer."
      ) from None
    self.hash = hashlib.blake2b(content, digest_size=8).hexdigest()
    tokenizers = _library()
    try:
      self._encoder = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more precise
      raise ValueError(
        f"data.tokenizer={str(path)!r} is no tokenizer.json: {error}."
      ) from None
    self._encoder.encode_special_tokens = True
    self._encoder.no_truncation()
    self._encoder.no_padding()
    special = {
      token.content
      for token in self._encoder.get_added_tokens_decoder().values()
    }
    alphabet = byte_level_alphabet()
    vocabulary = self._encoder.get_vocab(with_added_tokens=True)
    self.size = max(vocabulary.values(), default=-1) + 1
    self._tokens = [b""] * self.size
    for token, number in vocabulary.items():
      if token in special:
        self._tokens[number] = token.encode()
      elif all(character in alphabet for character in token):
        self._tokens[number] = bytes(alphabet[c] for c in token)
    of_byte = {t[0]: n for n, t in enumerate(self._tokens) if len(t) == 1}
    if len(of_byte) < 256:
      raise ValueError(
        f"data.tokenizer={str(path)!r} has tokens for {len(of_byte)} of the "
        f"256 bytes; text of any kind needs all: use a byte-level BPE, as "
        f"python -m aunet_jax.tokenizer makes."
      )
    self._of_byte = of_byte
    self.marks = np.array([of_byte[mark] for mark in roles.ALL], np.int32)
    self.bos, self.eos = self.size, self.size + 1
    self.vocab_size = self.size + 2
    lengths = [*map(len, self._tokens), 0, 0]
    self.num_bytes = np.array(lengths, np.int32)
    self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

  def encode(self, text: bytes) -> np.ndarray:
    """The tokens of one document, `dtype` (n,), without BOS and EOS.

    Raises: ValueError where they are not the document's exact bytes: the
      tokenizer normalises, or adds to, what it reads.
    """
    ids = []
    for span in _INVALID.split(text.decode("utf-8", "surrogateescape")):
      if _INVALID.match(span):
        ids.append(self._of_byte[ord(span) - 0xDC00])
      elif span:
        ids += self._encoder.encode(span, add_special_tokens=False).ids
    back = self.decode(ids)
    if back != text:
      at = next(
        n
        for n, pair in enumerate(itertools.zip_longest(back, text))
        if pair[0] != pair[1]
      )
      raise ValueError(
        f"data.tokenizer={self.path!r} changes the text it reads: "
        f"{text[at : at + 20]!r} comes back as {back[at : at + 20]!r}. Bits "
        f"per byte need a tokenizer without normalizer and prefix space."
      )
    return np.array(ids, self.dtype)

  def decode(self, ids: Iterable[int]) -> bytes:
    """The bytes of tokens; BOS and EOS have none."""
    return b"".join(self._tokens[n] for n in ids if n < self.size)


# ----- making one -----------------------------------------------------------


def _spans(documents: Iterable[bytes]) -> Iterator[str]:
  """Valid text of documents."""
  for text in documents:
    yield from filter(
      None, _INVALID.split(text.decode("utf-8", "surrogateescape"))[::2]
    )


def train(documents: Iterable[bytes], vocab_size: int) -> str:
  """A tokenizer.json of `vocab_size` tokens, without special ones.

  Byte-level BPE over words as GPT-2 cuts them. Depends on the text alone.

  Raises: ValueError for a vocabulary smaller than the bytes, or larger than
    the text has merges for.
  """
  if vocab_size < 256:
    raise ValueError(f"--vocab_size={vocab_size} must hold the 256 bytes.")
  tokenizers = _library()
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.pre_tokenizer = level
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    show_progress=False,
    special_tokens=[],
    initial_alphabet=sorted(byte_level_alphabet()),
  )
  made.train_from_iterator(_spans(documents), trainer)
  if made.get_vocab_size() < vocab_size:
    raise ValueError(
      f"the text has {made.get_vocab_size()} tokens, fewer than "
      f"--vocab_size={vocab_size}; give more text or a smaller vocabulary."
    )
  return made.to_str(pretty=True)
