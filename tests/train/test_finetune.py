"""Training on prompts and conversations: only answers are learned."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax import answers, terminal
from aunet_jax import config as config_lib
from aunet_jax.aunet import network, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.data import corpora, packing, roles
from aunet_jax.data import tokenizer as tokenizer_lib
from aunet_jax.data.tokenizer import Tokenizer
from aunet_jax.evaluate import bits_per_byte, score
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import __main__ as train_main
from aunet_jax.train import step
from aunet_jax.workdir import layout, load

ROOT = Path(__file__).parents[2]
TINY = "--config=tests/tiny.py"
FORMAT = ("--config.data.format=completion",)


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def new_params(config: config_lib.Config) -> dict:
  init = jax.jit(network.init_params, static_argnums=0)
  return sharding.unbox(init(config.model, jax.random.key(0)))


def talks() -> list[bytes]:
  """Conversations of several turns, a system's among them."""
  rng = np.random.default_rng(0)
  words = "the byte is small the word is longer".split()

  def some(most):
    return " ".join(rng.choice(words, int(rng.integers(1, most))))

  texts = []
  for number in range(12):
    turns = [roles.turn_of("system", "be brief")] * (number % 2)
    for _ in range(1 + number % 3):
      turns += [
        roles.turn_of("user", some(5)), roles.turn_of("assistant", some(3))
      ]  # fmt: skip
    texts.append(roles.encode(turns))
  return texts


@pytest.fixture(scope="module")
def setting():
  config = config_lib.parse_flags([f"--config={ROOT / 'tests/tiny.py'}"])
  splitter = Splitter(config.model.rules, has_roles=True)
  rows = packing.pack_documents(
    talks(), splitter, config.model.capacities, keep_documents=True
  )
  batch = {k: jnp.stack([row[k] for row in rows]) for k in rows[0]}
  return AUNet(config.model), new_params(config), batch, splitter


def loss_of(model, params, batch):
  return step.loss_sums(model, params, batch, jnp.float32(1))[1][0]


def test_no_gradient_comes_from_the_targets_of_prompts(setting):
  model, params, batch, _ = setting
  grad = jax.jit(jax.grad(lambda p, b: loss_of(model, p, b)))
  learned = batch["weights"] > 0
  assert 0 < learned.sum() < (batch["documents"] > 0).sum()

  def with_targets(where):
    other = (batch["targets"] + 1) % 256
    return batch | {"targets": jnp.where(where, other, batch["targets"])}

  known = grad(params, batch)
  same = grad(params, with_targets(~learned))
  jax.tree.map(np.testing.assert_array_equal, known, same)
  other = grad(params, with_targets(learned))
  assert any(
    (a != b).any()
    for a, b in zip(jax.tree.leaves(known), jax.tree.leaves(other), strict=True)
  )


def test_a_packed_batch_has_the_loss_of_each_conversation_alone(setting):
  model, params, batch, splitter = setting
  assert batch["documents"].max() > 1  # rows do hold several
  loss = jax.jit(lambda b: loss_of(model, params, b))
  with jax.default_matmul_precision("highest"):
    together = float(loss(batch))
    alone = []
    for text in talks():
      (row,) = packing.pack_documents([text], splitter, (128, 32))
      alone.append(
        float(loss({k: jnp.asarray(v[None]) for k, v in row.items()}))
      )
  np.testing.assert_allclose(together, sum(alone), rtol=1e-5)


def pairs(count: int) -> list[dict]:
  return [
    {"prompt": f"{n} plus {n % 7} is", "completion": f" {n + n % 7}."}
    for n in range(count)
  ]


def write(path: Path, records: list[dict]) -> Path:
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def run(workdir, *flags) -> int:
  return train_main.main([TINY, f"--workdir={workdir}", *flags])


def test_a_text_model_is_tuned_and_its_held_out_answers_are_scored(
  tmp_path,
):
  config = config_lib.parse_flags([TINY])
  load.save_params(tmp_path / "text", config, new_params(config))
  train = write(tmp_path / "train.jsonl", pairs(200))
  heldout = write(tmp_path / "heldout.jsonl", pairs(40)[1::3])
  flags = (
    *FORMAT, f"--config.train.init_from={tmp_path / 'text'}",
    f"--config.data.train={train}", f"--config.data.heldout={heldout}",
    "--config.train.num_steps=4",
  )  # fmt: skip
  assert run(tmp_path / "run", *flags) == 0
  row = layout.read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
  loaded = load.load(tmp_path / "run")
  assert loaded.splitter.has_roles
  asked = []
  for record in pairs(40)[1::3]:
    user = roles.turn_of("user", record["prompt"])
    prompt = roles.encode_prompt([user])
    asked.append((prompt, record["completion"].encode() + roles.END_TEXT))
  scores = score.score(
    loaded.model.config, loaded.params, loaded.splitter, asked
  )
  nats = -sum(one.nats for one in scores)
  num_bytes = sum(len(answer) - 1 for _, answer in asked)  # END is no byte
  assert row["heldout_bytes"] == num_bytes
  np.testing.assert_allclose(
    row["heldout_bits_per_byte"], nats / num_bytes / np.log(2), rtol=1e-4
  )


def answers_to(records: list[dict]) -> list[tuple[bytes, bytes]]:
  return [
    (
      roles.encode_prompt([roles.turn_of("user", record["prompt"])]),
      record["completion"].encode() + roles.END_TEXT,
    )
    for record in records
  ]


