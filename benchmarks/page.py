"""Draws the committed results into docs/benchmarks.md and its pictures.

  python -m benchmarks.page

Reads `benchmarks/results/*.json` and `*.jsonl`; a file whose results it does
not know is listed by name and command. Every figure comes with the file,
device and command it comes from.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import compare_models, recipes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


def read(path: Path) -> list[dict]:
  text = path.read_text()
  if path.suffix == ".jsonl":
    return [json.loads(line) for line in text.splitlines() if line.strip()]
  return [json.loads(text)]


def table(header: list[str], rows: list[list]) -> list[str]:
  lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
  for row in rows:
    cells = [f"{x:,.3g}" if isinstance(x, float) else str(x) for x in row]
    lines.append("| " + " | ".join(cells) + " |")
  return [*lines, ""]


def train_section(result: dict) -> list[str]:
  rows = []
  for name, m in result["models"].items():
    ratio = m.get("ratio_to_paper_h100")
    rows.append(
      [
        name,
        f"{m['bytes_per_second']:,.0f}",
        "" if ratio is None else f"{ratio:.2f}x",
        f"{m['useful_mfu']:.1%}" if "useful_mfu" in m else "",
        m["rows"],
        " ".join(m.get("attention", [])),
      ]
    )
  when = f", {result['when']}" if "when" in result else ""
  lines = [f"Training, whole steps{when}.", ""]
  lines += table(
    [
      "model",
      "bytes/s",
      "of the paper's, per H100",
      "useful MFU",
      "rows",
      "attention",
    ],
    rows,
  )
  for name, m in result["models"].items():
    if "where_time_goes" in m:
      shares = list(m["where_time_goes"].items())[:12]
      lines += [f"Where a step of {name} goes:", ""]
      lines += table(["part", "share"], [[p, f"{s:.1%}"] for p, s in shares])
  return lines


def attention_section(result: dict) -> list[str]:
  rows = [
    [
      stage,
      kernel,
      row["forward_ms"],
      row["forward_backward_ms"],
      f"{row['speed_of_xla']:.2f}x",
      f"{row['temporary_mib']:.0f}",
      f"{row['error']:.1e}" if "error" in row else "",
    ]
    for stage, kernels in result["stages"].items()
    for kernel, row in kernels.items()
  ]
  header = ["stage", "kernel", "forward ms", "with gradients ms"]
  header += ["speed of xla", "MiB", "error"]
  title = f"Attention, the shapes of {result['shapes']} in {result['dtype']}."
  return [title, "", *table(header, rows)]


def upsample_section(result: dict) -> list[str]:
  dense = result["table"]["dense"]
  rows = [
    [
      name,
      kind,
      row["ms"],
      f"{row['ms'] / dense[kind]['ms']:.2f}x",
      f"{row['flops_over_dense']:.3f}x" if "flops_over_dense" in row else "",
      f"{row['temporary_mib']:.0f}",
    ]
    for name, kinds in result["table"].items()
    for kind, row in kinds.items()
  ]
  title = f"Multi-linear upsampling, the shapes of {result['shapes']} in "
  title += f"{result['dtype']}; the TPU's kernel would multiply "
  title += f"{result['tpu_rows_over_dense']:.3f}x the rows."
  header = ["product", "what", "ms", "time of dense", "FLOPs of dense", "MiB"]
  return [title, "", *table(header, rows)]


def decode_section(line: dict) -> list[str]:
  best = max(r["decode_bytes_per_second"] for r in line["schedules"].values())
  facts = [
    f"Decoding {line['model']}, batch {line['batch']}: {best:,.0f} bytes/s"
  ]
  if "ratio_to_flat" in line:
    facts.append(f"{line['ratio_to_flat']:.2f}x a flat byte transformer")
  if "ratio_to_forward" in line:
    facts.append(f"{line['ratio_to_forward']:.1f}x a forward pass per byte")
  if "memory_bandwidth_share" in line:
    facts.append(f"{line['memory_bandwidth_share']:.0%} of memory bandwidth")
  return [", ".join(facts) + ".", ""]


def aot_section(result: dict) -> list[str]:
  rows = []
  for case in result["cases"]:
    fits = case.get("largest", {}).get("rows_per_chip", "")
    for rows_per_chip, found in case["gib_by_rows_per_chip"].items():
      rows.append(
        [
          case["config"],
          case["device"],
          case["when"],
          rows_per_chip,
          "does not fit" if found is None else f"{found['total']:.2f}",
          fits,
        ]
      )
  header = ["config", "chip", "kernels", "rows a chip", "GiB", "most rows"]
  lines = ["Compiled ahead of time; nothing ran.", "", *table(header, rows)]
  rows = [
    [
      case["config"],
      case["device"],
      case["when"],
      case["pieces"]["rows"],
      ", ".join(f"{x:,.0f}" for x in case["pieces"]["attention_mib"]),
      ", ".join(f"{x:,.0f}" for x in case["pieces"]["upsampling_mib"]),
    ]
    for case in result["cases"]
    if "pieces" in case
  ]
  header = ["config", "chip", "kernels", "rows"]
  header += ["attention MiB, by stage", "upsampling MiB"]
  return [*lines, *table(header, rows)]


def time_section(result: dict) -> list[str]:
  """A program compiled ahead of time, and what its compiler predicts."""
  program = result["programs"]["train"]
  time, needed = program["time"], program["memory"]["needed"]
  return [
    f"{result['when']}, `{result['command']}`: "
    f"{time['seconds'] * 1e3:,.1f} ms a step, useful MFU "
    f"{time['predicted_useful_mfu']:.1%}, {time['in_products']:.0%} in "
    f"products, {needed / 2**30:.1f} GiB of a chip.",
    "",
  ]


def numerics_section(result: dict, picture: Path) -> list[str]:
  figure, axes = plt.subplots(figsize=(7, 3.5))
  for name, values in result["curves"].items():
    axes.plot(values, label=name.replace("_", ", "), linewidth=1)
  axes.set(xlabel="step", ylabel="bits per byte")
  axes.legend()
  figure.savefig(picture, bbox_inches="tight", metadata={"Date": None})
  plt.close(figure)
  return [
    f"Loss of {result['steps']} steps: bfloat16 differs from float32 by "
    f"{result['difference_bfloat16']:.4f} bits per byte (mean over the last "
    f"half), another seed by {result['difference_other_seed']:.4f}.",
    "",
    f"![Loss in bfloat16 and float32]({picture.name})",
    "",
  ]


def section(result: dict, name: str) -> list[str]:
  """One result as Markdown; what it is shows in its keys."""
  if "failed" in result and len(result) <= 2:
    return [f"{name}: {result['failed']}.", ""]
  if "cases" in result:
    return aot_section(result)
  if "programs" in result:
    return time_section(result)
  if "curves" in result:
    return numerics_section(result, PAGE.parent / f"{name}.svg")
  if "trivial" in result:
    return [compare_models.shown(result), ""]
  if "sweeps" in result:
    return [recipes.shown(result), ""]
  if "models" in result:
    return train_section(result)
  if "schedules" in result:
    return decode_section(result)
  if "stages" in result and "shapes" in result:
    return attention_section(result)
  if "tpu_rows_over_dense" in result:
    return upsample_section(result)
  if "stops" in result or "faults" in result:
    return [interrupted(result), ""]
  return [f"`{result.get('command', name)}`: see the file.", ""]


def interrupted(result: dict) -> str:
  """What `stops` and `faults` found: they print nothing where it is wrong."""
  what = "stops" if "stops" in result else "faults"
  kinds = {
    kind: found["stops"] if what == "stops" else found
    for kind, found in sorted(result["kinds"].items())
  }
  listed = ", ".join(f"{kind} {number}" for kind, number in kinds.items())
  apart = result.get("losses_apart_where_the_mesh_changed", 0)
  return (
    f"{result[what]} {what} ({listed}), {result['starts']} starts, "
    f"{result['minutes']} minutes: no step lost or repeated, "
    + (
      f"each loss within {apart:.2g} of itself, where the mesh changed."
      if apart
      else "each loss the same to the last bit."
    )
  )


def main() -> None:
  plt.rcParams["svg.hashsalt"] = "aunet_jax"  # the same file every time
  lines = [
    "# Benchmarks",
    "",
    "Drawn by `python -m benchmarks.page` from `benchmarks/results/`. Speeds "
    "of different files come from different machines or days; ratios within "
    "one file do not.",
    "",
  ]
  for path in sorted(RESULTS.glob("*.json*")):
    results = read(path)
    lines += [f"## {path.name}", ""]
    first = results[0]
    about = [f"`{first['command']}`"] if "command" in first else []
    about += [f"{first[k]}" for k in ("device", "commit", "date") if k in first]
    lines += [", ".join(about), ""]
    for result in results:
      parts = result.get("results", {path.stem: result})
      for name, part in parts.items():
        lines += section(part, name)
  PAGE.write_text("\n".join(lines).rstrip() + "\n")
  print(f"wrote {PAGE}")


if __name__ == "__main__":
  main()
