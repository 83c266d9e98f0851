"""Bits per byte of a corpus."""

import dataclasses
import gzip
import lzma
import tempfile
import time
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
from jax.sharding import Mesh

from aunet_jax.aunet import loss, quantize, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.aunet.sharding import Batch, to_device
from aunet_jax.config import DataConfig, MeshConfig
from aunet_jax.data import loader
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


def compressor_bits_per_byte(corpus: loader.Corpus) -> dict[str, float]:
  """What `gzip -9` and `xz -9` need for the corpus as one stream."""
  text = b"".join(content for _, content in corpus.documents())
  return {
    "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
    "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
  }


# ----- the command ----------------------------------------------------------


def evaluate_workdir(
  workdir: str,
  paths: str,
  batch_size: int = 8,
  text_field: str = "text",
  official_scoring: bool = False,
  int8: bool = False,
  log: Callable = print,
  trust_rules: bool = False,
) -> dict:
  """Bits per byte of any text under the model of a workdir.

  Args:
    official_scoring: leave out the norm before the output layer, as the
      official code's evaluation does (a defect; see docs/fidelity.md).
    int8: round matrices as generation with int8 does.
    trust_rules: see `aunet_jax.load`.
  Raises: ValueError, CheckpointError.
  """
  mesh = sharding.make_mesh(MeshConfig())
  shards = mesh.shape["data"]
  batch_size = -(-batch_size // shards) * shards
  loaded = load.load(workdir, mesh, trust_rules)
  model = loaded.model
  if official_scoring:
    model = AUNet(dataclasses.replace(model.config, final_norm=False))
  params = loaded.params
  if int8:
    params = quantize.round_params(params, model.config.upsampling)
  began = time.perf_counter()
  with tempfile.TemporaryDirectory() as cache:
    corpus, _ = loader.open_corpora(
      DataConfig(
        train=paths,
        heldout_fraction=0.0,
        text_field=text_field,
        tokenizer=loaded.tokenizer.path if loaded.tokenizer else None,
      ),
      loaded.splitter,
      loaded.config.model.capacities,
      cache_dir=cache,
      log=log,
    )
    step = jax.jit(
      make_eval_step(model), out_shardings=sharding.replicated(mesh)
    )
    totals = evaluate_batches(
      step,
      params,
      loader.evaluation_batches(corpus, batch_size=batch_size),
      mesh,
    )
    packed = compressor_bits_per_byte(corpus)
    return {
      **totals,
      "eos_counted": True,
      "documents": corpus.num_documents,
      "cuts": corpus.num_cuts,
      "skipped": corpus.skipped,
      "compressors_bits_per_byte": packed,
      "official_scoring": official_scoring,
      "int8": int8,
      "step": loaded.step,
      "seconds": time.perf_counter() - began,
    }
