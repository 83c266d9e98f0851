"""The training step, and runs that stop, resume, or are asked the wrong thing.

The runs are real: the command line in this process or another, on real files.
"""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aunet_jax import config as config_lib
from aunet_jax import terminal
from aunet_jax.aunet import loss, network, sharding
from aunet_jax.aunet.network import AUNet
from aunet_jax.data import packing
from aunet_jax.generate.generator import Generator
from aunet_jax.splitting.splitter import Splitter
from aunet_jax.train import __main__ as train_main
from aunet_jax.train import cluster, loop, metrics, optimizer, state
from aunet_jax.train import step as step_lib
from aunet_jax.train.step import make_train_step
from aunet_jax.workdir import layout, load

ROOT = Path(__file__).parents[2]
TINY = "--config=tests/tiny.py"
ONE_DEVICE = config_lib.MeshConfig(data=1, fsdp=1, tensor=1)
TEXT = (
  "The byte is small. The word is longer, and a sentence of words is longer "
  "still; 1234 numbers count too.\n"
)


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture
def corpus(tmp_path) -> Path:
  return write_corpus(tmp_path / "corpus")


def write_corpus(folder: Path) -> Path:
  folder.mkdir()
  rng = np.random.default_rng(0)
  words = TEXT.split()
  for i in range(40):
    chosen = rng.choice(words, size=int(rng.integers(5, 200)))
    (folder / f"{i}.txt").write_text(" ".join(chosen) + f" {i}\n")
  return folder


def tiny(corpus=None, **overrides) -> config_lib.Config:
  flags = [f"--config.{k}={v}" for k, v in overrides.items()]
  if corpus is not None:
    flags += [
      f"--config.data.train={corpus}",
      "--config.data.heldout_fraction=0.1",
    ]
  return config_lib.parse_flags([TINY, *flags])


def run(corpus, workdir, *flags) -> int:
  return train_main.main(
    [
      TINY,
      f"--workdir={workdir}",
      f"--config.data.train={corpus}",
      "--config.data.heldout_fraction=0.1",
      *flags,
    ]
  )


def rows(workdir, *names) -> list[tuple]:
  """(step, loss_nats or held-out loss) of every logged row."""
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [
    (row["step"], row.get("loss_nats"), row.get("heldout_loss_nats"))
    for row in map(json.loads, lines)
  ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
  """The workdir of a run that has ended; its corpus lies beside it."""
  folder = tmp_path_factory.mktemp("finished")
  write_corpus(folder / "corpus")
  monkeypatch = pytest.MonkeyPatch()
  monkeypatch.chdir(ROOT)
  assert (
    run(folder / "corpus", folder / "run", "--config.train.num_steps=6") == 0
  )
  monkeypatch.undo()
  return folder / "run"


@pytest.fixture
def batch(corpus) -> dict:
  config = tiny()
  documents = [p.read_bytes() for p in sorted(corpus.iterdir())]
  packed = packing.pack_documents(
    documents, Splitter(config.model.rules), config.model.capacities
  )
  return {
    name: np.stack([row[name] for row in packed[:8]]) for name in packed[0]
  }


def new_params(config: config_lib.ModelConfig, key: jax.Array) -> dict:
  init = jax.jit(network.init_params, static_argnums=0)
  return sharding.unbox(init(config, key))


def step_on(mesh_config, config, batch, num_steps=1):
  """Losses and final parameters of some steps on one batch."""
  sizes = [mesh_config.data, mesh_config.fsdp, mesh_config.tensor]
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = sharding.make_mesh(mesh_config, devices)
  tx = optimizer.make_optimizer(config)
  train_state = state.create_state(config.model, tx, mesh, config.seed)
  where = sharding.batch_sharding(mesh)
  placed = {k: jax.device_put(v, where) for k, v in batch.items()}
  losses = []
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    step = jax.jit(make_train_step(config, tx))
    for _ in range(num_steps):
      train_state, step_metrics = step(train_state, placed)
      losses.append(
        float(step_metrics["nats"]) / float(step_metrics["targets"])
      )
  return losses, jax.device_get(train_state.params)


# ----- the step -------------------------------------------------------------


def test_step_is_adamw_on_the_mean_over_all_targets(batch):
  config = tiny()
  tx = optimizer.make_optimizer(config)
  params = new_params(config.model, jax.random.key(config.seed))
  model = AUNet(config.model)

  def mean_nats(p):
    logits_BLV = model.apply(
      {"params": p}, batch["bytes"], batch["levels"], batch["documents"]
    )
    log_BLV = jax.nn.log_softmax(logits_BLV)
    picked_BL = jnp.take_along_axis(
      log_BLV, jnp.asarray(batch["targets"])[..., None], axis=-1
    )[..., 0]
    return -(picked_BL * batch["weights"]).sum() / batch["weights"].sum()

  value, grads = jax.jit(jax.value_and_grad(mean_nats))(params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  expected = optax.apply_updates(params, updates)
  losses, got = step_on(ONE_DEVICE, config, batch)
  assert losses[0] == pytest.approx(float(value), rel=1e-5)
  # Adam divides by sqrt of the squared gradient: tiny gradients amplify
  # rounding, so the bound is a small part of the learning rate.
  rate = config.optimizer.learning_rate
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=0.02 * rate),
    got,
    jax.device_get(expected),
  )


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_every_mesh_gives_the_same_losses(batch, shape):
  config = tiny()
  one, _ = step_on(ONE_DEVICE, config, batch, 4)
  sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
  other, _ = step_on(config_lib.MeshConfig(**sizes), config, batch, 4)
  np.testing.assert_allclose(other, one, rtol=1e-5)
  assert one[-1] < one[0]


