"""The command line: shards that hold the input once, shuffled; plans."""

import json
import pathlib

import numpy as np
import pytest

from aunet_jax import files, prepare
from aunet_jax.data import planner, shards, sources
from aunet_jax.splitting.splitter import Splitter

RULES = "word@1,word@2"
SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"
# Width, blocks and feed-forward width per stage of the paper's 1B models
# (Table 9): how much a position of each stage costs.
PAPER_STAGES = {
  "word@1": [(512, 6, 1536), (2048, 25, 5632)],
  "word@1,word@2": [(512, 6, 1536), (2048, 6, 5632), (3072, 18, 8192)],
}


def _texts(count):
  rng = np.random.default_rng(0)
  words = ["the", "of", "tree", "planner", "42", "(x)", "größer", "\n"]
  return [
    f"{number} " + " ".join(rng.choice(words, rng.integers(1, 200)))
    for number in range(count)
  ]


def _write(tmp_path, texts):
  path = tmp_path / "in.jsonl"
  path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
  return str(path)


def _records(directory):
  files, _ = sources.list_sources(str(directory))
  return [r.text for f in files for r in sources.read_source(f, "text")]


def _run(*arguments):
  return prepare.main([f"--rules={RULES}", *arguments])


def test_shards_hold_every_document_once_and_the_index_tells(tmp_path):
  texts = _texts(200)
  source = _write(tmp_path, texts)
  output = tmp_path / "out"
  _run(
    f"--input={source}",
    f"--output={output}",
    "--heldout_fraction=0.2",
    "--shard_bytes=30000",
    "--row_bytes=512",
  )
  train = _records(output / "train")
  heldout = _records(output / "heldout")
  assert sorted(train + heldout) == sorted(text.encode() for text in texts)
  order = [int(text.split()[0]) for text in train]
  assert order != sorted(order)
  index = json.loads((output / "index.json").read_text())
  for name, records in (("train", train), ("heldout", heldout)):
    split = index["splits"][name]
    assert split["documents"] == len(records)
    assert split["bytes"] == sum(map(len, records))
    assert split["documents"] == sum(s["documents"] for s in split["shards"])
    assert split["bytes"] == sum(s["bytes"] for s in split["shards"])
    for shard in split["shards"]:
      assert len(_records(output / shard["file"])) == shard["documents"]
      assert shard["bytes"] < 32000
    levels = [Splitter(RULES.split(",")).levels(text) for text in records]
    for stage in split["stages"]:
      # A boundary at BOS and one at every byte of the stage or a deeper one.
      kept = sum(1 + (x >= stage["stage"] - 1).sum() for x in levels)
      assert stage["segments"] == kept
      positions = split["bytes"] + split["documents"]
      assert stage["mean_bytes"] == pytest.approx(positions / kept)
  assert len(index["splits"]["train"]["shards"]) > 1
  assert len(index["plan"]["capacities"]) == 3
  assert not list(tmp_path.glob("*.partial"))
  assert not list(output.glob("*.scratch"))


def test_the_shuffle_follows_the_seed(tmp_path):
  source = _write(tmp_path, _texts(50))
  orders = []
  for number, seed in enumerate((0, 0, 1)):
    output = tmp_path / f"out{number}"
    _run(f"--input={source}", f"--output={output}", f"--seed={seed}")
    orders.append(_records(output / "train"))
  assert orders[0] == orders[1]
  assert orders[0] != orders[2]


def test_segment_lengths_by_hand():
  counter = planner.SegmentCounter(2)
  # Positions  BOS a _ b c . : boundaries at BOS, "_" (level 1), "." (level 2)
  counter.add([np.array([0, 1, 0], np.int8), np.array([0, 2], np.int8)])
  first, second = counter.summary(["one", "two"])
  assert first["segments"] == 3  # lengths 2, 3, 1
  assert (first["mean_bytes"], first["longest_bytes"]) == (2.0, 3)
  assert second["segments"] == 2  # lengths 5, 1
  assert (second["stage"], second["longest_bytes"]) == (3, 5)
  counter.add([np.zeros(40, np.int8)])
  first, _ = counter.summary(["one", "two"])
  assert first["share_longer_than_16"] == 1 / 4


@pytest.mark.parametrize("rules", ["word@1", "word@1,word@2"])
def test_a_plan_fills_the_deepest_stage(rules):
  texts = [text.encode() for text in _texts(2000)]
  splitter = Splitter(rules.split(","))
  plan = planner.recommend(texts[:1000], splitter, row_bytes=1024)
  assert plan.capacities[0] == 1024
  usage_RS, _ = planner.pack_usage(texts[1000:], splitter, plan.capacities)
  fill_S = usage_RS.sum(axis=0) / (len(usage_RS) * np.array(plan.capacities))
  assert fill_S[-1] >= 0.97
  assert fill_S.min() >= 0.85


def _corpus(name):
  path = "python"
  if name == "english":
    path = SHARED / "lm" / "eltec_eng.jsonl.xz"
    if not path.exists():
      pytest.skip(f"{path} is not there; it is not part of the package")
  return sources.sample(str(path), "text", 8_000_000, on_skip=print)


@pytest.mark.parametrize("name", ["python", "english"])
def test_planned_rows_of_real_text_are_full(name):
  # Capacities from one half of the documents, fill measured on the other.
  documents = _corpus(name)
  for rules, stages in PAPER_STAGES.items():
    splitter = Splitter(rules.split(","))
    plan = planner.recommend(documents[::2], splitter, row_bytes=8192)
    capacity_S = np.array(plan.capacities)
    usage_RS, _ = planner.pack_usage(documents[1::2], splitter, capacity_S)
    assert (usage_RS <= capacity_S).all()
    assert usage_RS[:-1, -1].mean() >= 0.97 * capacity_S[-1]
    flops_S = np.array([n * (4 * d**2 + 3 * d * f) for d, n, f in stages])
    useful = (usage_RS[:-1] * flops_S).sum(axis=1).mean()
    assert useful >= 0.9 * (capacity_S * flops_S).sum()


