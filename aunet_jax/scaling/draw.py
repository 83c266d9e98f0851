"""Draws a chart as SVG text, the same bytes everywhere, or as a PNG.

The SVG is written here, not by a plotting library, so that a report does not
change with the library's version; the PNG of the same chart is matplotlib's.
Models differ in colour (Okabe and Ito's, made for colour-blind eyes), in marker
and in dashes.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure

# Blue, vermilion, green, purple, orange, sky, black.
COLOURS = (
  "#0072b2", "#d55e00", "#007a59", "#b0548c", "#a87000", "#3a8fc4", "#333333",
)  # fmt: skip

DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2 1 2")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus", "down")
_MATPLOTLIB = dict(zip(MARKERS, "os^DXPv", strict=True))
WIDTH, PLOT_HEIGHT, FONT = 480, 300, 13
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 46
_LINE = 19  # height of a line of the legend


class Series(NamedTuple):
  """Points, a line, or a band: `low` and `high` around a line.

  Points with `low` and `high` have whiskers. `names` are shown on hover and
  `links` are fragments of the page.
  """

  label: str | None  # in the legend; None: not there
  x: Sequence[float]
  y: Sequence[float]
  style: int = 0  # colour, and marker or dash
  kind: str = "points"  # or "line"
  low: Sequence[float] | None = None
  high: Sequence[float] | None = None
  names: Sequence[str] = ()
  links: Sequence[str | None] = ()
  dash: int | None = None  # None: of the style
  hollow: bool = False
  size: float = 4.5


class Chart(NamedTuple):
  name: str  # of the PNG
  title: str
  caption: str
  x_label: str
  y_label: str
  series: Sequence[Series]
  x_log: bool = True
  y_log: bool = True
  x_ticks: Sequence[tuple[float, str]] | None = None  # None: chosen
  zero_line: bool = False


# ----- axes -----------------------------------------------------------------


def _nice_step(span: float, count: int) -> float:
  power = 10.0 ** math.floor(math.log10(span / count))
  return next(
    power * m for m in (1, 2, 5, 10) if span / (power * m) <= count + 1e-9
  )


def ticks(low: float, high: float, log: bool, count: int = 6) -> list[float]:
  """Round values within [low, high]; at least two for any span above 0."""
  if log and high / low >= 20:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, -(-(last - first + 1) // count))
    decades = [10.0**e for e in range(first, last + 1, step)]
    if len(decades) >= 3:
      return decades
    middle = [
      m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)
    ]
    return [v for v in middle if low <= v <= high]
  step = _nice_step(high - low, count)
  first = math.ceil(low / step - 1e-9)
  return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> tuple[str, str]:
  """Text and its exponent of ten, which is set higher; "" for none."""
  if value == 0 or 1e-3 <= abs(value) < 1e5:
    return f"{value:.6g}".replace("-", "−"), ""
  power = math.floor(math.log10(abs(value)) + 1e-9)
  factor = f"{value / 10.0**power:.3g}"
  return ("10" if factor == "1" else f"{factor}·10"), str(power)


class _Axis(NamedTuple):
  low: float
  high: float
  log: bool
  start: float  # in pixels
  end: float

  def at(self, value: float) -> float:
    low, high = self.low, self.high
    if self.log:
      value, low, high = math.log(value), math.log(low), math.log(high)
    share = (value - low) / (high - low)
    return self.start + share * (self.end - self.start)


def _usable(value, log: bool) -> bool:
  return value is not None and math.isfinite(value) and (value > 0 or not log)


def _range(values: list[float], log: bool) -> tuple[float, float]:
  """Smallest and largest with a margin; something to draw on for none."""
  values = values or [1.0, 10.0]
  low, high = min(values), max(values)
  if log:
    margin = max((high / low) ** 0.06, 1.02)
    return low / margin, high * margin
  margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
  return low - margin, high + margin


def limits(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
  """Ranges of x and y: all points, and of intervals as much as stays readable.

  An interval that rests on one degree of freedom would else flatten all data:
  of bands no more is shown than the data's own range on either side, of
  whiskers four times that.
  """
  x, y = [], []
  for series in chart.series:
    x += [v for v in series.x if _usable(v, chart.x_log)]
    y += [v for v in series.y if _usable(v, chart.y_log)]
  x = x + [v for v, _ in chart.x_ticks or ()]
  least, most = _range(y, chart.y_log)
  if chart.zero_line:
    least, most = min(least, 0.0), max(most, 0.0)
  low, high = least, most
  for series in chart.series:
    reach = 1 if series.kind == "line" else 4
    for values in (series.low, series.high):
      wide = [v for v in values or () if _usable(v, chart.y_log)]
      if wide and chart.y_log:
        room = (most / least) ** reach
        low = min(low, max(min(wide) / 1.01, least / room))
        high = max(high, min(max(wide) * 1.01, most * room))
      elif wide:
        room, edge = reach * (most - least), 0.02 * (most - least)
        low = min(low, max(min(wide) - edge, least - room))
        high = max(high, min(max(wide) + edge, most + room))
  if chart.x_ticks is not None:
    return (min(x) - 0.5, max(x) + 0.5), (low, high)
  return _range(x, chart.x_log), (low, high)


# ----- SVG ------------------------------------------------------------------


def _f(value: float) -> str:
  return f"{value:.1f}"


def _marker(kind: str, x: float, y: float, r: float) -> str:
  """A shape's SVG element without its closing, for attributes to be added."""
  if kind == "circle":
    return f'<circle cx="{_f(x)}" cy="{_f(y)}" r="{_f(r)}"'
  if kind == "square":
    q = 0.9 * r
    return (
      f'<rect x="{_f(x - q)}" y="{_f(y - q)}" width="{_f(2 * q)}" '
      f'height="{_f(2 * q)}"'
    )
  shapes = {
    "triangle": ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    "down": ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "plus": (
      (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4),
      (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4),
      (-1.2, -0.4), (-0.4, -0.4),
    ),
    "cross": (
      (0, -0.55), (0.75, -1.3), (1.3, -0.75), (0.55, 0), (1.3, 0.75),
      (0.75, 1.3), (0, 0.55), (-0.75, 1.3), (-1.3, 0.75), (-0.55, 0),
      (-1.3, -0.75), (-0.75, -1.3),
    ),
  }  # fmt: skip
  points = " ".join(f"{_f(x + r * a)},{_f(y + r * b)}" for a, b in shapes[kind])
  return f'<polygon points="{points}"'


