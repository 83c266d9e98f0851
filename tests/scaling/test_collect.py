"""Reading a study: what is in the table, and what is left out of the fits."""

import json
import shutil
from pathlib import Path

import pytest

from aunet_jax.aunet import counts
from aunet_jax.scaling import __main__ as scaling_main
from aunet_jax.scaling import collect, plan
from aunet_jax.scaling.sample import Sample
from aunet_jax.scaling.study import write_table

ROOT = Path(__file__).parents[2]
MODEL = f"{Path(__file__).parents[1] / 'tiny.py'}:for_budget"
DONE = {"state": "done"}


def log(losses, heldout, num_bytes=700, heldout_bytes=5000):
  """metrics.jsonl of a run of tiny.py: half its byte slots hold text."""
  rows = [
    {
      "step": step,
      "bits_per_byte": loss,
      "bytes_seen": num_bytes * step,
      "nonfinite_total": 0,
      "fill": [0.5, 1.0],
    }
    for step, loss in enumerate(losses, start=1)
  ]
  if heldout is not None:
    rows.append(
      {
        "step": len(losses),
        "bytes_seen": num_bytes * len(losses),
        "heldout_bits_per_byte": heldout,
        "heldout_bytes": heldout_bytes,
      }
    )
  return rows


def write_run(workdir, rows, state=DONE, host=None):
  (workdir / "config.json").write_bytes((workdir / "plan.json").read_bytes())
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (workdir / "metrics.jsonl").write_text(text)
  if state is not None:
    (workdir / "state.json").write_text(json.dumps(state))
  folder = workdir / "checkpoints" / "6" / "host"
  folder.mkdir(parents=True)
  host = {"data_fingerprint": "text", "splitter_hash": "words"} | (host or {})
  (folder / "metadata").write_text(json.dumps(host))


GOOD = [8.0, 5.0, 4.0, 3.0, 2.5, 2.2]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """Four seeds of one cell, each as a run that went well."""
  directory = tmp_path_factory.mktemp("planned")
  text = directory / "text.txt"
  text.write_text("words " * 2000)
  study = directory / "study"
  flags = ["--budgets=1e9", "--seeds=0,1,2,3", f"--data={text}"]
  assert (
    scaling_main.main(["plan", str(study), f"--models={MODEL}", *flags]) == 0
  )
  for seed, workdir in enumerate(sorted((study / "cells").iterdir())):
    write_run(workdir, log(GOOD, 2.3 + 0.01 * seed))
  return study


@pytest.fixture(name="study")
def _study(planned, tmp_path):
  return Path(shutil.copytree(planned, tmp_path / "study"))


def cell(study, seed):
  return study / "cells" / f"forbudget-1e09-s{seed}"


def edit(path, **changes):
  values = json.loads(path.read_text())
  for name, value in changes.items():
    at = values
    *parents, last = name.split("__")
    for parent in parents:
      at = at[parent]
    at[last] = value
  path.write_text(json.dumps(values))


def test_a_row_holds_what_the_run_read_ran_and_reached(study):
  table = collect.collect(study)
  row = table.rows[1]
  assert row.excluded is None and row.seed == 1
  assert row.loss == pytest.approx(2.31)
  assert row.heldout_bytes == 5000
  assert row.bytes == 6 * 700 and row.run == "cells/forbudget-1e09-s1"
  assert row.fill == (0.5, 1.0)
  grid = plan.Grid(models=[MODEL], budgets=[1e9])
  ((_, config),) = plan.make_runs(grid, Sample(None, 128))
  model, rows = config.model, 6 * config.train.batch_size
  positions = [rows * 0.5 * 128, rows * 32]
  assert row.useful_flops == counts.useful_train_flops(model, positions)
  assert row.padded_flops == rows * counts.train_flops_per_row(model)
  assert (row.packed_data, row.splitter) == ("text", "words")


def test_directories_of_this_machine_are_not_in_the_table(study):
  command = "plan /a/b/study --models=own/m.py:f --data=/c/d/train,/e.txt"
  edit(study / "study.json", command=command)
  shown = collect.collect(study).about.command
  assert shown == "plan …/study --models=own/m.py:f --data=…/train,/e.txt"


def test_the_table_is_read_as_it_was_written(study, tmp_path):
  (cell(study, 0) / "state.json").unlink()
  table = collect.collect(study)
  path = tmp_path / "numbers.jsonl"
  write_table(table, path)
  assert collect.load(path) == table
  assert table.rows[0].excluded is not None


def rewrite(study, seed, rows, state=DONE, **host):
  shutil.rmtree(cell(study, seed) / "checkpoints")
  write_run(cell(study, seed), rows, state, host)


