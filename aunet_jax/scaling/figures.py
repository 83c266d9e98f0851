"""The charts of a study, drawn from its fits and its table."""

import re

from aunet_jax.scaling.draw import Chart, Series
from aunet_jax.scaling.study import Table

SIZE_NAMES = {
  "flops_per_byte": "size (training FLOPs per byte)",
  "params": "size (parameters)",
}

# Method -> name and dash in charts that compare methods.
METHODS = {
  "isoflop": ("IsoFLOP", 0),
  "vpnls": ("variable projection", 1),
  "huber": ("Huber", 2),
}


def anchor(run_id: str) -> str:
  """The place of a run in the report's table of runs."""
  return "run-" + re.sub(r"[^A-Za-z0-9.@_-]", "-", run_id)


def slug(name: str) -> str:
  return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def charts(result: dict, table: Table) -> list[Chart]:
  """Every chart the data have something for, in the order of the report."""
  found = [_loss(result), _difference(result)]
  for name in result["models"]:
    found.append(_valleys(result, name))
  found += [_allocation(result), _fill(result, table), _residuals(result)]
  return [chart for chart in found if chart is not None]


def _points(cells, x, y, style, label, unit, **extra) -> Series:
  return Series(
    label,
    x,
    y,
    style,
    names=[
      f"{cell['name']}: {cell['loss']:.4f} {unit}, {cell['budget']:.3g} FLOPs"
      for cell in cells
    ],
    links=[anchor(cell["ids"][0]) for cell in cells],
    **extra,
  )


def _shown_law(model: dict, *names: str) -> dict:
  """The first fit that has residuals of its own, or else one without; {}."""
  entries = [model[name] for name in names if "curve" in model[name]]
  free = [entry for entry in entries if entry["degrees_of_freedom"] > 0]
  return next(iter([*free, *entries]), {})


def _loss_curve(model: dict) -> dict | None:
  """The law of loss against compute: of a ladder, or through the valleys."""
  through = model["isoflop"].get("loss_law", {})
  entry = through if "curve" in through else None
  return (entry or _shown_law(model, "power_law", "no_offset")).get("curve")


def _loss(result: dict) -> Chart:
  unit = result["units"]["loss"]
  series = []
  for style, (name, model) in enumerate(result["models"].items()):
    curve = _loss_curve(model)
    if curve is not None:
      series.append(
        Series(
          name, curve["x"], curve["value"], style, "line",
          curve["low"], curve["high"],
        )
      )  # fmt: skip
    best = {}
    for cell in model["cells"]:
      if (
        cell["budget"] not in best
        or cell["loss"] < best[cell["budget"]]["loss"]
      ):
        best[cell["budget"]] = cell
    cells = list(best.values())
    for cell in cells if len(cells) <= 40 else ():
      if len(cell["losses"]) > 1:
        x = [cell["compute"]] * len(cell["losses"])
        series.append(
          Series(
            None, x, cell["losses"], style,
            names=[f"{run}: {v:.4f} {unit}"
                   for run, v in zip(cell["ids"], cell["losses"], strict=True)],
            links=[anchor(run) for run in cell["ids"]],
            hollow=True, size=2.6,
          )
        )  # fmt: skip
    series.append(
      _points(
        cells, [c["compute"] for c in cells], [c["loss"] for c in cells],
        style, name, unit,
      )
    )  # fmt: skip
  return Chart(
    "loss",
    f"Loss against {result['units']['compute']}",
    "Filled: the best cell of a budget, mean of its seeds; hollow: every seed. "
    "Lines: the fitted law (without an offset where the budgets are too few "
    "to show one), drawn on to three times the largest compute; "
    "shaded: its 95% interval, cut where it would leave the chart.",
    result["units"]["compute"],
    unit,
    series,
  )


def _difference(result: dict) -> Chart | None:
  rows = result["comparison"]
  if not rows:
    return None
  names = list(result["models"])
  series = []
  for name in names:
    x, y, low, high, titles = [], [], [], [], []
    for row in rows:
      entry = row["models"].get(name, {}).get("difference")
      if entry:
        x.append(row["budget"])
        y.append(entry["value"])
        # Without seeds there is no interval: whiskers of no length.
        low.append(entry["value"] if entry["low"] is None else entry["low"])
        high.append(entry["value"] if entry["high"] is None else entry["high"])
        titles.append(f"{name}: {entry['value']:+.4f}")
    if x:
      series.append(
        Series(name, x, y, names.index(name), "line", dash=names.index(name))
      )
      series.append(
        Series(name, x, y, names.index(name), "points", low, high, titles)
      )
  return (
    Chart(
      "difference",
      f"Loss less that of {rows[0]['reference']}, at equal budget",
      "Below the line is better. Whiskers: 95% interval of the difference of "
      "two means of seeds (Welch); none where a cell has one seed.",
      "budget (FLOPs without the head)",
      result["units"]["loss"],
      series,
      y_log=False,
      zero_line=True,
    )
    if series
    else None
  )


