"""The small files of a workdir, as they were written and damaged."""

import errno
import json

import pytest

from aunet_jax import config as config_lib
from aunet_jax.workdir import layout

GOOD = {
  "splitter_hash": "ab",
  "data_fingerprint": "cd",
  "tokenizer_hash": None,
  "loader": {"next_row": 8},
  "interval": {"bytes_seen": 5, "nats": 1.0, "positions": [1, 2]},
}


def write_host(workdir, text: str) -> None:
  folder = workdir / "checkpoints" / "5" / "host"
  folder.mkdir(parents=True)
  (folder / "metadata").write_text(text)


def test_what_a_run_wrote_is_read(tmp_path):
  write_host(tmp_path, json.dumps(GOOD))
  assert layout.read_host(tmp_path, 5) == GOOD
  assert not layout.is_converted(GOOD)
  assert layout.is_converted({"splitter_hash": "ab"})


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("5", "host/metadata is 5, not an object"),
    ("{}", "host/metadata lacks splitter_hash"),
    ("[" * 100_000, "nested too deeply"),
    ("{", "cannot be read"),
    ('{"splitter_hash": "ab", "loader": {}}', "lacks data_fingerprint"),
    ({"splitter_hash": 7}, "splitter_hash of host/metadata is 7"),
    ({"tokenizer_hash": []}, "tokenizer_hash of host/metadata is []"),
    ({"data_fingerprint": None}, "data_fingerprint of host/metadata is None"),
    ({"loader": 5}, "loader of host/metadata is 5"),
    ({"loader": {}}, "loader lacks next_row"),
    ({"loader": {"next_row": "8"}}, "next_row of loader is '8'"),
    ({"loader": {"next_row": True}}, "next_row of loader is True"),
    ({"interval": [1]}, "interval of host/metadata is [1]"),
    ({"interval": {"nats": "x"}}, "nats of interval is 'x'"),
    ({"interval": {"positions": [1, "y"]}}, "positions of interval is"),
    ({"interval": {"recent": 3}}, "recent of interval is 3"),
  ],
)
def test_damaged_values_of_a_checkpoint_are_named(tmp_path, text, said):
  if isinstance(text, dict):
    text = json.dumps(GOOD | text)
  write_host(tmp_path, text)
  with pytest.raises(layout.CheckpointError) as caught:
    layout.read_host(tmp_path, 5)
  assert said in str(caught.value) and "\n" not in str(caught.value)
  assert caught.value.status == 2


@pytest.mark.parametrize(
  ("reason", "passes"),
  [
    (OSError(errno.EIO, "Input/output error"), True),
    (OSError(errno.ESTALE, "Stale file handle"), True),
    (FileNotFoundError(errno.ENOENT, "No such file"), False),
    # As TensorStore says it.
    (ValueError('UNKNOWN: Error opening "zarr" driver: Failed to read'), True),
    (ValueError("UNAVAILABLE: CURL error"), True),
    (ValueError("DATA_LOSS: Error decoding"), False),
    ("its optimizer state is missing", False),
  ],
)
def test_what_may_pass_is_worth_another_try(tmp_path, reason, passes):
  (tmp_path / "checkpoints" / "2").mkdir(parents=True)
  error = layout.unreadable(tmp_path / "checkpoints" / "5", reason)
  assert error.status == (1 if passes else 2)
  assert ("run the same command again" in str(error)) == passes
  assert "continue from checkpoint 2" in str(error)


@pytest.mark.parametrize("name", ["²", "007", "copy_9", "٣"])
def test_a_folder_that_orbax_would_take_for_a_step_is_named(tmp_path, name):
  folder = tmp_path / "checkpoints"
  (folder / "12").mkdir(parents=True)
  (folder / "damaged-3").mkdir()
  assert layout.steps(tmp_path) == [12]
  (folder / name).mkdir()
  with pytest.raises(layout.CheckpointError, match=f"{name} is named like a"):
    layout.steps(tmp_path)


def test_rows_with_a_field_of_another_type_are_left_out(tmp_path):
  path = tmp_path / layout.METRICS_FILE
  rows = [
    {"step": 1, "bytes_seen": 10, "bits_per_byte": None},
    {"step": 2, "bytes_seen": 20},
    {"step": 3, "bits_per_byte": 2.5, "free": {"x": []}},
    {"step": 4, "bytes_seen": 40, "bits_per_byte": 2},
  ]
  damaged = [
    '{"step": "5"}', '{"step": true}', "[]", "5", "{", "[" * 100_000,
    '{"step": 5, "bytes_seen": "x"}', '{"step": 5, "bits_per_byte": []}',
    '{"step": 5, "heldout_bytes": null}',
  ]  # fmt: skip
  path.write_text("\n".join([*map(json.dumps, rows), *damaged]))
  assert layout.read_rows(path) == rows
  assert layout.column(rows, "bytes_seen", "bits_per_byte") == [(40, 2)]
  assert layout.column(rows, "nothing") == []


@pytest.mark.parametrize(
  "text", ["", "5", "[]", '{"model": 5}', '{"seed": 1}', "[" * 100_000]
)
def test_a_damaged_config_is_one_line(tmp_path, text):
  (tmp_path / layout.CONFIG_FILE).write_text(text)
  with pytest.raises(layout.CheckpointError, match="config.json cannot be rea"):
    layout.read_config(tmp_path)


def test_an_older_config_has_the_defaults_of_newer_settings(tmp_path):
  stage = config_lib.StageConfig(
    dim=32, num_layers=1, head_dim=16, window=16, capacity=64
  )
  config = config_lib.Config(model=config_lib.ModelConfig(stages=(stage,)))
  values = json.loads(config.to_json())
  del values["checkpoint"]["every_minutes"], values["train"]["hang_seconds"]
  (tmp_path / layout.CONFIG_FILE).write_text(json.dumps(values))
  assert layout.read_config(tmp_path) == config


def test_rows_past_the_restored_step_and_torn_lines_are_removed(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
  layout.drop_rows_after(path, 4)
  assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


@pytest.mark.parametrize("name", ["x[1]", "lr*", "what?", "[1]/run"])
def test_a_workdir_whose_name_is_a_pattern_is_refused(tmp_path, name):
  layout.check_name(tmp_path / "a b#c")
  with pytest.raises(ValueError, match="its checkpoints would lack their arra"):
    with layout.lock_workdir(tmp_path / name):
      pass
  assert not (tmp_path / name).exists()
