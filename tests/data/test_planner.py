"""Plans: capacities for a text, and what rows of them hold."""

import pathlib

import numpy as np
import pytest

from aunet_jax.data import planner, sources
from aunet_jax.splitting.splitter import Splitter
from tests.data.test_shards import RULES, _texts

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


# Width, blocks and feed-forward width per stage of the paper's 1B models
# (Table 9): how much a position of each stage costs.
PAPER_STAGES = {
  "word@1": [(512, 6, 1536), (2048, 25, 5632)],
  "word@1,word@2": [(512, 6, 1536), (2048, 6, 5632), (3072, 18, 8192)],
}


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