BAD = {
  "half finished": (
    lambda s: rewrite(s, 0, log(GOOD[:3], None), state=None),
    "has not finished: step 3 of 6",
  ),
  "called done too early": (
    lambda s: rewrite(s, 0, log(GOOD[:3], 4.0)),
    "has not finished: step 3 of 6",
  ),
  "never started": (
    lambda s: [
      (cell(s, 0) / name).unlink() for name in ("config.json", "state.json")
    ],
    "has not finished: step 0 of 6",
  ),
  "failed": (
    lambda s: rewrite(s, 0, [], {"state": "failed", "reason": "no memory"}),
    "failed: no memory",
  ),
  "its plan is gone": (
    lambda s: (cell(s, 0) / "plan.json").unlink(),
    "its cell.json or plan.json is missing or damaged",
  ),
  "the log of another model": (
    lambda s: (cell(s, 0) / "metrics.jsonl").write_text(
      json.dumps(log(GOOD, None)[0] | {"fill": [1.0]})
    ),
    "its metrics.jsonl is of another run",
  ),
  "damaged": (
    lambda s: (cell(s, 0) / "config.json").write_text("{"),
    "its config.json is damaged",
  ),
  "no held-out figure": (
    lambda s: rewrite(s, 0, log(GOOD, None)),
    "no held-out figure",
  ),
  "not finite": (
    lambda s: rewrite(s, 0, log([*GOOD[:5], None], float("nan"))),
    "diverged: its last loss is not finite",
  ),
  "only the held-out loss is not finite": (
    lambda s: rewrite(s, 0, log(GOOD, float("inf"))),
    "diverged: its last loss is not finite",
  ),
  "ended far above its lowest": (
    lambda s: rewrite(s, 0, log([8.0, 2.0, 2.1, 3.0, 3.1, 3.2], 3.2)),
    "diverged: its training loss ended at 3.100",
  ),
  "far above its seeds": (
    lambda s: rewrite(s, 0, log([8.0, 7.0, 6.0, 5.5, 5.1, 5.0], 5.0)),
    "diverged: 5.000, the other seeds of its cell 2.320",
  ),
  "planned for other data": (
    lambda s: edit(cell(s, 0) / "cell.json", data_fingerprint="another"),
    "is of other data",
  ),
  "trained on other files": (
    lambda s: edit(cell(s, 0) / "config.json", data__train="other.txt"),
    "ran another config than planned: data.train",
  ),
  "trained on files of other text": (
    lambda s: rewrite(s, 0, log(GOOD, 2.3), data_fingerprint="else"),
    "was trained on other text",
  ),
  "judged on other text": (
    lambda s: rewrite(s, 0, log(GOOD, 2.3, heldout_bytes=4999)),
    "was judged on other held-out text",
  ),
  "another splitter": (
    lambda s: rewrite(s, 0, log(GOOD, 2.3), splitter_hash="letters"),
    "has another splitter",
  ),
  "another tokenizer": (
    lambda s: rewrite(s, 0, log(GOOD, 2.3), tokenizer_hash="bpe"),
    "has another tokenizer",
  ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_compared_is_excluded_and_never_averaged(
  study, kind, capsys
):
  spoil, reason = BAD[kind]
  spoil(study)
  rows = collect.collect(study).rows
  assert [row.excluded is None for row in rows] == [False, *[True] * 3]
  assert reason in rows[0].excluded
  out = study / "report"
  assert scaling_main.main(["fit", str(study), f"--out={out}"]) == 0
  assert f"excluded: {rows[0].id}: " in capsys.readouterr().out
  result = json.loads((out / "fits.json").read_text())
  (model,) = result["models"].values()
  (only,) = model["cells"]
  assert len(only["ids"]) == 3
  assert only["loss"] == pytest.approx((2.31 + 2.32 + 2.33) / 3)
  assert result["excluded"][0]["id"] == rows[0].id


def test_a_run_with_another_rule_is_excluded(study):
  for name in ("config.json", "plan.json"):
    path = cell(study, 2) / name
    path.write_text(path.read_text().replace("word@1", "word@2"))
  reasons = [row.excluded for row in collect.collect(study).rows]
  assert "has other splitting rules" in reasons[2]
  assert reasons.count(None) == 3


def test_a_table_without_a_usable_run_says_why(study, capsys):
  for seed in range(4):
    (cell(study, seed) / "state.json").unlink()
  assert scaling_main.main(["fit", str(study)]) == 2
  assert "has not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("absent.jsonl", None, "does not exist"),
    ("n.jsonl", "[1]\n", "no loss_unit"),
    ("n.jsonl", '{"a": 1}\n', "no loss_unit"),
    ("n.jsonl", '{"loss_unit": "b"}\n{', "line 2"),
    (
      "n.jsonl",
      '{"loss_unit": "b"}\n{"id": "x"}',
      "line 2: model is missing",
    ),
    ("p.csv", "a,b\n1,2\n", "needed are a loss"),
    ("p.csv", "loss,params\n1,2\n", "two of params, tokens and budget"),
    ("p.csv", "loss,params,tokens\n1,x,3\n", "params='x' is no number"),
    ("p.csv", "", "has no rows"),
  ],
)
def test_what_is_no_table_is_named(tmp_path, capsys, name, text, message):
  path = tmp_path / name
  if text is not None:
    path.write_text(text)
  assert scaling_main.main(["fit", str(path)]) == 2
  assert message in capsys.readouterr().err


def test_published_points_get_the_third_of_size_data_and_compute(tmp_path):
  path = tmp_path / "points.csv"
  path.write_text("loss,params,Training FLOP\n2.5,10,600\n2.4,10,0\n")
  first, second = collect.load(path).rows
  assert first.bytes == 10 and first.excluded is None
  assert second.excluded == "Training FLOP is 0.0"
