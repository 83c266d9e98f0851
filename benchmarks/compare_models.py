"""AU-Net 2 and 3, flat bytes and BPE: trained alike, tuned alike, one table.

  python -m benchmarks.compare_models --lm=data/lm \\
      --eval=data/eval,data/multilingual --output=runs/compare

1. Pre-trains the four models below on the same bytes in the same order: equal
   useful FLOPs a byte, so equal compute.
2. Tunes each on three recipes of configs/.
3. Scores: held-out text, tasks of likelihoods, and what was tuned, each with
   its 95% interval (1,000 bootstrap samples of documents or questions; of tasks
   1.96 of the harness's standard errors), beside what chance, the commonest
   answer or copying gets.

Every part is a command of the package in a process of its own, and its results
stay under --output: run again, it goes on, and from finished parts it only
makes the table. Needs pip install -e '.[eval,bpe]'. The last line is JSON.
"""

import argparse
import collections
import json
import math
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from aunet_jax import config
from aunet_jax.evaluate.word_overlap import word_f1

ROOT = Path(__file__).parents[1]
VOCABULARY = 2048
MODELS = ("aunet2", "aunet3", "bytes", "bpe")
RECIPES = {
  "sst2": "SST-2, tuned",
  "squad": "SQuAD F1, tuned",
  "translate": "German to English chrF, tuned",
}
TASKS = {  # of lm_eval: metric, what is shown, what needs no model
  "aunet_lambada": ("bits_per_byte", "LAMBADA, bits per byte of the word", {}),
  "aunet_blimp": ("acc", "BLiMP", {"chance": 0.5}),
  "aunet_sst2": ("acc", "SST-2, not tuned", {"always positive": 0.509}),
  "aunet_cute": ("exact_match", "CUTE", {}),
}
BOOTSTRAPS = 1000


# ----- the models -----------------------------------------------------------


def get_config(argument: str):
  """The config of NAME@FOLDER; this file is the config file of its runs."""
  name, _, folder = argument.partition("@")

  def stage(dim, num_layers, window, capacity, rule=None):
    return config.stage(
      dim=dim, num_layers=num_layers, head_dim=32, window=window,
      capacity=capacity, rule=rule,
    )  # fmt: skip

  stages = {
    "aunet2": [stage(96, 1, 64, 1024), stage(192, 3, None, 224, "word@1")],
    "aunet3": [
      stage(96, 1, 64, 1024), stage(128, 1, None, 224, "word@1"),
      stage(192, 3, None, 128, "word@2"),
    ],
    "bytes": [stage(96, 4, 128, 1024)],
    "bpe": [stage(160, 3, None, 368)],  # of 2.8 bytes
  }  # fmt: skip
  c = config.default(stages[name])
  c.model.dtype = "float32"
  c.data.train = [
    {"path": f"{folder}/eltec_eng.jsonl.xz", "weight": 2},
    {"path": f"{folder}/peps.jsonl.xz", "weight": 1},
    {"path": f"{folder}/enwik8_prefix.xml.xz", "weight": 1},
  ]
  c.data.separator = "</page>"
  c.data.heldout_fraction = 0.02
  c.train.batch_size = 4
  c.train.sample_bytes = 0
  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 6e-3
  c.optimizer.clip_norm = 1.0
  c.checkpoint.every_steps = 200
  if name == "bpe":
    c.model.vocab_size = VOCABULARY + 2
  return c


# ----- running --------------------------------------------------------------


