"""Bits per byte of a corpus."""

import dataclasses
import itertools
import lzma
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from aunet_jax.aunet import loss, network, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.aunet.sharding import Batch, to_device
from aunet_jax.config import BOS, EOS, MeshConfig
from aunet_jax.data import conversations, corpora, roles
from aunet_jax.evaluate import windows
from aunet_jax.workdir import load


def make_eval_step(model: AUNet) -> Callable:
  """(params, batch) -> sums over the batch, as float32/int32 scalars."""

  def eval_step(params, batch):
    logits_BLV = model.apply(
      {"params": params}, batch["bytes"], batch["levels"], batch["documents"]
    )
    nats_BL = loss.cross_entropy(logits_BLV, batch["targets"])
    num_targets, num_bytes = loss.count_targets(batch)
    return {
      "nats": (nats_BL * batch["weights"]).sum(),
      "targets": num_targets,
      "bytes": num_bytes,
    }

  return eval_step


def evaluate_batches(
  eval_step: Callable, params, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, float]:
  """Corpus totals of `eval_step` (jitted) over batches of local rows.

  Returns: nats, bytes, targets, loss_nats (per target), bits_per_byte.
  Raises: ValueError where the batches hold no text.
  """
  nats, num_bytes, num_targets = 0.0, 0, 0
  for batch in batches:
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
      sums = eval_step(params, to_device(batch, mesh))
    sums = jax.device_get(sums)
    nats += float(sums["nats"])  # float64: a float32 corpus sum loses digits
    num_bytes += int(sums["bytes"])
    num_targets += int(sums["targets"])
  if num_bytes == 0:
    raise ValueError("there is no text to evaluate: the data holds no bytes.")
  return {
    "nats": nats,
    "bytes": num_bytes,
    "targets": num_targets,
    "loss_nats": nats / num_targets,
    "bits_per_byte": loss.bits_per_byte(nats, num_bytes),
  }


def compressor_bits_per_byte(
  corpus: corpora.Corpus, max_bytes: int = 16 << 20
) -> dict[str, float]:
  """What `gzip -9` and `xz -9` need for the start of a corpus as one stream.

  Args: max_bytes: of it; both take about a second a megabyte. 0 = {}.
  """
  if max_bytes == 0:
    return {}
  packers = {
    "gzip -9": zlib.compressobj(9, wbits=31),
    "xz -9": lzma.LZMACompressor(preset=9),
  }
  sizes, total = dict.fromkeys(packers, 0), 0
  for _, content in corpus.documents():
    content = memoryview(content)[: max_bytes - total]
    total += len(content)
    for name, packer in packers.items():
      sizes[name] += len(packer.compress(content))
    if total == max_bytes:
      break
  for name, packer in packers.items():
    sizes[name] += len(packer.flush())
  return {name: 8 * size / total for name, size in sizes.items()}


# ----- the command ----------------------------------------------------------


@dataclasses.dataclass
class Sums:
  """Nats of targets and what they are summed over; EOS's apart as well."""

  nats: float = 0.0
  eos_nats: float = 0.0
  bytes: int = 0
  targets: int = 0
  windows: int = 0

  def add(self, other: "Sums") -> None:
    for field in dataclasses.fields(self):
      name = field.name
      setattr(self, name, getattr(self, name) + getattr(other, name))

  def to_json(self) -> dict:
    """Bits per byte are None where there is no byte."""

    def bits(nats):
      return loss.bits_per_byte(nats, self.bytes) if self.bytes else None

    return {
      "nats": self.nats,
      "bytes": self.bytes,
      "targets": self.targets,
      "loss_nats": self.nats / self.targets,
      "bits_per_byte": bits(self.nats),
      "bits_per_byte_without_eos": bits(self.nats - self.eos_nats),
    }


class Units(NamedTuple):
  """What a model reads: bytes, or tokens."""

  ids: tuple[int, int]  # of BOS and EOS
  marks: np.ndarray  # int32: of `roles.ALL`
  sizes: np.ndarray  # int32: text bytes of every id; 0 of BOS and EOS
  read: Callable[[bytes], np.ndarray]  # the ids of a text


def units_of(loaded: load.Loaded) -> Units:
  tokenizer = loaded.tokenizer
  if tokenizer is not None:
    ids = tokenizer.bos, tokenizer.eos
    return Units(ids, tokenizer.marks, tokenizer.num_bytes, tokenizer.encode)
  sizes = np.ones(loaded.model.config.vocab_size, np.int32)
  sizes[[BOS, EOS]] = 0
  return Units(
    (BOS, EOS), roles.ALL, sizes, lambda text: np.frombuffer(text, np.uint8)
  )