def test_plan_needs_text():
  with pytest.raises(ValueError, match="too small to plan rows of 1024"):
    planner.recommend([b"short"], Splitter(["word@1"]), row_bytes=1024)


def test_plan_prints_a_table_and_writes_nothing(tmp_path, capsys):
  source = _write(tmp_path, _texts(100))
  _run(f"--input={source}", "--plan", "--row_bytes=512")
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].split()[:3] == ["1", "bytes", "512"]
  assert lines[3].split()[:2] == ["3", "word@2"]
  assert list(tmp_path.iterdir()) == [pathlib.Path(source)]


def test_wrong_use_says_what_to_do(tmp_path, capsys):
  source = _write(tmp_path, _texts(5))
  (tmp_path / "out").mkdir()
  for arguments, message in (
    ([f"--input={source}"], "give --output=DIR"),
    ([f"--input={source}", f"--output={tmp_path}/out"], "out exists"),
    ([f"--input={tmp_path}/no", "--output=x"], "matches no file"),
    ([f"--input={source}", "--plan"], "too small to plan"),
  ):
    try:
      code = _run(*arguments)
    except SystemExit as error:  # of the parser
      code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_bad_input_leaves_no_output(tmp_path, capsys):
  path = tmp_path / "bad.jsonl"
  path.write_text('{"text": "a"}\nnot JSON\n')
  assert _run(f"--input={path}", f"--output={tmp_path}/out") == 2
  assert "bad.jsonl:2: malformed JSON" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == [path]


def test_a_plan_reports_what_it_skips_and_takes_any_field(tmp_path, capsys):
  path = tmp_path / "a.jsonl"
  lines = [json.dumps({"m": {"body": text}}) for text in _texts(300)]
  path.write_text("\n".join(["not JSON", *lines]))
  flags = [f"--input={path}", "--plan", "--row_bytes=256"]
  assert _run(*flags, "--text_field=m.body") == 0
  said = capsys.readouterr()
  assert "a.jsonl:1: malformed JSON" in said.err
  assert "filled" in said.out


def test_text_files_are_separated_into_documents(tmp_path):
  (tmp_path / "in.txt").write_text("one\n\ntwo\n\n\nthree\n")
  output = tmp_path / "out"
  flags = [f"--input={tmp_path}/in.txt", f"--output={output}"]
  more = ["--heldout_fraction=0", "--separator=blank_line", "--row_bytes=64"]
  assert _run(*flags, *more) == 0
  assert sorted(_records(output / "train")) == [b"one", b"three", b"two"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
  source = _write(tmp_path, _texts(20))
  theirs = tmp_path / "out.partial"
  theirs.mkdir()
  (theirs / "thesis.txt").write_text("years of work")
  assert prepare.main([f"--input={source}", f"--output={tmp_path}/out"]) == 2
  assert "out.partial is in the way" in capsys.readouterr().err
  assert (theirs / "thesis.txt").read_text() == "years of work"
  theirs.rename(tmp_path / "elsewhere")
  (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
  assert prepare.main([f"--input={source}", f"--output={tmp_path}/out"]) == 2
  assert (tmp_path / "elsewhere" / "thesis.txt").exists()


def test_what_a_killed_run_left_is_written_over(tmp_path, capsys):
  source = _write(tmp_path, _texts(20))
  left = tmp_path / "out.partial"
  left.mkdir()
  (left / shards._MARK).touch()
  (left / "train.scratch").write_text("half")
  arguments = [
    f"--input={source}", f"--output={tmp_path}/out", "--heldout_fraction=0.5"
  ]  # fmt: skip
  (left / "notes.txt").write_text("of the user")
  assert prepare.main(arguments) == 2
  assert (left / "notes.txt").exists()
  (left / "notes.txt").unlink()
  with files.locked(left / shards._MARK, lambda: None):
    assert prepare.main(arguments) == 2
    assert "another process is writing" in capsys.readouterr().err
  assert prepare.main(arguments) == 0
  assert not left.exists()
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "heldout", "index.json", "skipped.jsonl", "train"
  ]  # fmt: skip


def test_statistics_do_not_depend_on_blocks(monkeypatch):
  splitter = Splitter(RULES.split(","))
  texts = [(f"{i}", text.encode()) for i, text in enumerate(_texts(30))]
  texts.append(("empty", b""))

  def found():
    result = planner.statistics(texts, splitter, RULES.split(","), 64, 9)
    result.pop("megabytes_per_second")
    # Which of segments of one length are named is left open.
    longest = [segment["bytes"] for segment in result.pop("longest")]
    return result, longest

  expected = found()
  monkeypatch.setattr(planner, "_BLOCK", 7)
  assert found() == expected


@pytest.mark.slow  # it writes 9 GB
def test_a_document_beyond_what_one_read_gives(tmp_path):
  line = (
    b"Once upon a time there was a little girl. She loved to play.\n" * 9999
  )
  with open(tmp_path / "large.txt", "wb") as file:
    while file.tell() < 2_200_000_000:
      file.write(line)
    file.write(b"THE END")
  output = tmp_path / "out"
  flags = ["--heldout_fraction=0", "--rules=word@1"]
  assert (
    _run(f"--input={tmp_path}/large.txt", f"--output={output}", *flags) == 0
  )
  (text,) = _records(output / "train")
  assert len(text) == (tmp_path / "large.txt").stat().st_size
  assert text.endswith(b"THE END")
