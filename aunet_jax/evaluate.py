"""Bits per byte of text under a trained model, over a whole corpus.

  python -m aunet_jax.evaluate --workdir=runs/quickstart --data='books/*.txt'

The figure is total nats / (ln 2 * text bytes), EOS counted in the nats (see
`loss.py`), never a mean of per-document means; for models of bytes and of
tokens alike. Documents are packed into the rows the model was trained on; one
longer than a row continues in the next as a fresh context.
"""

import argparse
import dataclasses
import gzip
import json
import lzma
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from aunet_jax import checkpoint, data, loss, quantize, sharding
from aunet_jax.aunet import AUNet
from aunet_jax.config import DataConfig, MeshConfig

Batch = dict[str, np.ndarray]


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


def to_device(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a global batch, placed on its devices."""
  where = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(where, value)
    for name, value in batch.items()
  }


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


def compressor_bits_per_byte(corpus: data.Corpus) -> dict[str, float]:
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
) -> dict:
  """Bits per byte of any text under the model of a workdir.

  Args:
    official_scoring: leave out the norm before the output layer, as the
      official code's evaluation does (a defect; see docs/fidelity.md).
    int8: round matrices as generation with int8 does.
  Raises: ValueError, CheckpointError.
  """
  mesh = sharding.make_mesh(MeshConfig())
  shards = mesh.shape["data"]
  batch_size = -(-batch_size // shards) * shards
  loaded = checkpoint.load(workdir, mesh)
  model = loaded.model
  if official_scoring:
    model = AUNet(dataclasses.replace(model.config, final_norm=False))
  params = loaded.params
  if int8:
    params = quantize.round_params(params, model.config.upsampling)
  began = time.perf_counter()
  with tempfile.TemporaryDirectory() as cache:
    corpus, _ = data.open_corpora(
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
      data.evaluation_batches(corpus, batch_size=batch_size),
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


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="the last line of the output is one JSON object; eos_counted says\n"
    "that the nats of each document's EOS are in bits_per_byte.",
  )
  parser.add_argument("--workdir", required=True, help="a trained run")
  parser.add_argument(
    "--data",
    required=True,
    help="text, JSONL, Parquet, … : file, directory or glob; several joined "
    "by commas",
  )
  parser.add_argument(
    "--batch_size", type=int, default=8, help="rows at a time (default 8)"
  )
  parser.add_argument(
    "--text_field", default="text", help="field of JSONL and Parquet records"
  )
  parser.add_argument(
    "--official_scoring",
    action="store_true",
    help="score as the official evaluation does, without the final norm",
  )
  parser.add_argument(
    "--int8",
    action="store_true",
    help="with matrices rounded to int8, as generation with --int8",
  )
  args = parser.parse_args(argv)
  if args.batch_size < 1:
    parser.error(f"--batch_size={args.batch_size} must be positive")
  try:
    result = evaluate_workdir(
      args.workdir,
      args.data,
      args.batch_size,
      args.text_field,
      args.official_scoring,
      args.int8,
    )
  except (ValueError, OSError, checkpoint.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(
    f"{result['bits_per_byte']:.4f} bits per byte over {result['bytes']:,} "
    f"bytes of {result['documents']:,} documents"
  )
  print(json.dumps(result))
  return 0


if __name__ == "__main__":
  sys.exit(main())
