"""The report of a study: the same bytes every time, whole, and traceable."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from aunet_jax.scaling import __main__ as scaling_main
from aunet_jax.scaling.study import Description, Run, Table, write_table

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs" / "study"
TEXT_FILES = ("numbers.jsonl", "fits.json", "report.html")


def rows(models=("byte", "aunet<2>"), grid=False):
  rng = np.random.default_rng(0)
  sizes = (0.4, 0.7, 1.0, 1.6, 2.5) if grid else (1.0,)
  found = []
  for m, model in enumerate(models):
    for budget in (1e12, 5e12, 2e13, 1e14):
      for size in sizes:
        for seed in range(1 if grid else 2):
          flops = size * budget**0.5
          loss = 3 * (budget / 1e12) ** -0.08 - 0.1 * m
          loss += 0.05 * np.log(size) ** 2 + rng.normal(0, 0.004)
          name = f"{model}-{budget:g}-x{size:g}-s{seed}"
          found.append(
            Run(
              id=name,
              model=model,
              seed=seed,
              budget_flops=budget,
              params=int(flops / 5),
              flops_per_byte=flops,
              loss=float(loss),
              heldout_bytes=5000,
              bytes=budget / flops,
              useful_flops=1.1 * budget,
              padded_flops=1.2 * budget,
              fill=(0.93, 0.99)[: m + 1],
              run=f"cells/{name}",
              excluded=None,
            )
          )
  found[-1] = dataclasses.replace(
    found[-1], excluded="diverged: it & that", loss=None
  )
  return found


def write_numbers(path: Path, found) -> Path:
  about = Description(loss_unit="bits per byte", data_unit="bytes")
  write_table(Table(about, found), path)
  return path


def plot(source: Path, out: Path) -> None:
  flags = [f"--out={out}", "--bootstrap=50"]
  assert scaling_main.main(["plot", str(source), *flags]) == 0


@pytest.fixture(scope="module", params=["ladder", "grid"])
def drawn(request, tmp_path_factory):
  """A table and the directory with its report."""
  directory = tmp_path_factory.mktemp(request.param)
  some = rows(grid=request.param == "grid")
  source = write_numbers(directory / "in.jsonl", some)
  plot(source, directory / "out")
  return some, directory / "out"


def test_a_report_made_anew_from_its_numbers_is_the_same_bytes(drawn, tmp_path):
  _, out = drawn
  plot(out / "numbers.jsonl", tmp_path)
  for name in TEXT_FILES:
    assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name
  assert {p.name for p in tmp_path.iterdir()} == {p.name for p in out.iterdir()}


class Page(HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.ids, self.links, self.open, self.loads = set(), set(), [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    values = dict(attributes)
    self.ids |= {values["id"]} if "id" in values else set()
    self.links |= {values["href"]} if "href" in values else set()
    self.loads += [v for k, v in attributes if k in ("src", "srcset")]
    if tag not in ("meta", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    pass  # shapes of charts

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_page_stands_alone_and_every_number_leads_to_its_run(drawn):
  some, out = drawn
  text = (out / "report.html").read_text("utf-8")
  page = Page(text)
  assert page.open == [] and page.loads == []
  assert "<script" not in text and "@import" not in text
  assert set(re.findall(r"https?://[^\"' ]+", text)) == {
    "http://www.w3.org/2000/svg"
  }
  assert page.links and all(link[0] == "#" for link in page.links)
  assert {link[1:] for link in page.links} <= page.ids
  for row in some:
    name = row.run.replace("<", "&lt;").replace(">", "&gt;")
    assert name in text
  assert "excluded: diverged: it &amp; that" in text
  fits = json.loads((out / "fits.json").read_text("utf-8"))
  by_id = {row.id: row for row in some}
  used = set()
  for model in fits["models"].values():
    for cell in model["cells"]:
      used |= set(cell["ids"])
      losses = [by_id[name].loss for name in cell["ids"]]
      assert cell["losses"] == pytest.approx(losses, rel=1e-4)
  assert used == {row.id for row in some if row.excluded is None}


def test_the_charts_are_whole_pictures(drawn):
  some, out = drawn
  text = (out / "report.html").read_text("utf-8")
  charts = re.findall(r"<svg.*?</svg>", text, re.S)
  pictures = sorted(path.name for path in out.glob("*.png"))
  assert len(charts) == len(pictures)
  expected = {"loss.png", "difference.png", "fill.png", "residuals.png"}
  if len(some) > 20:
    expected |= {"allocation.png", "isoflop-byte.png", "isoflop-aunet-2.png"}
  assert set(pictures) == expected
  for chart in charts:
    root = ElementTree.fromstring(chart)
    width, height = map(float, root.get("viewBox").split()[2:])
    for element in root.iter():
      for points in re.findall(r"[-\d.]+,[-\d.]+", element.get("points", "")):
        x, y = map(float, points.split(","))
        assert -1 <= x <= width + 1 and -1 <= y <= height + 1
  for name in pictures:
    assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_single_run_makes_a_report_that_fits_nothing(tmp_path):
  plot(write_numbers(tmp_path / "n.jsonl", rows()[:1]), tmp_path / "out")
  text = (tmp_path / "out" / "report.html").read_text("utf-8")
  assert text.count("Not fitted: ") == 5


def numbers_apart(path):
  """The text of a file without its numbers, and those in their order."""
  number = re.compile(r"(?<![\w#.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
  text = path.read_text("utf-8")
  return number.sub("0", text), [float(n) for n in number.findall(text)]


def test_the_committed_study_is_what_its_numbers_give(tmp_path):
  """python -m aunet_jax.scaling plot docs/study/numbers.jsonl --out=…"""
  source = STUDY / "numbers.jsonl"
  assert scaling_main.main(["plot", str(source), f"--out={tmp_path}"]) == 0
  # The least digits of a search are those of the processor's arithmetic: of
  # five in fits.json, of fewer in the report.
  for name, rtol in zip(TEXT_FILES, (0, 1e-3, 5e-3), strict=True):
    drawn, drawn_numbers = numbers_apart(tmp_path / name)
    kept, kept_numbers = numbers_apart(STUDY / name)
    assert drawn == kept, name
    np.testing.assert_allclose(
      drawn_numbers, kept_numbers, rtol=rtol, err_msg=name
    )
  assert {p.name for p in tmp_path.glob("*.png")} == {
    p.name for p in STUDY.glob("*.png")
  }
