"""A model as lm-evaluation-harness sees it (its `LM` interface).

Texts are their UTF-8 bytes, so a context and a continuation split exactly where
the task splits them. A request longer than a row of the model, the longest text
it was trained on, loses the left of its context; `truncated` counts those. A
model of tokens is asked in the same way, and its rows are counted in tokens.

As a conversation (`apply_chat_template`), a context is the turns of messages
with the marks of `data.roles`, an answer ends with END, and what is scored is a
choice and END. The harness hands such a context on as a `str` of one character
a byte (Latin-1), since no mark is UTF-8.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
from lm_eval.api.model import LM

from aunet_jax.data import roles
from aunet_jax.evaluate import windows
from aunet_jax.evaluate.bits_per_byte import score_windows, units_of
from aunet_jax.evaluate.score import score_units, units

# The harness counts what a model may write in tokens; these are many bytes.
BYTES_PER_TOKEN = 5
MAX_TOKENS = 256  # the harness's own default


@dataclasses.dataclass(frozen=True)
class Writing:
  """How a task wants text to be written; equal ones share a batch."""

  max_bytes: int
  stop: tuple[bytes, ...] = ()
  temperature: float = 0.0  # greedy
  top_p: float = 1.0
  top_k: int | None = None

  @classmethod
  def from_request(cls, options: dict) -> "Writing":
    """Args: options: of a task; those that change nothing here are ignored."""
    until = options.get("until") or ()
    until = [until] if isinstance(until, str) else until
    temperature = options.get("temperature")
    samples = options.get("do_sample", bool(temperature))
    tokens = options.get("max_gen_toks", MAX_TOKENS)
    return cls(
      max_bytes=int(tokens) * BYTES_PER_TOKEN,
      stop=tuple(encode(text) for text in until if text),
      temperature=float(1.0 if temperature is None else temperature)
      if samples
      else 0.0,
      top_p=float(options.get("top_p") or 1.0),
      top_k=options.get("top_k") or None,
    )


# Prompts and how to write, to what is written after each.
Write = Callable[[list[bytes], Writing], list[bytes]]


def encode(text: str) -> bytes:
  """UTF-8; halves of a surrogate pair, which JSON can hold, as they are."""
  return text.encode("utf-8", errors="surrogatepass")


class HarnessModel(LM):
  """Answers the harness's requests; results do not depend on their order.

  Attributes: truncated: requests that lost the left of their context. in_parts:
    of them, those whose continuation alone was longer than a row.
  """

  def __init__(
    self,
    loaded,
    mesh: jax.sharding.Mesh,
    write: Write,
    batch_size: int = 16,
    as_chat: bool = False,
  ):
    """Args: loaded: as `aunet_jax.load` gives it.

    write: writes text; the generator, or what replaces it in a test.
    as_chat: contexts come from `apply_chat_template`.
    Raises: ValueError where the model knows no roles.
    """
    if as_chat and not loaded.splitter.has_roles:
      raise ValueError(
        "--apply_chat_template is for a model that was tuned on conversations "
        "(docs/finetuning.md); leave it out."
      )
    super().__init__()
    self._loaded, self._mesh, self._write = loaded, mesh, write
    self.batch_size, self._as_chat = batch_size, as_chat
    self.truncated = self.in_parts = 0

  @property
  def max_bytes(self) -> int:
    """Of a request, or tokens: a row holds BOS as well."""
    return self._loaded.model.config.capacities[0] - 1

  @property
  def tokenizer_name(self) -> str:
    return "aunet_jax-roles"

  def chat_template(self, chat_template: bool | str = False) -> str:
    """The layout, for the harness's records."""
    return "F8 system F9 user FA assistant FB"

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """A context out of messages; without the prompt, the last one is open.

    Raises: ValueError for a role that there is not.
    """
    turns = [roles.turn_of(m["role"], m["content"]) for m in chat_history]
    begun = b""
    if not add_generation_prompt and turns[-1].role == "assistant":
      begun = turns.pop().text
    prompt = roles.encode_prompt(turns) + begun
    return prompt.decode("latin-1")

  def _context(self, text: str) -> bytes:
    if self._as_chat:
      return text.encode("latin-1")
    return encode(text)

  def _count(self, text: bytes) -> int:
    """Bytes, or tokens, of a text."""
    tokenizer = self._loaded.tokenizer
    return len(text if tokenizer is None else tokenizer.encode(text))

  def _fit(self, context: bytes, continuation: bytes, room: int) -> bytes:
    """What of a context takes, with a continuation, at most `room` of a row.

    Raises: ValueError where what an assistant has begun alone takes more.
    """
    excess = self._count(context + continuation) - room
    if excess <= 0:
      return context
    self.truncated += 1
    if self._as_chat:
      return self._forget(context, continuation, room)
    tokenizer, kept = self._loaded.tokenizer, len(context)
    if tokenizer is None:
      return context[excess:]
    # What is left may be cut into more tokens than it was; the last to go may
    # have held bytes of the continuation, which stay.
    while kept:
      ids = tokenizer.encode(context[len(context) - kept :] + continuation)
      if len(ids) <= room:
        break
      gone = tokenizer.num_bytes[ids[: len(ids) - room]].sum()
      kept = max(0, kept - int(gone))
    return context[len(context) - kept :]

  def _forget(self, context: bytes, continuation: bytes, room: int) -> bytes:
    """A conversation's oldest text goes, and no mark is left without its text.

    Raises: ValueError where what the assistant has begun alone does not fit.
    """
    turns = roles.decode(context)  # the last is the assistant's, still open

    def still_open(some):
      return roles.encode(some).removesuffix(roles.END_TEXT)

    shorter = roles.shorten(
      turns, lambda some: self._count(still_open(some) + continuation) <= room
    )
    if shorter is None:
      raise ValueError(
        f"an answer that is begun with {len(turns[-1].text)} bytes leaves no "
        f"room for a question in the {self.max_bytes} positions of a row."
      )
    return still_open(shorter)

  def _parts(self, context: bytes, continuation: bytes) -> list[tuple]:
    """What `score_units` takes for a pair, in one part or several.

    A continuation that is longer than a row is scored by half rows, each after
    the half row before it.
    """
    if self._count(continuation) <= self.max_bytes:
      context = self._fit(context, continuation, self.max_bytes)
      return [units(context, continuation, self._loaded.tokenizer)]
    self.truncated += 1
    self.in_parts += 1
    text, begin = units(context, continuation, self._loaded.tokenizer)
    parts = []
    for at in range(begin, len(text), self.max_bytes // 2):
      end = min(at + self.max_bytes // 2, len(text))
      start = max(0, end - self.max_bytes)
      parts.append((text[start:end], at - start))
    return parts

  def loglikelihood(self, requests, disable_tqdm: bool = False):
    """[(nats, whether greedy)] of every (context, continuation)."""
    texts, ends = [], []
    for context, continuation in (request.args for request in requests):
      continuation = encode(continuation)
      if self._as_chat:
        continuation += roles.END_TEXT
      texts += self._parts(self._context(context), continuation)
      ends.append(len(texts))
    scores = score_units(
      self._loaded.model.config,
      self._loaded.params,
      self._loaded.splitter,
      texts,
      batch_size=self.batch_size,
      tokenizer=self._loaded.tokenizer,
    )
    answers = [
      (sum(nats for nats, _ in some), all(greedy for _, greedy in some))
      for some in (scores[a:b] for a, b in itertools.pairwise([0, *ends]))
    ]
    self._keep("loglikelihood", requests, answers)
    return answers

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
    """[nats] of texts without EOS, in windows as `evaluate` reads them."""
    capacities = self._loaded.model.config.capacities
    units = units_of(self._loaded)
    parts = itertools.chain.from_iterable(
      windows.windows(
        number,
        units.read(encode(request.args[0])),
        self._loaded.splitter,
        capacities,
        ids=units.ids,
      )
      for number, request in enumerate(requests)
    )
    shards = self._mesh.shape["data"]
    nats = [0.0] * len(requests)
    for number, sums in score_windows(
      self._loaded.model,
      self._loaded.params,
      windows.rows(parts, capacities),
      self._mesh,
      -(-self.batch_size // shards) * shards,
      units.sizes,
    ):
      nats[number] -= sums.nats - sums.eos_nats
    self._keep("loglikelihood_rolling", requests, nats)
    return nats

  def generate_until(self, requests, disable_tqdm: bool = False):
    """Texts, each up to the first of its stop strings."""
    groups: dict[Writing, list[int]] = {}
    for number, request in enumerate(requests):
      writing = Writing.from_request(request.args[1])
      most = writing.max_bytes
      if self._loaded.tokenizer is None:  # a text of tokens ends with the row
        most = min(most, self.max_bytes // 2)
      stop = writing.stop + (roles.END_TEXT,) * self._as_chat
      writing = dataclasses.replace(writing, max_bytes=most, stop=stop)
      groups.setdefault(writing, []).append(number)
    texts = [""] * len(requests)
    for writing, numbers in groups.items():
      # A prompt keeps half a row, however much a task lets a model write.
      room = self.max_bytes - min(writing.max_bytes, self.max_bytes // 2)
      prompts = {
        n: self._fit(self._context(requests[n].args[0]), b"", room)
        for n in numbers
      }
      numbers = sorted(numbers, key=lambda n: (len(prompts[n]), n))
      for first in range(0, len(numbers), self.batch_size):
        some = numbers[first : first + self.batch_size]
        written = self._write([prompts[n] for n in some], writing)
        for n, data in zip(some, written, strict=True):
          texts[n] = data.decode("utf-8", errors="replace")
    self._keep("generate_until", requests, texts)
    return texts

  def _keep(self, kind: str, requests, answers: Sequence) -> None:
    """Into the harness's cache, where it has one (`--use_cache`)."""
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial(kind, request.args, answer)
