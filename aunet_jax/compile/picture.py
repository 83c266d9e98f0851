"""Predicted times of programs as bars: one per part, coloured by pass."""

from collections.abc import Mapping
from pathlib import Path

COLOURS = {  # Okabe and Ito's, made for colour-blind eyes
  "forward": "#0072b2",
  "backward": "#d55e00",
  "repeated": "#a87000",
  "update": "#777777",
}
MOST_BARS = 24  # of a program; what is left is one bar more


def bars(time: dict) -> list[tuple[str, dict[str, float]]]:
  """(label, share of the time by pass) of every part, the longest first.

  Args: time: as `step_time.predict` gives it.
  """
  total, found = time["total_cycles"] or 1.0, {}
  for entry in time["parts"]:
    stage = "" if entry["stage"] is None else f"stage {entry['stage']}: "
    shares = found.setdefault(stage + entry["part"], {})
    shares[entry["pass"]] = entry["cycles"] / total
  ordered = sorted(found.items(), key=lambda bar: -sum(bar[1].values()))
  rest: dict[str, float] = {}
  for _, shares in ordered[MOST_BARS:]:
    for which, share in shares.items():
      rest[which] = rest.get(which, 0.0) + share
  return ordered[:MOST_BARS] + [("all else", rest)] * bool(rest)


def title(name: str, time: dict) -> str:
  parts = [f"{name}: {time['seconds'] * 1e3:,.0f} ms, {time['method']}"]
  if "predicted_useful_mfu" in time:
    parts.append(f"useful MFU {time['predicted_useful_mfu']:.0%}")
  parts.append(f"{time['in_products']:.0%} in products")
  return ", ".join(parts)


def draw(times: Mapping[str, dict], path: str | Path) -> None:
  """Writes a picture of programs' times (name -> time), below one another.

  Args: path: its ending says the format (.svg, .png, .pdf).
  """
  import matplotlib
  import matplotlib.figure

  rows = {name: bars(time) for name, time in times.items()}
  height = sum(0.24 * len(some) + 0.9 for some in rows.values())
  figure = matplotlib.figure.Figure((8, height), layout="constrained")
  sizes = [len(some) + 2 for some in rows.values()]
  axes = figure.subplots(len(rows), squeeze=False, height_ratios=sizes)[:, 0]
  for axis, (name, some) in zip(axes, rows.items(), strict=True):
    left = [0.0] * len(some)
    for which, colour in COLOURS.items():
      widths = [100 * shares.get(which, 0.0) for _, shares in some]
      axis.barh(range(len(some)), widths, left=left, color=colour, label=which)
      left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(some)), [label for label, _ in some], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("% of the predicted time", fontsize=8)
    axis.set_title(title(name, times[name]), fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].legend(fontsize=8, frameon=False, loc="lower right")
  with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
    figure.savefig(path)
