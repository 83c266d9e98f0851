"""The report of a study: one HTML file, its figures, and the fits as JSON.

The page is complete in itself (no network, no JavaScript) and the same bytes
for the same table and options. Every point of a chart and every fitted cell
leads to the runs behind it, and every run to its directory.
"""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from aunet_jax.scaling import draw, figures
from aunet_jax.scaling.analysis import FITS_FILE
from aunet_jax.scaling.figures import anchor
from aunet_jax.scaling.study import NUMBERS_FILE, Run, Table
from aunet_jax.scaling.summary import (
  METHODS,
  heldout_text,
  number,
  with_interval,
)

REPORT_FILE = "report.html"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1060px; margin: 0 auto; padding: 0 16px 48px; }
h1 { font-size: 1.6em; line-height: 1.25; } h2 { margin-top: 2em; }
p, figcaption, li { max-width: 46em; overflow-wrap: anywhere; }
figure { margin: 0; } figcaption { font-size: .88em; color: #555; }
.charts { display: grid; gap: 28px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.charts h3 { margin: 0 0 4px; font-size: 1em; }
svg { width: 100%; height: auto; display: block; }
svg a { cursor: pointer; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88em; margin: 8px 0; }
th, td { padding: 3px 10px 3px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e3e3e3; vertical-align: top; }
th { font-weight: 600; border-bottom-color: #999; }
th:first-child, td:first-child, .text { text-align: left; }
.reason { white-space: normal; min-width: 16em; text-align: left; }
.warn { border-left: 4px solid #d55e00; padding: 2px 0 2px 12px; }
.out td { color: #777; } tr:target td { background: #fff3d6; }
code { font-size: .92em; } a { color: #0072b2; }
summary { cursor: pointer; color: #0072b2; }
"""


def write(table: Table, result: dict, out: Path) -> list[str]:
  """Writes fits, report and figures; returns the names of the files."""
  write_fits(result, out)
  charts = figures.charts(result, table)
  for chart in charts:
    draw.png(chart, out / f"{chart.name}.png")
  page = _page(table, result, charts)
  (out / REPORT_FILE).write_text(page, encoding="utf-8")
  return [FITS_FILE, REPORT_FILE, *(f"{chart.name}.png" for chart in charts)]


def write_fits(result: dict, out: Path) -> None:
  text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
  # Lists of numbers take one line each: a curve is not a page.
  text = re.sub(
    r"\[\s+([-+.\deE,\s]|null)*\]", lambda m: " ".join(m[0].split()), text
  )
  (out / FITS_FILE).write_text(text, encoding="utf-8")


# ----- pieces ---------------------------------------------------------------


def _e(text) -> str:
  return html.escape(str(text))


def _table(
  head: Sequence[str], rows: Sequence[Sequence[str]], classes=()
) -> str:
  """Cells are HTML. classes: of the rows, where there are any."""
  lines = ["<div class=wide><table><thead><tr>"]
  lines += [
    f"{cell}</th>" if cell.startswith("<th") else f"<th>{cell}</th>"
    for cell in head
  ]
  lines.append("</tr></thead><tbody>")
  for i, row in enumerate(rows):
    attributes = f" {classes[i]}" if classes else ""
    lines.append(f"<tr{attributes}>")
    lines += [
      cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row
    ]
    lines.append("</tr>")
  return "\n".join([*lines, "</tbody></table></div>"])


def _reason(text: str) -> str:
  return f"<td class=reason>{_e(text)}</td>"


def _run_links(ids: Sequence[str]) -> str:
  return ", ".join(f'<a href="#{anchor(i)}">{_e(i)}</a>' for i in ids)


def command(result: dict) -> str:
  """What makes this report again, run beside its numbers."""
  options = result["options"]
  parts = [
    f"python -m aunet_jax.scaling plot {NUMBERS_FILE} --out=.",
    f"--size={options['size']}",
    f"--bootstrap={options['bootstrap']}",
    f"--seed={options['seed']}",
  ]
  if options["drop"]:
    parts.append(f"--drop={','.join(options['drop'])}")
  if options["drop_highest"]:
    parts.append(f"--drop_highest={options['drop_highest']}")
  if options["drop_flagged"]:
    parts.append("--drop_flagged")
  return " ".join(parts)


# ----- the page -------------------------------------------------------------


def _page(table: Table, result: dict, charts) -> str:
  names = list(result["models"])
  title = "Scaling study: " + ", ".join(names[:6])
  title += " …" if len(names) > 6 else ""
  parts = [
    "<!doctype html>",
    '<html lang="en"><head><meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f"<title>{_e(title)}</title><style>{_STYLE}</style></head><body>",
    f"<h1>{_e(title)}</h1>",
    *_about(table, result),
    *_comparison(result),
    "<h2>Charts</h2><div class=charts>",
    *(_chart(chart) for chart in charts),
    "</div>",
    *_fits(result),
    *_heldout(result),
    *_left_out(result),
    *_cells(result),
    *_runs(table),
    "</body></html>",
  ]
  return "\n".join(parts) + "\n"


def _about(table: Table, result: dict) -> list[str]:
  units, about = result["units"], table.about
  good = sum(run.excluded is None for run in table.rows)
  lines = [
    f"<p>{good} of {len(table.rows)} runs can be compared. Loss: "
    f"{_e(units['loss'])}. N is {_e(units['size'])}, D {_e(units['data'])}, C "
    f"{_e(units['compute'])}. Intervals are 95%, from "
    f"{result['options']['bootstrap']} refits. Seeds of a cell are averaged "
    f"before anything is fitted.</p>"
  ]
  warnings = sum(
    len(entry.get("warnings", ()))
    for model in result["models"].values()
    for entry, _ in _entries(model)
  )
  if warnings:
    lines.append(
      f"<p class=warn>{warnings} warnings stand beside the fits below: what "
      f"they say of the data comes first.</p>"
    )
  if about.command is not None:
    lines.append(f"<p>Planned with <code>{_e(about.command)}</code>.</p>")
  if about.source is not None:
    lines.append(f"<p>Points of <code>{_e(about.source)}</code>.</p>")
  lines.append(f"<p>Made anew by <code>{_e(command(result))}</code>.</p>")
  return lines


def _chart(chart) -> str:
  return (
    f"<figure><h3>{_e(chart.title)}</h3>\n{draw.svg(chart)}\n"
    f"<figcaption>{_e(chart.caption)}</figcaption></figure>"
  )


def _comparison(result: dict) -> list[str]:
  rows = result["comparison"]
  if not rows:
    return []
  names = [n for n in result["models"] if any(n in r["models"] for r in rows)]
  body = []
  for row in rows:
    cells = [number(row["budget"])]
    for name in names:
      entry = row["models"].get(name)
      if entry is None:
        cells.append("")
        continue
      text = f"{entry['loss']['value']:.4f}"
      if entry["difference"]:
        text += f"<br>{_e(_signed(entry['difference']))}"
      cells.append(text)
    body.append(cells)
  reference = rows[0]["reference"]
  return [
    "<h2>At equal budget</h2>",
    f"<p>Lowest loss of each model (mean of seeds), and below it the "
    f"difference to {_e(reference)} with its 95% interval.</p>",
    _table(["budget (FLOPs)", *map(_e, names)], body),
  ]


def _signed(entry: dict) -> str:
  text = f"{entry['value']:+.4f}"
  if entry["low"] is not None:
    text += f" [{entry['low']:+.4f}, {entry['high']:+.4f}]"
  return text


def _fits(result: dict) -> list[str]:
  parts = ["<h2>Fits</h2>"]
  for name, model in result["models"].items():
    parts.append(
      f"<h3>{_e(name)}</h3><p>{model['runs']} runs, {len(model['cells'])} "
      f"cells, {len(model['budgets'])} budgets.</p>"
    )
    parts += [_fit(entry, title) for entry, title in _entries(model)]
  return parts


def _fit(entry: dict, title: str) -> str:
  """One method's findings and warnings, as a block."""
  if "not_fitted" in entry:
    return f"<p><b>{_e(title)}</b><br>Not fitted: {_e(entry['not_fitted'])}</p>"
  found = [
    f"{_e(key)} {_e(with_interval(value))}"
    for kind in ("parameters", "allocation")
    for key, value in entry.get(kind, {}).items()
  ]
  detail = []
  if "rms_relative_residual" in entry:
    detail.append(f"residuals {entry['rms_relative_residual']:.2%} (rms)")
  if entry.get("degrees_of_freedom") is not None:
    detail.append(f"{entry['degrees_of_freedom']} degrees of freedom")
  if entry.get("resampled"):
    detail.append(f"{entry['resampled']} resampled")
  warnings = "".join(
    f"<p class=warn>{_e(line)}</p>" for line in entry["warnings"]
  )
  return (
    f"<p><b>{_e(title)}</b><br>{'; '.join(found)}"
    f"<br><small>{', '.join(detail)}</small></p>{warnings}"
  )


def _entries(model: dict):
  for method, title in METHODS.items():
    yield model[method], title
    if "loss_law" in model[method]:
      yield (
        model[method]["loss_law"],
        "loss = E + A / C^alpha through the valleys",
      )


def _heldout(result: dict) -> list[str]:
  rows = []
  for name, model in result["models"].items():
    for entry, title in _entries(model):
      text = heldout_text(entry)
      if text:
        inside = entry["heldout"].get("inside")
        verdict = {True: "inside", False: "outside", None: "no interval"}
        rows.append(
          [_e(name), f"<td class=text>{_e(title)}</td>", _reason(text),
           _e(verdict[inside])]
        )  # fmt: skip
  if not rows:
    return []
  return [
    "<h2>The largest budget, predicted from the others</h2>",
    "<p>Every law fitted once more without the largest budget (the tenth of "
    "the points with most compute, where budgets are many), and what it then "
    "predicts there; intervals are of a new cell, noise included.</p>",
    _table(
      [
        "model",
        *(f"<th class=text>{t}" for t in ("law", "prediction")),
        "interval",
      ],
      rows,
    ),
  ]


def _left_out(result: dict) -> list[str]:
  parts = ["<h2>Left out</h2>"]
  for kind, text in (
    ("excluded", "Excluded: not comparable with the others."),
    ("dropped", "Dropped from the fits as the command asked."),
  ):
    items = result[kind]
    if items:
      rows = [
        [f'<a href="#{anchor(item["id"])}">{_e(item["id"])}</a>',
         _reason(item["reason"])]
        for item in items
      ]  # fmt: skip
      parts += [
        f"<p>{text}</p>",
        _table(["run", "<th class=text>reason"], rows),
      ]
    else:
      parts.append(f"<p>{kind.capitalize()}: none.</p>")
  return parts


def _cells(result: dict) -> list[str]:
  """What was fitted, cell by cell, with the residuals of every law."""
  parts = [
    "<h2>Cells</h2>",
    "<p>A cell is a model at one budget and size. Residuals are the loss over "
    "the law's, less one.</p>",
  ]
  for name, model in result["models"].items():
    residuals = {
      title: {r["cell"]: r["relative"] for r in model[method]["residuals"]}
      for method, title in (
        ("power_law", "loss law"),
        ("no_offset", "no offset"),
        ("vpnls", "variable projection"),
        ("huber", "Huber"),
      )
      if "residuals" in model[method]
    }
    if "valleys" in model["isoflop"]:
      residuals["parabola"] = {
        r["cell"]: r["relative"]
        for valley in model["isoflop"]["valleys"]
        for r in valley["residuals"]
      }
    rows = []
    for cell in model["cells"]:
      spread = "" if cell["spread"] is None else f"{cell['spread']:.2g}"
      rows.append(
        [
          number(cell["budget"]),
          number(cell["size"]),
          number(cell["data"]),
          number(cell["compute"]),
          f"{cell['loss']:.4f}",
          spread,
          *(
            f"{some[cell['name']]:+.2%}" if cell["name"] in some else ""
            for some in residuals.values()
          ),
          f"<td class=text>{_run_links(cell['ids'])}</td>",
        ]
      )
    head = ["budget", "N", "D", "C", "loss", "seeds' deviation", *residuals]
    table = _table([*head, "<th class=text>runs"], rows)
    parts.append(
      f"<details open><summary>{_e(name)}</summary>{table}</details>"
      if len(rows) <= 60
      else f"<details><summary>{_e(name)}</summary>{table}</details>"
    )
    if model["other_settings"]:
      rows = [
        [number(cell["budget"]), number(cell["size"]), f"{cell['loss']:.4f}",
         f"<td class=text>{_run_links(cell['ids'])}</td>"]
        for cell in model["other_settings"]
      ]  # fmt: skip
      parts += [
        f"<p>{_e(name)}: other learning rates or batches of the same cells, "
        f"worse and not fitted</p>",
        _table(["budget", "N", "loss", "<th class=text>runs"], rows),
      ]
  return parts


def _runs(table: Table) -> list[str]:
  """Every row of the table, with the directory it came from."""
  measured = any(run.useful_flops is not None for run in table.rows)
  head = (
    ["run", "<th class=text>model", "seed"]
    if measured
    else ["point", "<th class=text>set"]
  )
  head += ["budget", "params", "D", "loss"]
  if measured:
    head += ["held-out bytes", "useful FLOPs", "useful / padded", "fill"]
  rows, classes = [], []
  for run in table.rows:
    cells = [_e(run.id), f"<td class=text>{_e(run.model)}</td>"]
    if measured:
      cells.append("" if run.seed is None else _e(run.seed))
    cells += [
      number(run.budget_flops),
      number(run.params),
      number(run.bytes),
      "" if run.loss is None else f"{run.loss:.4f}",
    ]
    if measured:
      cells += _measured_cells(run)
    out = run.excluded is not None
    text = run.run + (f" — excluded: {run.excluded}" if out else "")
    cells.append(_reason(text))
    rows.append(cells)
    classes.append(f'id="{anchor(run.id)}"' + (" class=out" if out else ""))
  return [
    "<h2>Runs</h2>",
    "<p>Directories are relative to the study's.</p>",
    _table([*head, "<th class=text>directory"], rows, classes),
  ]


def _measured_cells(run: Run) -> list[str]:
  if None in (run.useful_flops, run.padded_flops, run.fill):
    return [""] * 4
  return [
    "" if run.heldout_bytes is None else f"{run.heldout_bytes:,}",
    number(run.useful_flops),
    f"{run.useful_flops / run.padded_flops:.3f}",
    " ".join(f"{100 * fill:.1f}%" for fill in run.fill),
  ]