def score_windows(
  model: AUNet,
  params,
  rows: Iterable[list[windows.Window]],
  mesh: Mesh,
  batch_size: int,
  unit_bytes: np.ndarray,
  marks: np.ndarray | None = None,
) -> Iterator[tuple[int, Sums]]:
  """(document, sums) of every window, in order.

  Args:
    unit_bytes: text bytes of every id; 0 of what ends a document or an answer.
    marks: of roles, where documents are conversations, of which answers alone
      count.
  """

  def nats_of(params, batch):
    logits_BLV = model.apply(
      {"params": params}, batch["bytes"], batch["levels"], batch["documents"]
    )
    return loss.cross_entropy(logits_BLV, batch["targets"])

  step = jax.jit(nats_of, out_shardings=sharding.replicated(mesh))
  length = model.config.capacities[0]
  rows = iter(rows)
  while some := list(itertools.islice(rows, batch_size)):
    arrays = windows.batch(some, batch_size, length)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
      nats_BL = step(params, to_device(arrays, mesh))
    nats_BL = np.asarray(nats_BL, np.float64)  # a float32 sum loses digits
    for row, nats_L in zip(some, nats_BL, strict=False):
      at = 0
      for window in row:
        new = window.scored - window.start
        nats_N = nats_L[at + new : at + window.size]
        bytes_N = unit_bytes[window.targets[new:]]
        if marks is not None:
          learned_N = roles.in_answers(window.inputs, marks)[new:]
          nats_N, bytes_N = nats_N[learned_N], bytes_N[learned_N]
        yield (
          window.document,
          Sums(
            float(nats_N.sum()),
            float(nats_N[bytes_N == 0].sum()),
            int(bytes_N.sum()),
            len(nats_N),
            1,
          ),
        )
        at += window.size


def evaluate_workdir(
  workdir: str,
  paths: str,
  batch_size: int = 8,
  text_field: str = "text",
  official_scoring: bool = False,
  int8: bool = False,
  log: Callable = print,
  *,
  trust_rules: bool = False,
  stride: int | None = None,
  separator: str | None = None,
  compressor_bytes: int = 16 << 20,
  answers: bool = False,
  on_document: Callable[[dict], None] = lambda row: None,
) -> dict:
  """Bits per byte of any text under the model of a workdir.

  Args:
    official_scoring: leave out the norm before the output layer, as the
      official code's evaluation does (a defect; see docs/fidelity.md).
    int8: round matrices as generation with int8 does.
    trust_rules: see `aunet_jax.load`.
    stride: positions between the windows of a document that is longer than a
      row; None = they are disjoint.
    separator: between the documents of a text file, as `data.separator`.
    compressor_bytes: of the text to give to compressors for comparison.
    answers: records are conversations, as the model was tuned on; what it says
      counts, with the end of its turn for EOS, and compressors get nothing.
    on_document: takes the scores of every document, in order.
  Raises: ValueError, CheckpointError.
  """
  mesh = sharding.make_mesh(MeshConfig())
  shards = mesh.shape["data"]
  batch_size = -(-batch_size // shards) * shards
  loaded = load.load(workdir, mesh, trust_rules)
  model, tokenizer = loaded.model, loaded.tokenizer
  capacities = model.config.capacities
  turns = None
  if answers:
    if not loaded.splitter.has_roles:
      raise ValueError(
        f"--answers is for a model that was tuned on conversations, as that of "
        f"{workdir} was not (docs/finetuning.md); leave it out."
      )
    turns = conversations.make_reader(
      loaded.config.data, loaded.splitter, capacities, tokenizer
    )
    compressor_bytes = 0
  elif loaded.splitter.has_roles:
    log("records of conversations are scored with --answers, texts without")
  if stride is not None and not 1 <= stride <= capacities[0]:
    raise ValueError(
      f"--stride={stride} must be from 1 to the {capacities[0]} positions of "
      f"this model's rows."
    )
  if official_scoring:
    model = AUNet(dataclasses.replace(model.config, final_norm=False))
  params = loaded.params
  if int8:
    params = network.round_params(params, model.config)
  began = time.perf_counter()
  units = units_of(loaded)
  if answers:
    sizes = units.sizes.copy()
    sizes[units.marks[-1]] = 0  # END is no text
    units = units._replace(sizes=sizes)
  with tempfile.TemporaryDirectory() as cache:
    corpus = corpora.open_text(
      paths,
      loaded.splitter,
      capacities,
      cache,
      text_field,
      tokenizer,
      log,
      separator,
      turns,
    )
    names = []

    def all_windows():
      for number, (name, text) in enumerate(corpus.documents()):
        names.append(name)
        yield from windows.windows(
          number, units.read(text), loaded.splitter, capacities, stride,
          units.ids,
        )  # fmt: skip

    total, cuts = Sums(), 0
    scored = score_windows(
      model, params, windows.rows(all_windows(), capacities), mesh, batch_size,
      units.sizes, units.marks if answers else None,
    )  # fmt: skip
    for number, parts in itertools.groupby(scored, key=lambda pair: pair[0]):
      document = Sums()
      for _, sums in parts:
        document.add(sums)
      total.add(document)
      cuts += document.windows - 1
      on_document(
        {"name": names[number]}
        | document.to_json()
        | {"windows": document.windows}
      )
    if not total.bytes:
      raise ValueError("there is no text to evaluate: the data holds no bytes.")
    return {
      **total.to_json(),
      "eos_counted": True,
      "answers": answers,
      "documents": corpus.num_documents,
      "cuts": cuts,
      "stride": stride,
      "skipped": corpus.skipped,
      "compressors_bits_per_byte": compressor_bits_per_byte(
        corpus, compressor_bytes
      ),
      "compressors_bytes": min(compressor_bytes, corpus.num_bytes),
      "official_scoring": official_scoring,
      "int8": int8,
      "step": loaded.step,
      "seconds": time.perf_counter() - began,
    }