def test_microbatches_equal_one_batch(batch):
  config = tiny()
  mesh = config_lib.MeshConfig(data=2, fsdp=1, tensor=1)
  whole, _ = step_on(mesh, config, batch, 3)
  split = dataclasses.replace(
    config, train=dataclasses.replace(config.train, grad_accumulation=4)
  )
  parts, _ = step_on(mesh, split, batch, 3)
  np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_no_large_parameter_is_replicated_by_accident():
  config = tiny()
  tx = optimizer.make_optimizer(config)
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=1, fsdp=4, tensor=2))
  abstract, shardings = state.abstract_state(config.model, tx, mesh)
  whole = []
  for (path, leaf), where in zip(
    jax.tree_util.tree_leaves_with_path(abstract),
    jax.tree.leaves(shardings),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    table = "embed" in name or "head" in name  # 258 rows: whole on purpose
    if leaf.size >= 1024 and where.is_fully_replicated and not table:
      whole.append(name)
  assert not whole


def test_a_step_that_is_not_finite_changes_nothing(batch):
  config = tiny()
  tx = optimizer.make_optimizer(config)
  params = new_params(config.model, jax.random.key(0))
  params["head"] = params["head"].at[0, 0].set(jnp.inf)
  zero = jnp.zeros((), jnp.int32)
  before = state.TrainState(zero, params, tx.init(params), zero, zero)
  after, _ = jax.jit(make_train_step(config, tx))(before, batch)
  for old, new in zip(
    jax.tree.leaves((before.params, before.opt_state)),
    jax.tree.leaves((after.params, after.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(old, new)
  assert (after.step, after.nonfinite_in_row, after.nonfinite_total) == (
    1,
    1,
    1,
  )


def test_a_run_that_stays_nonfinite_stops_and_says_where(
  corpus, tmp_path, capsys
):
  status = run(
    corpus,
    tmp_path / "run",
    "--config.optimizer.learning_rate=1e18",
    "--config.optimizer.warmup_steps=0",
    "--config.train.max_nonfinite_steps=3",
    "--config.train.num_steps=50",
  )
  assert status == 1
  error = capsys.readouterr().err
  assert "not finite in the last 3 steps" in error
  assert "learning_rate=1e+18" in error


@pytest.fixture
def broken_at_5(monkeypatch) -> list[int]:
  """Parameters that turn to NaN before the fifth call of the step.

  Yields: a hash of the batch of every call.
  """
  real, batches = step_lib.compile_step, []

  def compile_step(*arguments):
    step_fn = real(*arguments)

    def broken(train_state, batch):
      batches.append(hash(np.asarray(batch["bytes"]).tobytes()))
      if len(batches) == 5:
        nan = jax.tree.map(lambda x: x * jnp.nan, train_state.params)
        train_state = train_state.replace(params=nan)
      return step_fn(train_state, batch)

    return broken

  monkeypatch.setattr(loop, "compile_step", compile_step)
  return batches


def test_a_run_goes_back_and_past_the_data_that_broke_it(
  corpus, tmp_path, capsys, broken_at_5
):
  flags = (
    "--config.train.max_nonfinite_steps=3", "--config.train.max_roll_backs=1"
  )  # fmt: skip
  assert run(corpus, tmp_path / "run", *flags) == 0
  # Steps 5 to 7 were skipped, and read when step 8 ran or 7 was logged.
  assert "back to checkpoint 3" in capsys.readouterr().out
  logged = layout.read_rows(tmp_path / "run" / "metrics.jsonl")
  (back,) = [row for row in logged if "rolled_back_from" in row]
  given_up = back["rolled_back_from"] - 3
  assert back["rows_given_up"] == 8 * given_up
  assert len(broken_at_5) == 12 + given_up
  assert len(set(broken_at_5)) == len(broken_at_5)  # no batch comes again
  losses = [row for row in logged if "loss_nats" in row]
  assert [row["step"] for row in losses] == [2, 4, 6, 8, 10, 12]
  assert all(row["loss_nats"] is not None for row in losses)
  assert layout.steps(tmp_path / "run")[-1] == 12


def test_without_a_checkpoint_to_go_back_to_the_run_stops(
  corpus, tmp_path, capsys, broken_at_5
):
  flags = (
    "--config.train.max_nonfinite_steps=3", "--config.train.max_roll_backs=1",
    "--config.checkpoint.every_steps=100",
  )  # fmt: skip
  assert run(corpus, tmp_path / "run", *flags) == 1
  assert "not finite in the last 3 steps" in capsys.readouterr().err


def test_a_loss_that_stands_out_is_logged_once_and_after_a_resume_too():
  rng = np.random.default_rng(0)

  def step_metrics(bits):
    return {
      "nats": np.float32(bits * np.log(2) * 1000),
      "bytes": np.int32(1000),
      "grad_norm": np.float32(1),
    }

  interval = metrics.Interval()
  assert interval.spike(1, step_metrics(50.0), 6) is None  # nothing to compare
  for step in range(2, 302):
    usual = step_metrics(2 + 0.05 * rng.standard_normal())
    assert interval.spike(step, usual, 6) is None
  assert interval.spike(302, step_metrics(np.nan), 6) is None
  resumed = metrics.Interval(json.loads(json.dumps(interval.to_json())))
  row = interval.spike(303, step_metrics(3.5), 6)
  assert row == resumed.spike(303, step_metrics(3.5), 6)
  assert row["step"] == 303 and row["spike_bits_per_byte"] > 3.4
  assert row["usual_bits_per_byte"] < 3
  assert interval.spike(304, step_metrics(2.0), 6) is None


def test_a_profile_of_the_steps_asked_for(corpus, tmp_path, capsys):
  flags = ("--profile=2:3", "--config.train.num_steps=4")
  assert run(corpus, tmp_path / "run", *flags) == 0
  assert "profile of steps up to 3" in capsys.readouterr().out
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
  for wrong in ("5", "3:2", "0:1", "a:b"):
    assert run(corpus, tmp_path / "run", f"--profile={wrong}") == 2
    assert f"--profile={wrong} must be" in capsys.readouterr().err


def test_level_targets_are_the_levels_of_the_next_bytes():
  levels_BL = jnp.array([[2, 0, 1, 2, 0, 0]])
  documents_BL = jnp.array([[1, 1, 1, 2, 2, 0]])
  targets_BL = jnp.array([[65, 66, config_lib.EOS, 65, 66, 0]])
  level_BL, known_BL = loss.target_levels(levels_BL, documents_BL, targets_BL)
  # The cut piece's last target (66, document 2) lies in another row.
  np.testing.assert_array_equal(known_BL, [[1, 1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(level_BL[0, :4], [0, 1, 0, 0])


def test_the_level_head_trains_and_writes(corpus, tmp_path):
  flags = ("--config.model.level_loss_weight=0.5", "--config.train.num_steps=4")
  assert run(corpus, tmp_path / "run", *flags) == 0
  logged = layout.read_rows(tmp_path / "run" / "metrics.jsonl")
  losses = [row["level_loss_nats"] for row in logged if "loss_nats" in row]
  assert len(losses) == 2 and 0 < losses[1] < losses[0] < 2
  writer = Generator.from_workdir(tmp_path / "run")
  for levels in ("rule", "head"):
    (row,) = writer.generate([b"The "], max_bytes=8, levels=levels)
    assert len(row.levels) == len(row.data)


def test_schedules_meet_their_ends():
  base = config_lib.OptimizerConfig(learning_rate=1.0, warmup_steps=10)
  cosine = optimizer.learning_rate_schedule(base, 100)
  np.testing.assert_allclose([cosine(0), cosine(9)], [0.1, 1.0], rtol=1e-6)
  np.testing.assert_allclose(cosine(99), 0.01, rtol=1e-4)
  wsd = optimizer.learning_rate_schedule(
    dataclasses.replace(base, schedule="wsd", decay_steps=20), 100
  )
  np.testing.assert_allclose([wsd(50), wsd(79)], [1.0, 1.0])
  np.testing.assert_allclose(wsd(99), 0.01, rtol=1e-4)


# ----- stopping and resuming ------------------------------------------------


def test_resume_after_a_signal_logs_what_an_uninterrupted_run_logs(
  corpus, tmp_path, monkeypatch
):
  assert run(corpus, tmp_path / "whole") == 0
  # A signal that arrives while step 5 is being absorbed.
  real, seen = sharding.to_device, []

  def interrupt(*args):
    seen.append(0)
    if len(seen) == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)

  monkeypatch.setattr(sharding, "to_device", interrupt)
  assert run(corpus, tmp_path / "cut") == terminal.EXIT_STOPPED
  monkeypatch.undo()
  monkeypatch.chdir(ROOT)
  assert layout.steps(tmp_path / "cut")[-1] not in (3, 6, 9, 12)
  assert run(corpus, tmp_path / "cut") == 0
  assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_kill_9_at_any_step_then_the_same_command_repeats_every_loss(
  corpus, tmp_path
):
  command = [
    sys.executable, "-m", "aunet_jax.train", TINY,
    f"--config.data.train={corpus}", "--config.data.heldout_fraction=0.1",
    "--config.train.num_steps=40", "--config.checkpoint.every_steps=4",
    "--config.train.eval_every_steps=6",
  ]  # fmt: skip
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}

  def start(workdir):
    return subprocess.Popen(
      [*command, f"--workdir={workdir}"],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  whole = start(tmp_path / "whole")
  assert whole.wait() == 0, whole.stderr.read()
  kills = 0
  for after_steps in (5, 15, 40):
    process = start(tmp_path / "cut")
    metrics_path = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None:
      logged = rows(tmp_path / "cut") if metrics_path.exists() else []
      if logged and logged[-1][0] >= after_steps:
        break
      time.sleep(0.01)
    if process.poll() is None and after_steps < 40:
      process.kill()
      kills += 1
    process.wait()
  assert kills == 2
  assert process.returncode == 0, process.stderr.read()
  assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_rows_past_the_restored_step_and_torn_lines_are_removed(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
  layout.drop_rows_after(path, 4)
  assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_a_finished_run_says_so_and_changes_nothing(corpus, tmp_path, capsys):
  assert run(corpus, tmp_path / "run") == 0
  before = rows(tmp_path / "run")
  assert run(corpus, tmp_path / "run") == 0
  assert "held-out text" in capsys.readouterr().out
  assert rows(tmp_path / "run") == before
  more = ("--config.train.num_steps=14", "--accept_learning_rate")
  assert run(corpus, tmp_path / "run", *more) == 0
  assert rows(tmp_path / "run")[-1][0] == 14


# ----- bad input ------------------------------------------------------------


@pytest.mark.parametrize(
  ("flag", "named"),
  [
    ("--config.seed=1", "seed: 0 -> 1"),
    ("--config.model.stages[1].dim=80", "model.stages[1].dim: 64 -> 80"),
    ("--config.model.stages[1].rule=word@2", "model.stages[1].rule"),
    ("--config.optimizer.learning_rate=0.1", "optimizer.learning_rate"),
    ("--config.data.text_field=body", "data.text_field"),
    ("--config.train.num_steps=4", "train.num_steps: 6 -> 4"),
  ],
)
def test_a_workdir_of_another_config_is_refused(finished, capsys, flag, named):
  corpus = finished.parent / "corpus"
  assert run(corpus, finished, "--config.train.num_steps=6", flag) == 2
  error = capsys.readouterr().err
  assert named in error and "another --workdir" in error


def test_a_model_without_training_state_trains_on_anything(
  corpus, tmp_path, capsys
):
  config = tiny()
  load.save_params(
    tmp_path / "run",
    config,
    new_params(config.model, jax.random.key(0)),
  )
  assert run(corpus, tmp_path / "run", "--config.model.stages[1].dim=80") == 2
  assert "model.stages[1].dim" in capsys.readouterr().err
  flags = (
    "--config.optimizer.learning_rate=1e-4",
    "--config.train.num_steps=3",
  )
  assert run(corpus, tmp_path / "run", *flags) == 0
  assert "data.train: 'python'" in capsys.readouterr().out


def test_what_may_change_between_starts_changes_and_is_said(
  corpus, tmp_path, capsys
):
  assert run(corpus, tmp_path / "run", "--config.train.num_steps=3") == 0
  flags = (
    "--config.mesh.data=2", "--config.mesh.fsdp=4",
    "--config.train.log_every_steps=1", "--config.model.stages[0].remat=full",
    "--config.train.num_steps=5", "--accept_learning_rate",
  )  # fmt: skip
  assert run(corpus, tmp_path / "run", *flags) == 0
  out = capsys.readouterr().out
  for field in ("mesh.data", "log_every_steps", "remat", "num_steps: 3 -> 5"):
    assert field in out
  assert rows(tmp_path / "run")[-1][0] == 5


def test_a_run_reads_its_index_whatever_becomes_of_the_sources(
  corpus, tmp_path, capsys
):
  workdir = tmp_path / "run"
  assert run(corpus, workdir, "--config.train.num_steps=3") == 0
  (corpus / "0.txt").write_text("something else entirely\n")
  assert run(corpus, workdir, "--config.train.num_steps=4") == 0
  assert "goes on with the index it began with" in capsys.readouterr().out
  shutil.rmtree(workdir / "data")
  assert run(corpus, workdir, "--config.train.num_steps=5") == 2
  assert "files were added, removed or edited" in capsys.readouterr().err


def test_two_runs_do_not_share_a_workdir(finished, capsys):
  corpus = finished.parent / "corpus"
  with layout.lock_workdir(finished):
    assert run(corpus, finished, "--config.train.num_steps=6") == 2
  assert "another process is training in" in capsys.readouterr().err
  assert run(corpus, finished, "--config.train.num_steps=6") == 0


@pytest.mark.parametrize(
  ("backend", "set_to", "expected"),
  [
    ("tpu", None, "aunet_jax/compiled"),
    ("gpu", "/elsewhere", "/elsewhere"),
    ("gpu", "", ""),
    ("cpu", None, None),
  ],
)
def test_compiled_programs_are_kept_on_accelerators(
  backend, set_to, expected, monkeypatch, tmp_path
):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  try:
    jax.config.update("jax_compilation_cache_dir", set_to)
    cluster.keep_compiled_programs()
    found = jax.config.jax_compilation_cache_dir
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  if set_to is None and expected is not None:
    expected = str(tmp_path / expected)
  assert found == expected


def test_an_interval_without_a_finite_loss_is_null():
  config = tiny()
  interval = metrics.Interval()
  step_metrics = {
    "nats": np.float32("nan"),
    "level_nats": np.float32(0),
    "targets": np.float32(10),
    "bytes": np.int32(9),
    "positions": np.array([10, 3]),
    "grad_norm": np.float32("inf"),
    "nonfinite_in_row": np.int32(1),
    "nonfinite_total": np.int32(1),
  }
  interval.add(step_metrics)
  row = interval.row(config, 1, step_metrics)
  assert (row["loss_nats"], row["bits_per_byte"], row["grad_norm"]) == (
    None,
  ) * 3
  assert row["bytes_seen"] == 9
  interval.add(step_metrics | {"nats": np.float32(7.0)})
  assert interval.row(config, 2, step_metrics)["loss_nats"] == pytest.approx(
    0.7
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config.sed=1"], "seed"),
    (["--config.seed=-1"], "seed=-1"),
    (["--config.model.vocab_size=100"], "vocab_size=100 must be at least 258"),
    (["--config.optimizer.learning_rate=nan"], "positive number"),
    (["--config.optimizer.beta2=1.5"], "beta2=1.5 must be 0 to 1"),
    (["--config.model.stages[0].num_kv_heads=0"], "num_kv_heads=0"),
    (["--config.train.eval_bytes=-3"], "eval_bytes=-3"),
    (["--config.train.sample_prompt=" + "x" * 200], "200 bytes"),
    (["--config.train.num_step=1"], "num_steps"),
    (["--config.seed=x"], "invalid literal for int"),
    (["--config.model.stages[0].dim=33"], "multiple of head_dim=16"),
    (["--config.train.batch_size=12"], "multiple of 8"),
    (["--config.mesh.data=3"], "needs 3 devices but there are 8"),
    (["--config.data.train=/no/such/place"], "/no/such/place"),
    (["--config.optimizer.schedule=cosin"], "cosine"),
    (["--config.optimizer.warmup_steps=12"], "num_steps=12"),
    (["--config.model.stages[1].rule=wrod@1"], "wrod@1"),
    (["--nonsense=1"], "nonsense"),
  ],
)
def test_bad_settings_are_named(corpus, tmp_path, capsys, flags, message):
  assert run(corpus, tmp_path / "run", *flags) == 2
  error = capsys.readouterr().err
  assert message in error and "Traceback" not in error


def test_a_missing_config_file_is_named(tmp_path, capsys):
  status = train_main.main(
    ["--config=configs/nope.py", f"--workdir={tmp_path}"]
  )
  assert status == 2
  assert "configs/nope.py" in capsys.readouterr().err


def test_an_empty_data_path_is_an_error(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  assert run(tmp_path / "empty", tmp_path / "run") == 2
  assert "empty" in capsys.readouterr().err


def test_bytes_that_are_no_text_train_where_one_insists(tmp_path):
  (tmp_path / "noise").mkdir()
  noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8)
  (tmp_path / "noise" / "a.bin").write_bytes(noise.tobytes())
  assert (
    run(
      f"text:{tmp_path / 'noise'}",
      tmp_path / "run",
      "--config.train.num_steps=3",
      "--config.data.heldout_fraction=0",
    )
    == 0
  )


def test_bad_jsonl_lines_are_skipped_counted_and_shown(tmp_path, capsys):
  good = json.dumps({"text": TEXT * 3})
  lines = [good] * 300 + ["{not json", json.dumps({"body": "x"})]
  (tmp_path / "d.jsonl").write_text("\n".join(lines))
  flags = ("--config.train.num_steps=3", "--config.data.heldout_fraction=0")
  assert run(tmp_path / "d.jsonl", tmp_path / "run", *flags) == 0
  assert "skipped" in capsys.readouterr().out


def test_a_full_disk_during_a_checkpoint_is_a_clear_error(corpus, tmp_path):
  """Files may grow to 100 kB, less than the parameters need."""
  process = subprocess.run(
    [
      sys.executable, "-m", "aunet_jax.train", TINY,
      f"--config.data.train={corpus}", f"--workdir={tmp_path / 'run'}",
      "--config.data.heldout_fraction=0.1",
      "--config.model.stages[1].dim=128",
    ],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    preexec_fn=lambda: resource.setrlimit(
      resource.RLIMIT_FSIZE, (100_000, 100_000)
    ),
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert process.returncode == 1, process.stderr
  assert "Traceback" not in process.stderr  # JAX's cache may warn
  said = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
  assert len(said) == 1, process.stderr
  assert said[0].startswith("error: a checkpoint could not be written")
  assert layout.steps(tmp_path / "run") == []


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 8 MB."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
  try:
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
  except FileNotFoundError:
    mounted = False
  if not mounted:
    pytest.skip("mounting a small file system needs root")
  yield disk
  subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_too_small_for_a_checkpoint_is_said_before_it_is_written(
  corpus, small_disk, capsys
):
  flags = ("--config.model.stages[1].dim=256", "--config.train.num_steps=4")
  assert run(corpus, small_disk / "run", *flags) == 1
  error = capsys.readouterr().err
  assert "MB free; free some space" in error
  assert layout.steps(small_disk / "run") == []


def test_a_row_that_cannot_be_written_names_its_file(tmp_path):
  log = metrics.Log(tmp_path, tiny(), step=0, active=True)
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  with pytest.raises(OSError, match="No space left.*metrics.jsonl"):
    log.row({"step": 1})
  log.close()


@pytest.mark.parametrize("flag", ["--workdir", "--config.data.cache_dir"])
def test_a_url_to_write_to_is_refused_at_the_start(
  flag, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  flags = {"--workdir": str(tmp_path / "run"), flag: "s3://bucket/run"}
  config = f"--config={ROOT / 'tests' / 'tiny.py'}"
  status = train_main.main([config, *(f"{k}={v}" for k, v in flags.items())])
  assert status == 2
  assert f"{flag[2:].removeprefix('config.')}=s3://bucket/run is a URL" in (
    capsys.readouterr().err
  )
  assert not (tmp_path / "s3:").exists()
