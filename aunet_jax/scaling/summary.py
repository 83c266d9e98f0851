"""Shows what `analysis.analyse` found as lines of text."""


def number(value: float | None) -> str:
  return "?" if value is None else f"{value:.4g}".replace("e+", "e")


def with_interval(entry: dict) -> str:
  """0.33 [0.31, 0.36]; the interval is left out where there is none."""
  text = number(entry["value"])
  if entry["low"] is not None or entry["high"] is not None:
    text += f" [{number(entry['low'])}, {number(entry['high'])}]"
  return text


METHODS = {
  "power_law": "loss = E + A / C^alpha, C the useful compute",
  "no_offset": "loss = A / C^alpha, no offset",
  "isoflop": "IsoFLOP parabolas",
  "vpnls": "L = E + A/N^alpha + B/D^beta, variable projection",
  "huber": "L = E + A/N^alpha + B/D^beta, Huber loss",
}


def summary(result: dict) -> str:
  """The fits as lines to read in a terminal."""
  units = result["units"]
  lines = [
    f"loss: {units['loss']}; N: {units['size']}; D: {units['data']}; "
    f"C: {units['compute']}; 95% intervals in brackets"
  ]
  for kind in ("excluded", "dropped"):
    for item in result[kind]:
      lines.append(f"{kind}: {item['id']}: {item['reason']}")
  for name, model in result["models"].items():
    lines += [
      "",
      f"{name}: {model['runs']} runs, {len(model['cells'])} cells, "
      f"{len(model['budgets'])} budgets",
    ]
    if model["other_settings"]:
      names = ", ".join(cell["name"] for cell in model["other_settings"])
      lines.append(f"  worse learning rates or batches, not fitted: {names}")
    for method, title in METHODS.items():
      lines += [f"  {line}" for line in _method(model[method], title)]
  if result["comparison"]:
    lines += ["", *_compared(result["comparison"])]
  return "\n".join(lines)


def _method(entry: dict, title: str) -> list[str]:
  if "not_fitted" in entry:
    return [f"{title}: not fitted: {entry['not_fitted']}"]
  parts = [
    f"{name} {with_interval(value)}"
    for kind in ("parameters", "allocation")
    for name, value in entry.get(kind, {}).items()
  ]
  lines = [f"{title}: {', '.join(parts)}"]
  held = heldout_text(entry)
  if held:
    lines.append(f"  {held}")
  lines += [f"  warning: {line}" for line in entry["warnings"]]
  if "loss_law" in entry:
    title = "law through the valleys, loss = E + A / C^alpha"
    lines += [f"  {line}" for line in _method(entry["loss_law"], title)]
  return lines


def heldout_text(entry: dict) -> str | None:
  """What the fit without the largest budget says of that budget."""
  held = entry.get("heldout")
  if held is None:
    return None
  at = f"held out {number(held['budget'])} FLOPs: "
  if "predicted_size" in held:
    return at + (
      f"best size {number(held['best_size'])}, predicted "
      f"{number(held['predicted_size'])} ({held['relative_error']:+.1%})"
    )
  if len(held["points"]) == 1:
    (point,) = held["points"]
    return at + (
      f"{point['loss']:.4f}, predicted "
      f"{with_interval(point['predicted'])} ({point['relative_error']:+.2%})"
    )
  return at + (
    f"{len(held['points'])} cells, predicted within "
    f"{held['mean_absolute_relative_error']:.2%} on average"
  )


def _compared(comparison: list[dict]) -> list[str]:
  names = list(
    dict.fromkeys(name for row in comparison for name in row["models"])
  )
  width = max(8, *(len(name) for name in names))
  lines = ["lowest loss at equal budget, mean of seeds"]
  lines.append("budget     " + "  ".join(f"{name:>{width}}" for name in names))
  for row in comparison:
    cells = [row["models"].get(name) for name in names]
    shown = [f"{c['loss']['value']:.4f}" if c else "" for c in cells]
    lines.append(
      f"{row['budget']:<9.3g}  " + "  ".join(f"{s:>{width}}" for s in shown)
    )
  return lines
