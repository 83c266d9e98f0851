"""The command that shows stages: what it prints, counts, and refuses."""

import html.parser
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from aunet_jax import split
from aunet_jax.splitting import view
from aunet_jax.splitting.rules import RULES as RULES_BY_NAME
from aunet_jax.splitting.splitter import MACHINES, Splitter

TEXT = "The cat's 12345 dogs, e.g. ran.\n\n猫 is <b>&amp; \x1b[31m\u202e\n"
ODD = TEXT.encode() + b"\x80\xff \xe4\xb8 a\t\r\n"
RULES = ["word@1", "word@2"]


def run(capsys, *args):
  code = split.main([str(arg) for arg in args])
  output = capsys.readouterr()
  return code, output.out, output.err


def test_a_text_with_the_number_of_its_deepest_stage(capsys):
  code, out, err = run(
    capsys, "--rule=word@1,word@2", "--text=The cat's 12345 dogs."
  )
  assert code == 0 and not err
  assert "The ²cat'³s ³1³234³5 ²dogs.³" in out
  assert "stage 2: word@1 ²" in out and "stage 3: word@2 ³" in out
  assert "\x1b" not in out


def test_colours_where_asked_for_and_text_that_cannot_steer_the_terminal(
  capsys,
):
  code, out, _ = run(
    capsys, "--rule=word@1", "--color=always", "--text=a \x1b[2J b\u202e."
  )
  assert code == 0
  escapes = re.findall("\x1b[^m]*m", out)
  assert escapes and all(
    re.fullmatch(r"\x1b\[(0|30;48;5;\d+)m", escape) for escape in escapes
  )
  assert "␛" in out and "‹U+202E›" in out and "\u202e" not in out


class _Page(html.parser.HTMLParser):
  """The text in <pre>, and whether every tag closes."""

  def __init__(self, page: str):
    super().__init__()
    self.open, self.text, self.marked, self.spans = [], "", [], []
    self.feed(page)
    self.close()

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    assert not {"src", "href"} & set(values), "the page must stand alone"
    if tag in ("meta", "input"):
      return
    self.open.append(tag)
    if tag == "span":
      self.spans.append(values["title"])
    if tag == "b":
      self.marked.append(int(values["class"][1:]))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "pre" in self.open:
      self.text += data


def test_the_page_stands_alone_and_escapes_the_text(tmp_path, capsys):
  source, target = tmp_path / "<odd>.txt", tmp_path / "page.html"
  source.write_bytes(ODD)
  code, out, _ = run(capsys, "--rule=word@1,word@2", source, f"--html={target}")
  assert code == 0 and str(target) in out
  page = _Page(target.read_text(encoding="utf-8"))
  assert page.open == []
  levels = Splitter(RULES).levels(ODD)
  assert page.text == view.draw(ODD, levels * 0, colour=False)
  assert page.marked == levels[levels > 0].tolist()
  edges = [0, *(np.flatnonzero(levels) + 1), len(ODD)]
  spans = [
    f"bytes {start} to {end - 1}, {end - start} in all"
    for start, end in zip(edges, edges[1:], strict=False)
    if end > start
  ]
  assert page.spans == spans


