"""What a run takes for `auto` on a GPU, and what is kept of a trial."""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest

from aunet_jax.aunet import kernels, sharding, trial
from aunet_jax.config import MeshConfig, ModelConfig, StageConfig
from tests.aunet.test_trial import SHAPE

STAGE = StageConfig(
  dim=32, num_layers=1, head_dim=8, window=32, capacity=200, num_kv_heads=2
)
COARSE = dataclasses.replace(STAGE, window=None, capacity=100, rule="word@1")
MODEL = ModelConfig(stages=(STAGE, COARSE))


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
  """The platform alone; returns what was said and what was measured."""
  monkeypatch.setattr(sharding, "platform", lambda mesh=None: "gpu")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  said, measured = [], []

  def measure(shape):
    measured.append(shape)
    none = dict.fromkeys(trial.PARTS, 0.0)
    return {
      name: trial.Tried(2.0 - (name == "triton_64"), none, None)
      for name in trial.candidates(shape)
    }

  def resolve(model=MODEL, **more):
    more.setdefault("measure", measure)
    return kernels.resolve(model, say=said.append, **more)

  return resolve, said, measured, tmp_path / "aunet_jax" / "attention"


def chosen(model):
  return [stage.attention for stage in model.stages]


def test_each_shape_is_tried_once_and_kept(on_gpu):
  resolve, said, measured, folder = on_gpu
  model, record = resolve()
  assert chosen(model) == ["triton_64", "triton_64"]
  assert measured == [SHAPE, SHAPE._replace(length=100, window=None)]
  assert "stage 1 triton_64 (1e+03 ms" in said[-1] and "\n" not in said[-1]
  assert resolve() == (model, record)
  three = dataclasses.replace(MODEL, stages=(STAGE, COARSE, COARSE))
  resolve(three)
  assert len(measured) == 2 and len(list(folder.iterdir())) == 2


def test_a_damaged_file_is_said_and_ignored(on_gpu):
  resolve, said, measured, folder = on_gpu
  model, _ = resolve()
  for damage in ("{", "[]", '{"key": 1}', '{"key": 1, "tried": {}}'):
    said.clear()
    for path in folder.iterdir():
      path.write_text(damage)
    assert resolve()[0] == model
    assert sum("is damaged and ignored" in line for line in said) == 2
    assert not [x for x in said if "damaged" in x and str(folder) not in x]
  assert len(measured) == 10


def test_other_versions_or_devices_try_again(on_gpu, monkeypatch):
  resolve, _, measured, _ = on_gpu
  _, record = resolve()
  here = kernels.setting()
  monkeypatch.setattr(kernels, "setting", lambda: here | {"driver": "999"})
  assert resolve(kept=record)[1]["key"] != record["key"]
  assert len(measured) == 4


def test_a_run_that_goes_on_keeps_its_kernels(on_gpu):
  resolve, said, measured, _ = on_gpu
  _, record = resolve()
  kept = json.loads(json.dumps(record)) | {"kernels": ["xla", "triton"]}
  model, again = resolve(kept=kept)
  assert chosen(model) == ["xla", "triton"] == again["kernels"]
  assert len(measured) == 2


def test_what_cannot_be_tried_is_xla_and_said(on_gpu):
  resolve, said, _, folder = on_gpu

  def fail(shape):
    raise trial.TrialError("the GPU is in use")

  assert chosen(resolve(measure=fail)[0]) == ["xla", "xla"]
  assert said[-1].endswith("no kernel could be tried (the GPU is in use)")
  assert not folder.exists()


def test_memory_that_others_had_is_no_verdict(on_gpu):
  resolve, _, _, folder = on_gpu
  full = "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"

  def measure(shape, failure=full):
    return {
      name: trial.Tried(None, None, failure) for name in trial.candidates(shape)
    }

  assert chosen(resolve(measure=measure)[0]) == ["xla", "xla"]
  assert not folder.exists()
  shared = "XlaRuntimeError: RESOURCE_EXHAUSTED: Shared memory size limit"
  resolve(measure=functools.partial(measure, failure=shared))
  assert len(list(folder.iterdir())) == 2


def test_explicit_choices_and_other_platforms_are_left_alone(on_gpu):
  resolve, _, measured, _ = on_gpu
  one = dataclasses.replace(STAGE, attention="xla")
  mixed = dataclasses.replace(MODEL, stages=(one, COARSE))
  assert chosen(resolve(mixed)[0]) == ["xla", "triton_64"]
  assert len(measured) == 1
  assert resolve(MODEL.with_attention("triton")) == (
    MODEL.with_attention("triton"),
    None,
  )


def test_elsewhere_auto_stays_with_the_platform():
  mesh = sharding.make_mesh(MeshConfig())
  assert kernels.resolve(MODEL, mesh, measure=pytest.fail) == (MODEL, None)


def test_a_shape_is_that_of_one_device_and_fits_its_memory():
  wide = dataclasses.replace(STAGE, window=None, capacity=65536)
  model = dataclasses.replace(MODEL, stages=(wide,), dtype="float32")
  assert kernels.shapes(model, tensor=2) == {
    0: trial.Shape(8192, 2, 1, 8, None, "float32")
  }
  wider = SHAPE._replace(head_dim=256)
  assert trial.candidates(wider) == ("xla",)


def test_every_process_takes_what_the_first_one_finds(on_gpu, monkeypatch):
  resolve, said, measured, _ = on_gpu
  sent = []

  def broadcast(numbers):
    sent.append(numbers)
    return sent[0]

  multihost = kernels.multihost_utils
  monkeypatch.setattr(multihost, "broadcast_one_to_all", broadcast)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  first, _ = resolve()
  said.clear()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  second, _ = resolve(measure=pytest.fail)
  assert second == first and chosen(first) == ["triton_64", "triton_64"]
  assert len(sent) == 2 and not said


def test_devices_of_different_kinds_keep_xla(on_gpu):
  resolve, said, _, _ = on_gpu
  devices = [types.SimpleNamespace(device_kind=kind) for kind in "ab"]
  mesh = types.SimpleNamespace(devices=np.array(devices), shape={"tensor": 1})
  model, _ = resolve(mesh=mesh, measure=pytest.fail)
  assert chosen(model) == ["xla", "xla"] and "not all of one kind" in said[-1]