def _style(series: Series) -> tuple[str, str, str]:
  colour = COLOURS[series.style % len(COLOURS)]
  dash = series.style if series.dash is None else series.dash
  return (
    colour,
    DASHES[dash % len(DASHES)],
    MARKERS[series.style % len(MARKERS)],
  )


def _paint(series: Series, colour: str) -> str:
  fill = "#ffffff" if series.hollow else colour
  width = 1.3 if series.hollow else 0.8
  edge = colour if series.hollow else "#ffffff"
  return f'fill="{fill}" stroke="{edge}" stroke-width="{width}"'


def _text(x, y, text, **attributes) -> str:
  extra = "".join(
    f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items()
  )
  return f'<text x="{_f(x)}" y="{_f(y)}"{extra}>{text}</text>'


def _tick_text(value: float) -> str:
  base, power = _label(value)
  if not power:
    return base
  return f'{base}<tspan dy="-5" font-size="10">{power}</tspan>'


def _series_svg(series: Series, chart: Chart, x: _Axis, y: _Axis) -> list[str]:
  colour, dash, marker = _style(series)
  keep = [
    i
    for i, pair in enumerate(zip(series.x, series.y, strict=True))
    if _usable(pair[0], chart.x_log) and _usable(pair[1], chart.y_log)
  ]
  spans = []
  for i in keep if series.low is not None else ():
    low, high = series.low[i], series.high[i]
    # What is beyond the chart, or infinite, is cut at its edge.
    low = low if _usable(low, chart.y_log) else y.low
    high = high if _usable(high, chart.y_log) else y.high
    spans.append((max(low, y.low), min(high, y.high)))
  out = []
  if series.kind == "line":
    if spans:
      upper = [f"{_f(x.at(series.x[i]))},{_f(y.at(s[1]))}"
               for i, s in zip(keep, spans, strict=True)]  # fmt: skip
      lower = [f"{_f(x.at(series.x[i]))},{_f(y.at(s[0]))}"
               for i, s in zip(keep, spans, strict=True)]  # fmt: skip
      out.append(
        f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" '
        f'fill-opacity="0.13"/>'
      )
    points = " ".join(
      f"{_f(x.at(series.x[i]))},{_f(y.at(series.y[i]))}" for i in keep
    )
    extra = f' stroke-dasharray="{dash}"' if dash else ""
    out.append(
      f'<polyline points="{points}" fill="none" stroke="{colour}" '
      f'stroke-width="1.7"{extra}/>'
    )
    return out
  for n, i in enumerate(keep):
    px, py = x.at(series.x[i]), y.at(series.y[i])
    if spans:
      top, low = y.at(spans[n][1]), y.at(spans[n][0])
      out.append(
        f'<path d="M{_f(px)} {_f(top)}V{_f(low)}M{_f(px - 3)} {_f(top)}h6'
        f'M{_f(px - 3)} {_f(low)}h6" stroke="{colour}" stroke-width="1.2" '
        f'fill="none"/>'
      )
    title = ""
    if series.names:
      title = f"<title>{html.escape(series.names[i])}</title>"
    shape = _marker(marker, px, py, series.size)
    shape = f"{shape} {_paint(series, colour)}>{title}</{shape[1:].split()[0]}>"
    if series.links and series.links[i]:
      shape = f'<a href="#{html.escape(series.links[i])}">{shape}</a>'
    out.append(shape)
  return out


