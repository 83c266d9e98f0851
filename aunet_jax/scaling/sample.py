"""The text of a study: what its rows hold, and a name for its files."""

import dataclasses
import hashlib
import json
import math
import os

from aunet_jax.config import ModelConfig
from aunet_jax.data import packing, planner, reading, sources
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.scaling import laws
from aunet_jax.splitting.splitter import Splitter

SAMPLE_ROWS = 400  # of text, to measure how full rows get


class Sample:
  """Text of the corpus, to fit capacities to it. Without text, the paper's.

  Args: paths: as data.train. row_bytes: positions of a row. tokenizer: of the
    models that read tokens. text_field, separator: as those of data.
  Attributes: bytes_per_token: of this text; without text, the paper's.
  Raises: ValueError for paths without text, or too little of it.
  """

  def __init__(
    self,
    paths: str | None,
    row_bytes: int,
    tokenizer: Tokenizer | None = None,
    text_field: str = "text",
    separator: str | None = None,
  ):
    self.row_bytes, self.documents = row_bytes, None
    self.tokenizer, self.bytes_per_token = tokenizer, laws.BYTES_PER_TOKEN
    self.fingerprint = None
    self._known = {}
    if paths is not None:
      skips = reading.SkipLog(reading.log_to_stderr)
      self.fingerprint = fingerprint(paths)
      self.documents = sources.sample(
        paths, text_field, SAMPLE_ROWS * row_bytes, skips.add, separator
      )
      skips.finish()
    if tokenizer is not None and self.documents is not None:
      self._tokens = [tokenizer.encode(text) for text in self.documents]
      self.bytes_per_token = sum(map(len, self.documents)) / sum(
        map(len, self._tokens)
      )

  def fit_tokens(
    self, model: ModelConfig
  ) -> tuple[ModelConfig, tuple[float, ...]]:
    """As `fit`, for rows of tokens that hold as many bytes as the others.

    Raises: ValueError where there is text, but no tokenizer for it.
    """
    length = max(2, round(self.row_bytes / self.bytes_per_token))
    fill, vocab_size = 1.0, model.vocab_size
    if self.documents is not None:
      if self.tokenizer is None:
        raise ValueError(
          "--models=bpe reads tokens of your text: name a --tokenizer; "
          "python -m aunet_jax.tokenizer makes one."
        )
      packer = packing.Packer(Splitter(()), [length])
      rows = [
        row
        for number, tokens in enumerate(self._tokens)
        for row in packer.add(number, tokens)
      ]
      rows += packer.finish()
      fill = float(packer.used_S[0] / (len(rows) * length))
      vocab_size = self.tokenizer.vocab_size
    (stage,) = model.stages
    stage = dataclasses.replace(stage, capacity=length)
    model = dataclasses.replace(model, stages=(stage,), vocab_size=vocab_size)
    return model, (fill,)

  def fit(self, model: ModelConfig) -> tuple[ModelConfig, tuple[float, ...]]:
    """The model for rows of this text, and the share of slots it fills."""
    if self.documents is None:
      share = self.row_bytes / model.capacities[0]
      capacities = tuple(math.ceil(c * share) for c in model.capacities)
      fill = (1.0,) * model.num_stages
    else:
      if model.rules not in self._known:
        self._known[model.rules] = planner.recommend(
          self.documents, Splitter(model.rules), self.row_bytes
        )
      plan = self._known[model.rules]
      capacities, fill = plan.capacities, plan.fill
    stages = tuple(
      dataclasses.replace(stage, capacity=capacity)
      for stage, capacity in zip(model.stages, capacities, strict=True)
    )
    return dataclasses.replace(model, stages=stages), tuple(fill)


def fingerprint(paths: str) -> str:
  """Names a set of files by their names and sizes.

  Training checks the text itself; this tells studies of other text apart.
  """
  files, _ = sources.list_sources(paths)
  names = []
  for file in files:
    local = os.path.isfile(file.path)
    size = os.path.getsize(file.path) if local else None
    names.append([os.path.basename(file.path), size])
  text = json.dumps(sorted(names, key=str))
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