@pytest.fixture
def of_tokens(tmp_path) -> list[str]:
  """Flags that train a model of tokens on answers, and hold some out."""
  file = tmp_path / "tokenizer.json"
  text = "".join(r["prompt"] + r["completion"] for r in pairs(200)).encode()
  file.write_text(tokenizer_lib.train([text], 300))
  train = write(tmp_path / "train.jsonl", pairs(200))
  heldout = write(tmp_path / "heldout.jsonl", pairs(40)[1::3])
  return [
    "--config=tests/tiny_tokens.py", f"--config.data.tokenizer={file}",
    f"--config.model.vocab_size={Tokenizer(file).vocab_size}", *FORMAT,
    f"--config.data.train={train}", f"--config.data.heldout={heldout}",
    "--config.train.num_steps=3", f"--workdir={tmp_path / 'run'}",
  ]  # fmt: skip


def score_all(loaded, records) -> tuple[float, int]:
  """Nats of answers, each alone, and their bytes of text."""
  asked = answers_to(records)
  scores = score.score(
    loaded.model.config, loaded.params, loaded.splitter, asked,
    tokenizer=loaded.tokenizer,
  )  # fmt: skip
  nats = -sum(one.nats for one in scores)
  return nats, sum(len(answer) - 1 for _, answer in asked)


def test_a_model_of_tokens_learns_answers_too(of_tokens, tmp_path):
  assert train_main.main(of_tokens) == 0
  row = layout.read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
  loaded = load.load(tmp_path / "run")
  assert loaded.splitter.has_roles
  with jax.default_matmul_precision("highest"):
    nats, num_bytes = score_all(loaded, pairs(40)[1::3])
  assert row["heldout_bytes"] == num_bytes
  expected = nats / num_bytes / np.log(2)
  assert row["heldout_bits_per_byte"] == pytest.approx(expected, rel=1e-4)
  # Packed conversations have the loss that they have alone.
  data, capacities = loaded.config.data, loaded.model.config.capacities
  _, heldout = corpora.open_corpora(
    data, loaded.splitter, capacities, tmp_path / "cache", lambda line: None
  )
  packed = [heldout.row(number) for number in range(heldout.num_rows)]
  assert max(row["documents"].max() for row in packed) > 1
  batch = {k: np.stack([row[k] for row in packed]) for k in packed[0]}
  assert batch["target_bytes"].sum() == num_bytes
  with jax.default_matmul_precision("highest"):
    loss = jax.jit(lambda p, b: loss_of(loaded.model, p, b))
    together = float(loss(loaded.params, batch))
  np.testing.assert_allclose(together, nats, rtol=1e-5)


@pytest.mark.slow  # two trainings, and a program for everything asked
def test_a_model_of_tokens_is_tuned_scored_and_asked(
  of_tokens, tmp_path, capsys
):
  (tmp_path / "text.txt").write_text(
    "".join(r["prompt"] + r["completion"] for r in pairs(200))
  )
  text = (
    "--config.data.format=text", "--config.data.heldout=None",
    f"--config.data.train={tmp_path / 'text.txt'}",
    f"--workdir={tmp_path / 'text'}", "--config.data.heldout_fraction=0",
  )  # fmt: skip
  assert train_main.main([*of_tokens, *text]) == 0
  more = (
    f"--config.train.init_from={tmp_path / 'text'}",
    "--config.train.sample_bytes=8",
  )
  assert train_main.main([*of_tokens, *more]) == 0
  assert "sample (temperature" in capsys.readouterr().out
  loaded = load.load(tmp_path / "run")
  nats, num_bytes = score_all(loaded, pairs(40)[1::3])
  data = tmp_path / "heldout.jsonl"
  result = bits_per_byte.evaluate_workdir(
    str(tmp_path / "run"), str(data), answers=True
  )
  assert result["bytes"] == num_bytes
  expected = nats / num_bytes / np.log(2)
  assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-4)
  asked = [f"--workdir={tmp_path / 'run'}", f"--data={data}", "--limit=3"]
  assert answers.main([*asked, "--max_bytes=9"]) == 0
  assert answers.main([*asked, "--labels= 8., 9."]) == 0


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--config.data.train={}/nowhere.jsonl", *FORMAT), "nowhere.jsonl"),
    (FORMAT, "data.format='completion' needs data.train"),
    (("--config.data.format=chats",), "Did you mean 'chat'?"),
    (
      ("--config.data.separator=line", "--config.data.train=x", *FORMAT),
      "data.separator='line' is for data.format='text'",
    ),
    (
      (
        "--config.data.train={}/train.jsonl",
        "--config.train.init_from={}/text",
        "--config.model.stages[1].rule=word@2",
        *FORMAT,
      ),
      "stages[1].rule is 'word@1' there, 'word@2' here",
    ),
    (
      (
        "--config.data.train={}/train.jsonl",
        "--config.data.prompt_field=question",
        *FORMAT,
      ),
      "no 'question' among: prompt, completion",
    ),
  ],
)
def test_what_cannot_be_tuned_is_said_and_leaves_nothing(
  tmp_path, capsys, flags, message
):
  config = config_lib.parse_flags([TINY])
  load.save_params(tmp_path / "text", config, new_params(config))
  write(tmp_path / "train.jsonl", pairs(3))
  flags = [flag.replace("{}", str(tmp_path)) for flag in flags]
  assert run(tmp_path / "run", *flags) == terminal.EXIT_BAD_INPUT
  error = capsys.readouterr().err
  assert message in error and error.count("error:") == 1
  left = {p.name for p in (tmp_path / "run").rglob("*")}
  assert not any(
    name.endswith((".json", ".bin", ".jsonl")) or name.isdigit()
    for name in left
  )