def _legend(chart: Chart, top: float) -> tuple[list[str], float]:
  """Entries in lines under the chart, and how high they are.

  A line and points that share a label share an entry.
  """
  entries: dict[str, list[Series]] = {}
  for series in chart.series:
    if series.label is not None:
      entries.setdefault(series.label, []).append(series)
  out, x, line = [], LEFT - 40.0, 0
  for label, several in entries.items():
    width = 34 + 6.9 * len(label) + 12
    if x > LEFT - 40 and x + width > WIDTH - 4:
      x, line = LEFT - 40.0, line + 1
    y = top + line * _LINE
    for series in several:
      colour, dash, marker = _style(series)
      if series.kind == "line":
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        out.append(
          f'<path d="M{_f(x)} {_f(y)}h26" stroke="{colour}" '
          f'stroke-width="1.7" fill="none"{extra}/>'
        )
      else:
        shape = _marker(marker, x + 13, y, series.size)
        out.append(f"{shape} {_paint(series, colour)}/>")
    out.append(_text(x + 31, y + 4.5, html.escape(label)))
    x += width
  return out, (line + 1) * _LINE if entries else 0.0


def svg(chart: Chart) -> str:
  """A chart as one SVG element; its points say on hover what they are."""
  (x_low, x_high), (y_low, y_high) = limits(chart)
  bottom = TOP + PLOT_HEIGHT
  x = _Axis(x_low, x_high, chart.x_log, LEFT, WIDTH - RIGHT)
  y = _Axis(y_low, y_high, chart.y_log, bottom, TOP)
  legend, legend_height = _legend(chart, bottom + BOTTOM + 10)
  height = bottom + BOTTOM + legend_height + 4
  out = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
    f'{_f(height)}" role="img" font-size="{FONT}" fill="#222222">',
    f"<title>{html.escape(chart.title)}</title>",
  ]
  shown = chart.x_ticks or [
    (v, _tick_text(v)) for v in ticks(x_low, x_high, chart.x_log)
  ]
  for value, text in shown:
    at = x.at(value)
    out.append(
      f'<path d="M{_f(at)} {TOP}V{bottom}" stroke="#e3e3e3" stroke-width="1"/>'
    )
    out.append(_text(at, bottom + 18, text, text_anchor="middle"))
  for value in ticks(y_low, y_high, chart.y_log):
    at = y.at(value)
    out.append(
      f'<path d="M{LEFT} {_f(at)}H{WIDTH - RIGHT}" stroke="#e3e3e3" '
      f'stroke-width="1"/>'
    )
    out.append(_text(LEFT - 7, at + 4.5, _tick_text(value), text_anchor="end"))
  if chart.zero_line:
    out.append(
      f'<path d="M{LEFT} {_f(y.at(0))}H{WIDTH - RIGHT}" stroke="#777777"/>'
    )
  for kind in ("line", "points"):  # points lie on top
    for series in chart.series:
      if series.kind == kind:
        out += _series_svg(series, chart, x, y)
  out.append(
    f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" '
    f'stroke="#555555"/>'
  )
  middle = (LEFT + WIDTH - RIGHT) / 2
  out.append(
    _text(middle, bottom + 38, html.escape(chart.x_label), text_anchor="middle")
  )
  at = TOP + PLOT_HEIGHT / 2
  out.append(
    _text(
      15,
      at,
      html.escape(chart.y_label),
      text_anchor="middle",
      transform=f"rotate(-90 15 {_f(at)})",
    )
  )
  return "\n".join([*out, *legend, "</svg>"])