def _valleys(result: dict, name: str) -> Chart | None:
  model = result["models"][name]
  if "valleys" not in model["isoflop"]:
    return None
  unit = result["units"]["loss"]
  series = []
  for style, valley in enumerate(model["isoflop"]["valleys"]):
    curve = valley["curve"]
    label = f"{valley['budget']:.3g}".replace("e+", "e")
    cells = [c for c in model["cells"] if c["budget"] == valley["budget"]]
    series.append(Series(label, curve["x"], curve["value"], style, "line"))
    series.append(
      _points(
        cells, [c["size"] for c in cells], [c["loss"] for c in cells],
        style, label, unit, size=3.6,
      )
    )  # fmt: skip
    if valley["best_size"] is not None:
      series.append(
        Series(
          None, [valley["best_size"]], [valley["best_loss"]], style,
          names=[f"lowest at {valley['best_size']:.4g}"], hollow=True, size=6.5,
        )
      )  # fmt: skip
  return Chart(
    f"isoflop-{slug(name)}",
    f"IsoFLOP valleys of {name}",
    "One parabola a budget (FLOPs in the legend); the large hollow marker is "
    "its lowest point.",
    SIZE_NAMES[result["units"]["size"]],
    unit,
    series,
  )


def _allocation(result: dict) -> Chart | None:
  series = []
  for style, (name, model) in enumerate(result["models"].items()):
    for method, (text, dash) in METHODS.items():
      frontier = model[method].get("frontier")
      if frontier:
        series.append(
          Series(
            f"{name}, {text}", frontier["compute"], frontier["size"], style,
            "line", dash=dash,
          )
        )  # fmt: skip
    spans = {
      span["budget"]: span
      for span in model["isoflop"].get("valley_intervals", ())
    }
    valleys = [
      v
      for v in model["isoflop"].get("valleys", ())
      if v["best_size"] is not None
    ]
    if valleys:
      best = [v["best_size"] for v in valleys]
      found = [spans.get(v["budget"], {}) for v in valleys]
      series.append(
        Series(
          None, [v["budget"] for v in valleys], best, style, "points",
          [s.get("low") or b for s, b in zip(found, best, strict=True)],
          [s.get("high") or b for s, b in zip(found, best, strict=True)],
          [f"{name}: {b:.4g} at {v['budget']:.3g} FLOPs"
           for v, b in zip(valleys, best, strict=True)],
        )
      )  # fmt: skip
  if not series:
    return None
  return Chart(
    "allocation",
    "Best size of a budget",
    "Markers: lowest points of the parabolas with 95% intervals. Lines: the "
    "frontiers of the three methods.",
    "budget (FLOPs)",
    SIZE_NAMES[result["units"]["size"]],
    series,
  )


def _fill(result: dict, table: Table) -> Chart | None:
  series, most = [], 0
  names = list(result["models"])
  for style, name in enumerate(names):
    fills = [
      run.fill
      for run in table.rows
      if run.model == name and run.excluded is None and run.fill
    ]
    if not fills:
      continue
    columns = list(zip(*fills, strict=False))
    most = max(most, len(columns))
    shift = 0.5 * (style - (len(names) - 1) / 2) / max(len(names), 2)
    mean = [100 * sum(column) / len(column) for column in columns]
    series.append(
      Series(
        name,
        [i + 1 + shift for i in range(len(columns))],
        mean,
        style,
        "points",
        [100 * min(column) for column in columns],
        [100 * max(column) for column in columns],
        [f"{name}, stage {i + 1}: {v:.1f}%" for i, v in enumerate(mean)],
      )
    )
  if not series:
    return None
  return Chart(
    "fill",
    "Real positions, by stage",
    "Share of the slots of a stage that held text, over whole runs: mean of a "
    "model's runs, whiskers from the emptiest to the fullest run.",
    "stage",
    "% of slots",
    series,
    x_log=False,
    y_log=False,
    x_ticks=[(i + 1.0, str(i + 1)) for i in range(most)],
  )


def _residuals(result: dict) -> Chart | None:
  series = []
  for style, (name, model) in enumerate(result["models"].items()):
    compute = {cell["name"]: cell for cell in model["cells"]}
    entry = _shown_law(model, "power_law", "vpnls", "no_offset")
    if not entry:
      continue
    cells = [compute[r["cell"]] for r in entry["residuals"]]
    series.append(
      Series(
        name,
        [cell["compute"] for cell in cells],
        [100 * r["relative"] for r in entry["residuals"]],
        style,
        names=[
          f"{r['cell']}: {100 * r['relative']:+.2f}%"
          for r in entry["residuals"]
        ],
        links=[anchor(cell["ids"][0]) for cell in cells],
        size=3.6 if len(cells) < 60 else 2.6,
      )
    )
  if not series:
    return None
  return Chart(
    "residuals",
    "Residuals",
    "Loss over what the law gives, less one: of the law of loss against "
    "compute, and where sizes vary of the parametric law by variable "
    "projection. A trend here means that the law is not the law.",
    result["units"]["compute"],
    "residual (%)",
    series,
    y_log=False,
    zero_line=True,
  )