def test_statistics_of_a_corpus(tmp_path, capsys):
  texts = ["one two three. " * 40, "x" * 300 + " end", "a b c d " * 30]
  lines = [json.dumps({"text": text}) for text in texts]
  (tmp_path / "a.jsonl").write_text("\n".join([*lines, "not json", ""]))
  code, out, err = run(
    capsys, "--rule=word@1,word@2", "--json", "--row_bytes=64", tmp_path
  )
  assert code == 0 and "not json" not in out and "skipped" in err
  found = json.loads(out)
  assert found["documents"] == 3
  assert found["bytes"] == sum(len(text) for text in texts)
  splitter = Splitter(RULES)
  levels = [splitter.levels(text.encode()) for text in texts]
  for number, stage in enumerate(found["stages"]):
    # The first segment of a document starts at BOS.
    segments = 3 + sum(int((level > number).sum()) for level in levels)
    assert stage["segments"] == segments
    assert stage["mean_bytes"] == pytest.approx((found["bytes"] + 3) / segments)
  assert found["longest"][0]["bytes"] == 301
  assert found["longest"][0]["offset"] == 0
  assert found["longest"][0]["text"].startswith("xxx")
  assert found["capacities"][0] == 64 and len(found["capacities"]) == 3
  code, out, _ = run(
    capsys, "--rule=word@1,word@2", "--stats", "--row_bytes=64", tmp_path
  )
  assert code == 0 and "capacities for rows of 64 bytes: 64, " in out
  assert "301 bytes at 0 of" in out


def test_too_little_text_to_recommend_from(tmp_path, capsys):
  (tmp_path / "a.txt").write_text("a few words")
  code, out, _ = run(capsys, "--stats", tmp_path / "a.txt")
  assert code == 0 and "need 8 rows of 8192 bytes" in out


def test_empty_input_and_one_stage(capsys):
  assert run(capsys, "--text=")[0] == 0
  assert run(capsys, "--text=", "--stats")[0] == 0
  code, out, _ = run(capsys, "--rule=", "--text=a b")
  assert code == 0 and "one stage" in out and "a b" in out
  assert run(capsys, "--rule=", "--text=a b", "--stats")[0] == 0


def test_files_without_text(tmp_path, capsys):
  (tmp_path / "empty").touch()
  code, _, err = run(capsys, tmp_path / "empty")
  assert code == 2 and "no text to show" in err
  (tmp_path / "cut.gz").write_bytes(b"not gzip")
  code, out, err = run(capsys, "--stats", tmp_path)
  assert code == 0 and "0 documents" in out and "cut.gz" in err


@pytest.mark.parametrize("args", [[], ["-"], ["--stats"]])
def test_standard_input(args, capsys, monkeypatch):
  stdin = io.TextIOWrapper(io.BytesIO(ODD))
  monkeypatch.setattr(sys, "stdin", stdin)
  code, out, _ = run(capsys, *args)
  assert code == 0
  assert "one" in out or "‹FF›" in out or f"{len(ODD)} bytes" in out


@pytest.mark.parametrize(
  "args, message",
  [
    (["--rule=wrod@1", "--text=a"], "Did you mean 'word'"),
    (["no_such_file"], "matches no file"),
    (["python", "--stats", "--separator="], "cannot separate"),
    (["--html=/no/such/directory/a.html", "--text=a"], "No such file"),
  ],
)
def test_what_cannot_be_done_is_said(args, message, capsys):
  code, _, err = run(capsys, *args)
  assert code == 2 and message in err and err.startswith("error: ")


@pytest.mark.parametrize(
  "args, message",
  [
    (["--text=a", "file"], "give one of them"),
    (["--stats", "--html=a.html"], "Give one"),
    (["--max_bytes=0"], "at least 1"),
    (["--color=red"], "invalid choice"),
  ],
)
def test_contradictions_are_refused(args, message, capsys):
  with pytest.raises(SystemExit) as stop:
    split.main(args)
  assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_command_itself_and_a_reader_that_stops_early(tmp_path):
  (tmp_path / "text").write_text("one two three\n" * 100_000)
  command = (
    f"{sys.executable} -m aunet_jax.split --rule=word@1 --max_bytes=1000000 "
    f"{tmp_path / 'text'} | head -3"
  )
  done = subprocess.run(
    ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == "" and len(done.stdout.splitlines()) == 3


def test_help_names_every_rule(capsys):
  with pytest.raises(SystemExit):
    split.main(["--help"])
  shown = capsys.readouterr().out
  assert all(name in shown for name in [*RULES_BY_NAME, *MACHINES])