def sheet(charts: Sequence[Chart], columns: int = 2) -> str:
  """Several charts as one SVG, row by row."""
  drawn = [svg(chart) for chart in charts]
  heights = [float(text.split('"', 4)[3].split()[3]) for text in drawn]
  out, top = [], 0.0
  for first in range(0, len(drawn), columns):
    row = heights[first : first + columns]
    for i, height in enumerate(row):
      place = (
        f'<svg x="{i * WIDTH}" y="{_f(top)}" width="{WIDTH}" '
        f'height="{_f(height)}" '
      )
      out.append(drawn[first + i].replace("<svg ", place, 1))
    top += max(row)
  size = f"0 0 {columns * WIDTH} {_f(top)}"
  head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">'
  return "\n".join([head, *out, "</svg>"]) + "\n"


# ----- PNG ------------------------------------------------------------------


def png(chart: Chart, path: Path) -> None:
  """The same chart by matplotlib."""
  figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
  axes = figure.subplots()
  (x_low, x_high), (y_low, y_high) = limits(chart)
  axes.set_xscale("log" if chart.x_log else "linear")
  axes.set_yscale("log" if chart.y_log else "linear")
  handles: dict[str, list] = {}
  for series in chart.series:
    colour, dash, marker = _style(series)
    x, y = list(series.x), list(series.y)
    cut = [
      [min(max(v if v is not None else edge, y_low), y_high) for v in values]
      for values, edge in ((series.low, y_low), (series.high, y_high))
      if values is not None
    ]
    if series.kind == "line":
      pattern = tuple(float(v) for v in dash.split())
      style = (0, pattern) if pattern else "-"
      (artist,) = axes.plot(x, y, color=colour, linestyle=style, linewidth=1.7)
      if cut:
        axes.fill_between(x, *cut, color=colour, alpha=0.13, linewidth=0)
    else:
      face = "white" if series.hollow else colour
      (artist,) = axes.plot(
        x, y, linestyle="", marker=_MATPLOTLIB[marker], color=colour,
        markerfacecolor=face, markersize=1.6 * series.size,
      )  # fmt: skip
      if cut:
        axes.vlines(x, *cut, color=colour, linewidth=1.2)
    if series.label is not None:
      handles.setdefault(series.label, []).append(artist)
  axes.set_xlim(x_low, x_high)
  axes.set_ylim(y_low, y_high)
  for axis, values in (
    (axes.xaxis, chart.x_ticks),
    (axes.yaxis, None),
  ):
    log = chart.x_log if axis is axes.xaxis else chart.y_log
    low, high = (x_low, x_high) if axis is axes.xaxis else (y_low, y_high)
    shown = values or [(v, _plain(v)) for v in ticks(low, high, log)]
    axis.set_ticks([v for v, _ in shown], [text for _, text in shown])
    axis.set_ticks([], minor=True)
  if chart.zero_line:
    axes.axhline(0, color="#777777", linewidth=1)
  axes.set_title(chart.title, fontsize=11)
  axes.set_xlabel(chart.x_label)
  axes.set_ylabel(chart.y_label)
  axes.grid(alpha=0.3)
  if handles:
    axes.legend(
      [tuple(artists) for artists in handles.values()],
      list(handles),
      fontsize=9,
    )
  figure.savefig(path, dpi=150, metadata={"Software": None})


def _plain(value: float) -> str:
  base, power = _label(value)
  if not power:
    return base
  return "$" + base.replace("·", r" \cdot ") + "^{" + power + "}$"
