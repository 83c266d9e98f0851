"""Parameters, FLOPs and memory of a run, from its config alone.

    python -m aunet_jax.counts --config=configs/aunet2_1b.py
    python -m aunet_jax.counts --config=configs/aunet2_1b.py --json
    python -m aunet_jax.counts --config=configs/aunet2_1b.py \\
        --contraction=4.92 --config.model.upsampling=repeat

Three kinds of FLOPs, never mixed; a multiplication and an addition are two:

  paper    training FLOPs per byte by the official code's estimator (paper
           Section 2.3 and Appendix A): no transitions, full stages.
  padded   what the device runs: every slot, attention's whole key blocks,
           multi-linear upsampling's padded groups. For CPU kernels, if no
           platform is named.
  useful   the same products at real positions and unmasked keys only.

Norms, softmax and other elementwise work are in none of them. Training is three
times the forward pass; what rematerialisation recomputes is given separately.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np

from aunet_jax import config as config_lib
from aunet_jax import terminal
from aunet_jax.aunet.counts import report
from aunet_jax.config import ModelConfig
from aunet_jax.train.optimizer import state_bytes


def _short(value: float) -> str:
  """Four digits and a decimal prefix: 1.324 G."""
  for prefix in ("", " k", " M", " G", " T"):
    if abs(value) < 999.95 or prefix == " T":
      return f"{value:.4g}{prefix}"
    value /= 1000
  raise AssertionError("the loop always returns")


def table(result: dict) -> str:
  """A report as text to read."""
  header = (
    "stage", "slots", "real", "dim", "blocks", "params", "useful", "padded",
    "share", "saved",
  )  # fmt: skip
  total = sum(
    sum(s["padded_forward_flops_per_row"].values()) for s in result["stages"]
  )
  rows = [header]
  for number, s in enumerate(result["stages"], start=1):
    padded = sum(s["padded_forward_flops_per_row"].values())
    rows.append(
      (
        f"{number}",
        f"{s['capacity']:,}",
        f"{s['positions']:,.0f}",
        f"{s['dim']:,}",
        f"{s['num_layers']}",
        _short(sum(s["parameters"].values())),
        _short(sum(s["useful_forward_flops_per_row"].values())),
        _short(padded),
        f"{padded / total:.1%}",
        _short(s["activation_bytes_per_row"]) + "B",
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True))
    for row in rows
  ]
  lines += ["", "useful, padded: forward FLOPs of a row. saved: for backward."]
  kinds = {}
  for s in result["stages"]:
    for kind, count in s["parameters"].items():
      kinds[kind] = kinds.get(kind, 0) + count
  facts = [("parameters", f"{result['parameters']:,}")]
  facts += [(f"  {kind}", f"{count:,}") for kind, count in kinds.items()]
  facts.append(("FLOPs per byte, training", ""))
  for name, key in (
    ("paper's accounting", "paper_train_flops_per_byte"),
    ("useful", "useful_train_flops_per_byte"),
    ("padded", "padded_train_flops_per_byte"),
    ("repeated backward", "remat_flops_per_byte"),
  ):
    facts.append((f"  {name}", _short(result[key])))
  facts.append(("useful / padded", f"{result['useful_over_padded']:.3f}"))
  facts.append(("memory", ""))
  for name, size in result["memory_bytes"].items():
    facts.append((f"  {name.replace('_', ' ')}", _short(size) + "B"))
  width = max(len(name) for name, _ in facts)
  size = max(len(text) for _, text in facts)
  lines += [""]
  lines += [f"{n:<{width}}  {t:>{size}}".rstrip() for n, t in facts]
  return "\n".join(lines)


def _numbers(text: str, option: str) -> list[float]:
  try:
    values = [float(part) for part in text.split(",")]
  except ValueError:
    values = [0.0]
  if not all(np.isfinite(value) and value > 0 for value in values):
    raise ValueError(
      f"{option}={text!r} must be positive numbers joined by commas."
    )
  return values


def _positions(args, model: ModelConfig) -> list[float] | None:
  """Real positions of an average row; None: every slot."""
  if args.positions is not None:
    positions = _numbers(args.positions, "--positions")
    for n, capacity in zip(positions, model.capacities, strict=False):
      if n > capacity:
        raise ValueError(
          f"--positions: {n:g} do not fit in a stage of {capacity} slots."
        )
    return positions
  if args.contraction is None:
    return None
  factors = [1.0, *_numbers(args.contraction, "--contraction")]
  if len(factors) != model.num_stages:
    raise ValueError(
      f"--contraction={args.contraction} has {len(factors) - 1} numbers; "
      f"the model has {model.num_stages - 1} stages below the bytes."
    )
  row = min(np.multiply(factors, model.capacities))
  return [float(row / factor) for factor in factors]


@terminal.command
def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m aunet_jax.counts",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="--config=FILE and --config.a.b=VALUE choose and edit the config.",
    allow_abbrev=False,
  )
  parser.add_argument(
    "--json", action="store_true", help="print one JSON object"
  )
  real = parser.add_mutually_exclusive_group()
  real.add_argument(
    "--positions",
    metavar="N,N,…",
    help="real positions of an average row, one per stage (default: all slots)",
  )
  real.add_argument(
    "--contraction",
    metavar="K,…",
    help="bytes per position of stages 2, 3, … in your text; rows are as "
    "full as the stage that fills first allows",
  )
  args, rest = parser.parse_known_args(argv)
  config = config_lib.parse_flags(rest)
  positions = _positions(args, config.model)
  result = report(config.model, positions, state_bytes(config))
  print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
  sys.exit(main())