class Parts:
  """Runs what has not run yet, one process after the other."""

  def __init__(self, output: Path):
    self.output = output

  def run(self, done: Path, module: str, *flags: str) -> Path:
    """Runs `python -m MODULE FLAGS` unless `done` is there.

    Returns: `done`. Raises: SystemExit where the command fails.
    """
    if done.exists():
      return done
    name = done.relative_to(self.output)
    print(f"{name}: python -m {module} {' '.join(flags)}", flush=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    log = self.output / f"{str(name).replace('/', '_')}.log"
    with log.open("w") as file:
      ended = subprocess.run(
        [sys.executable, "-m", module, *flags], cwd=ROOT, stdout=file,
        stderr=subprocess.STDOUT,
      )  # fmt: skip
    if ended.returncode or not done.exists():
      last = "".join(log.read_text(errors="replace").splitlines(True)[-5:])
      raise SystemExit(f"error: {name} failed; {log} ends with\n{last}")
    return done


def train(parts: Parts, workdir: Path, *flags: str) -> Path:
  """A finished run; one that was cut off goes on."""
  done = workdir / "finished"
  if not done.exists():
    parts.run(
      workdir / "loss_curve.png", "aunet_jax.train", f"--workdir={workdir}",
      *flags,
    )  # fmt: skip
    done.touch()
  return workdir


def pretrain(parts: Parts, name: str, lm: Path, steps: int) -> Path:
  extra = []
  if name == "bpe":
    made = parts.output / "tokenizer.json"
    sources = ("eltec_eng.jsonl.xz", "peps.jsonl.xz")
    parts.run(
      made, "aunet_jax.tokenizer",
      f"--data={','.join(str(lm / source) for source in sources)}",
      f"--vocab_size={VOCABULARY}", f"--output={made}",
    )  # fmt: skip
    extra.append(f"--config.data.tokenizer={made}")
  return train(
    parts, parts.output / name / "base",
    f"--config={__file__}:{name}@{lm}",
    f"--config.data.cache_dir={parts.output}/index",
    f"--config.train.num_steps={steps}",
    f"--config.optimizer.warmup_steps={max(1, steps // 25)}",
    "--config.train.eval_every_steps=0", *extra,
  )  # fmt: skip


def tune(parts: Parts, name: str, recipe: str, steps: int | None) -> Path:
  """Answers of a model tuned on a recipe to what was held out."""
  base, workdir = parts.output / name / "base", parts.output / name / recipe
  data = parts.output / "data" / recipe
  more = [] if steps is None else [f"--config.train.num_steps={steps}"]
  train(
    parts, workdir,
    f"--config={ROOT}/configs/{recipe}.py:{base}/config.json",
    f"--config.train.init_from={base}",
    f"--config.data.train={data}/train.jsonl",
    f"--config.data.heldout={data}/heldout.jsonl", *more,
  )  # fmt: skip
  answers = workdir / "answers.jsonl"
  labels = ["--labels=positive,negative"] if recipe == "sst2" else []
  return parts.run(
    answers, "aunet_jax.answers", f"--workdir={workdir}",
    f"--data={data}/heldout.jsonl", f"--output={answers}", "--limit=300",
    *labels,
  )  # fmt: skip


def recipe_data(parts: Parts, folders: Sequence[Path]) -> None:
  def find(name: str) -> Path:
    found = [folder / name for folder in folders if (folder / name).exists()]
    if not found:
      raise SystemExit(
        f"error: --eval={','.join(map(str, folders))}: none holds {name}."
      )
    return found[0]

  ntrex = parts.output / "data" / "NTREX-128"
  if not ntrex.exists():
    with tarfile.open(find("ntrex128.tar.xz")) as archive:
      archive.extractall(parts.output / "data" / "packed", filter="data")
    (folder,) = (parts.output / "data" / "packed").rglob("NTREX-128")
    folder.rename(ntrex)
  for recipe, source, *more in (
    ("sst2", find("glue/sst2_val.jsonl"), "--heldout_fraction=0.25"),
    ("squad", find("squad/xquad.en.json"), "--heldout_fraction=0.2"),
    ("translate", ntrex, "--pairs=deu-eng"),
  ):
    folder = parts.output / "data" / recipe
    parts.run(
      folder / "heldout.jsonl", "aunet_jax.finetune_data", recipe,
      f"--input={source}", f"--output={folder}", *more,
    )  # fmt: skip


# ----- scores ---------------------------------------------------------------


# A value, and where its 95% interval begins and ends; None: there is none.
Score = tuple[float, float | None, float | None]


def interval(rows: Sequence, value: Callable[[list], float]) -> Score:
  """A value of rows, with the percentiles of values of rows drawn again."""
  rng = np.random.default_rng(0)
  draws = [
    value([rows[i] for i in rng.integers(0, len(rows), len(rows))])
    for _ in range(BOOTSTRAPS)
  ]
  low, high = np.percentile(draws, [2.5, 97.5])
  return value(list(rows)), float(low), float(high)


def mean(values: Iterable[float]) -> float:
  return float(np.mean(list(values)))


def chrf(pairs: Sequence[tuple[str, str]]) -> float:
  """Of (written, reference): sacrebleu's chrF2, over the corpus."""
  import sacrebleu

  written, references = zip(*pairs, strict=True)
  return sacrebleu.corpus_chrf(list(written), [list(references)]).score


def bits(rows: Sequence[tuple[float, int]]) -> float:
  nats, num_bytes = np.sum(np.array(rows, np.float64), axis=0)
  return float(nats / num_bytes / math.log(2))


def read_rows(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def score_answers(recipe: str, rows: list[dict]) -> Score:
  if recipe == "sst2":
    return interval([row["exact"] for row in rows], mean)
  if recipe == "squad":
    return interval([row["word_f1"] for row in rows], mean)
  return interval([(row["answer"], row["expected"]) for row in rows], chrf)


def trivial(recipe: str, rows: list[dict]) -> dict[str, float]:
  """What answers get that need no model."""
  expected = [row["expected"] for row in rows]
  if recipe == "sst2":
    ((answer, count),) = collections.Counter(expected).most_common(1)
    return {f"always {answer}": count / len(rows)}
  # A prompt begins with a mark that is no text, and ends with another.
  asked = [row["prompt"].strip("\ufffd") for row in rows]
  if recipe == "translate":
    sources = [text.partition("\n")[2] for text in asked]
    return {"the source": chrf(list(zip(sources, expected, strict=True)))}
  answers: dict[str, list[str]] = collections.defaultdict(list)
  for text in asked:
    paragraph, _, question = text.rpartition("\n")
    sentences = re.split(r"(?<=[.!?])\s+", paragraph)
    wanted = set(question.lower().split())
    answers["the paragraph"].append(paragraph)
    answers["its first sentence"].append(sentences[0])
    answers["its sentence with most words of the question"].append(
      max(sentences, key=lambda one: len(wanted & set(one.lower().split())))
    )
  return {
    name: mean(map(word_f1, some, expected)) for name, some in answers.items()
  }


def tasks(
  parts: Parts, name: str, args: argparse.Namespace
) -> tuple[dict[str, Score], int]:
  """Scores of tasks with the harness's own errors; how many lost context."""
  done = parts.output / name / "tasks.json"
  parts.run(
    done, "aunet_jax.lm_eval", f"--workdir={parts.output / name / 'base'}",
    f"--tasks={','.join(TASKS)}",
    f"--data_dir={','.join(map(str, args.eval))}", f"--limit={args.limit}",
    f"--output={done}",
  )  # fmt: skip
  results = json.loads(done.read_text())
  scores = {}
  for task, (metric, shown_as, _) in TASKS.items():
    found = results["groups" if task in results["groups"] else "results"][task]
    value, error = found[f"{metric},none"], found[f"{metric}_stderr,none"]
    ends = (None, None)
    if error != "N/A":
      ends = max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)
    scores[shown_as] = (value, *ends)
  return scores, results["truncated"]


def heldout(parts: Parts, name: str, text: Path) -> Score:
  """Bits per byte, EOS left out, of sections of WikiText-2's test set."""
  done = parts.output / name / "wikitext.jsonl"
  parts.run(
    done, "aunet_jax.evaluate", f"--workdir={parts.output / name / 'base'}",
    f"--data={text}", "--separator=\n = ", f"--per_document={done}",
    "--compressor_bytes=0",
  )  # fmt: skip
  rows = [
    (
      row["bits_per_byte_without_eos"] * row["bytes"] * math.log(2),
      row["bytes"],
    )
    for row in read_rows(done)
    if row["bytes"]
  ]
  return interval(rows, bits)


def compute(workdir: Path) -> dict:
  """Bytes read in training, and useful FLOPs a byte of them."""
  from aunet_jax.aunet import counts
  from aunet_jax.workdir import layout

  run = layout.read_config(workdir)
  rows = layout.read_rows(workdir / layout.METRICS_FILE)
  rows = [row for row in rows if "loss_nats" in row]
  fill = np.mean([row["fill"] for row in rows], axis=0)
  positions = (fill * run.model.capacities).tolist()
  seen, steps = rows[-1]["bytes_seen"], rows[-1]["step"]
  flops = counts.useful_train_flops(run.model, positions)
  flops *= steps * run.train.batch_size
  return {
    "parameters": counts.num_parameters(run.model),
    "bytes": seen,
    "useful_flops": flops,
    "useful_flops_per_byte": flops / seen,
  }


# ----- the table ------------------------------------------------------------


def shown(result: dict) -> str:
  """The scores as a Markdown table: a row a score, a column a model."""
  names = list(result["models"])
  lines = [
    f"| | {' | '.join(names)} | without a model |",
    "|---" * (len(names) + 2) + "|",
  ]
  for label, key in (
    ("parameters", "parameters"), ("bytes read", "bytes"),
    ("useful FLOPs a byte", "useful_flops_per_byte"),
  ):  # fmt: skip
    cells = [f"{result['models'][n]['compute'][key]:,.0f}" for n in names]
    lines.append(f"| {label} | {' | '.join(cells)} | |")
  every = [
    score for name in names for score in result["models"][name]["scores"]
  ]
  for score in dict.fromkeys(every):
    cells = []
    for name in names:
      value, low, high = result["models"][name]["scores"].get(
        score, (None, None, None)
      )
      cell = "–" if value is None else f"{value:.3f}"
      cells.append(cell if low is None else f"{cell} ({low:.3f}–{high:.3f})")
    beside = ", ".join(
      f"{what} {value:.3f}"
      for what, value in result["trivial"].get(score, {}).items()
    )
    lines.append(f"| {score} | {' | '.join(cells)} | {beside} |")
  cells = [str(result["models"][n]["truncated"]) for n in names]
  lines.append(f"| prompts that lost context | {' | '.join(cells)} | |")
  return "\n".join(lines)


def _folders(text: str) -> list[Path]:
  return [Path(folder).absolute() for folder in text.split(",")]


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--lm", type=lambda x: Path(x).absolute(), required=True)
  add("--eval", type=_folders, required=True, help="folders of task data")
  add("--output", type=lambda x: Path(x).absolute(), required=True)
  add("--models", default=",".join(MODELS), help="default: %(default)s")
  add("--steps", type=int, default=3000, help="of pre-training (%(default)s)")
  add("--tune_steps", type=int, help="of a recipe (default: its own number)")
  add("--limit", type=int, default=200, help="questions a task (%(default)s)")
  args = parser.parse_args(argv)
  names = args.models.split(",")
  for name in names:
    if name not in MODELS:
      parser.error(f"--models: {name!r} is none of {', '.join(MODELS)}")
  parts = Parts(args.output)
  args.output.mkdir(parents=True, exist_ok=True)
  recipe_data(parts, args.eval)
  result = {
    "models": {},
    "trivial": {shown_as: known for _, shown_as, known in TASKS.values()},
  }
  for name in names:
    base = pretrain(parts, name, args.lm, args.steps)
    scores, truncated = tasks(parts, name, args)
    scores = {
      "WikiText-2, bits per byte": heldout(
        parts, name, args.lm / "wikitext-2" / "test.txt"
      ),
      **scores,
    }
    for recipe in RECIPES:
      rows = read_rows(tune(parts, name, recipe, args.tune_steps))
      scores[RECIPES[recipe]] = score_answers(recipe, rows)
      result["trivial"][RECIPES[recipe]] = trivial(recipe, rows)
    result["models"][name] = {
      "compute": compute(base), "scores": scores, "truncated": truncated
    }  # fmt: skip
    print(shown(result), flush=True)
  given = sys.argv[1:] if argv is None else argv
  result["command"] = shlex.join(
    ["python", "-m", "benchmarks.compare_models", *given]
  )
  text = json.dumps(result)
  (args.output / "table.json").write_text(text)
  (args.output / "table.md").write_text(shown(result) + "\n")
  print(text)


if __name__ == "__main__":
  main()
