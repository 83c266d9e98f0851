"""Training on prompts and conversations: only answers are learned."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aunet_jax import config as config_lib
from aunet_jax import terminal
from aunet_jax.aunet import network, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.data import packing, roles
from aunet_jax.evaluate import score
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
