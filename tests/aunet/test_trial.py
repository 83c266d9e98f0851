"""What `auto` is on a GPU, with candidates that run on a CPU in their place."""

import functools
import json

import jax
import numpy as np
import pytest

from aunet_jax.aunet import attention, attention_gpu, trial

SHAPE = trial.Shape(
  length=200, heads=4, kv_heads=2, head_dim=8, window=32, dtype="bfloat16"
)


@jax.custom_vjp
def with_wrong_gradient(x):
  return x


with_wrong_gradient.defvjp(lambda x: (x, None), lambda _, d: (1.1 * d,))


def wrong_values(q, k, v, documents, window):
  return attention.blockwise(q, k, v, documents, window - 1)


def wrong_gradient(q, k, v, documents, window):
  k = with_wrong_gradient(k)
  return attention.blockwise(q, k, v, documents, window)


def does_not_compile(q, k, v, documents, window):
  return attention.flash(q, k, v, documents, window)  # needs a GPU


CANDIDATES = {
  "xla": attention.blockwise,
  "triton": functools.partial(
    attention.flash, tiles=attention_gpu.TILES["triton_32"], interpret=True
  ),
  "one key too few": wrong_values,
  "wrong gradient": wrong_gradient,
  "does not compile": does_not_compile,
}


@pytest.fixture(scope="module")
def tried():
  """Of every candidate; the k-th takes k seconds."""
  inputs = trial.batch(SHAPE)
  expected = trial.reference(SHAPE, inputs)
  return {
    name: trial.try_kernel(kernel, SHAPE, inputs, expected, lambda run, k=k: k)
    for k, (name, kernel) in enumerate(CANDIDATES.items(), start=1)
  }


def test_the_trials_batch_is_packed():
  documents_BL = np.asarray(trial.batch(SHAPE)[3])
  for row in documents_BL:
    assert len(set(row)) >= 4 and row[-1] == 0 and row[0] == 1


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("triton", None),
    ("one key too few", "wrong: values off by"),
    ("wrong gradient", "wrong: key gradient off by 0.1"),
    ("does not compile", "failed: ValueError: Only interpret mode"),
  ],
)
def test_a_faster_kernel_is_taken_only_where_it_is_right(name, says, tried):
  fast = tried[name]
  if fast.failure is None:
    fast = fast._replace(seconds=0.5)
  kernel, why = trial.choose("bfloat16", {"xla": tried["xla"], name: fast})
  if says is None:
    assert (kernel, why) == (name, "500 ms, xla 1e+03")
  else:
    assert kernel == "xla" and f"{name} {says}" in why, why


def test_a_slower_kernel_is_not_taken(tried):
  both = {name: tried[name] for name in ("xla", "triton")}
  kernel, why = trial.choose("bfloat16", both)
  assert (kernel, why) == ("xla", "1e+03 ms, triton 2e+03")


def test_without_xla_the_fastest_right_kernel_is_taken(tried):
  failed = trial.Tried(None, None, "RESOURCE_EXHAUSTED: 99 GiB")
  rest = {name: one for name, one in tried.items() if name != "xla"}
  assert trial.choose("bfloat16", {"xla": failed, **rest})[0] == "triton"
  assert trial.choose("bfloat16", {"xla": failed})[0] == "xla"


@pytest.mark.parametrize(
  ("dtype", "of_xla", "error", "wrong"),
  [
    ("float32", 0.0, 1.1e-4, True), ("float32", 0.0, 0.9e-4, False),
    ("bfloat16", 0.035, 0.071, True), ("bfloat16", 0.035, 0.069, False),
  ],
)  # fmt: skip
def test_wrong_is_beyond_the_floor_and_twice_what_xla_is_off_by(
  dtype, of_xla, error, wrong
):
  base = trial.Tried(1.0, dict.fromkeys(trial.PARTS, of_xla), None)
  one = base._replace(errors=dict.fromkeys(trial.PARTS, error))
  assert (trial.wrong_part(one, dtype, base) is not None) == wrong


def test_a_kernel_that_gives_no_number_is_wrong():
  expected = np.ones((1, 4, 1, 2), np.float32)
  found = expected.copy()
  found[0, 2] = np.nan
  error = trial.difference(found, expected)
  base = trial.Tried(1.0, dict.fromkeys(trial.PARTS, 0.0), None)
  one = base._replace(errors=base.errors | {"query gradient": error})
  assert trial.wrong_part(one, "float32", base) == "query gradient"


@pytest.mark.parametrize("tiles", attention_gpu.TILES.values())
def test_every_size_of_tiles_is_right(tiles):
  shape = SHAPE._replace(dtype="float32", kv_heads=4, heads=4)
  inputs = trial.batch(shape)
  kernel = functools.partial(attention.flash, tiles=tiles, interpret=True)
  one = trial.try_kernel(
    kernel, shape, inputs, trial.reference(shape, inputs), lambda run: 1.0
  )
  assert one.failure is None and max(one.errors.values()) < 1e-5, one


# ----- the other process ----------------------------------------------------


def serve(shape, names):
  """In this process, where our kernel does not compile."""
  request = json.dumps({"shape": shape, "kernels": names, "device": "cpu"})
  return list(map(json.loads, trial.serve(request, lambda run: 1.0))), ""


def test_candidates_go_on_after_one_that_failed():
  starts = []

  def start(shape, names):
    starts.append(list(names))
    return serve(shape, names)

  tried = trial.measure(SHAPE, start)
  assert list(tried) == ["xla", *attention_gpu.TILES]
  assert starts == [["xla", *attention_gpu.TILES]] + [
    list(attention_gpu.TILES)[i:] for i in (1, 2)
  ]
  assert tried["xla"].failure is None
  assert "interpret mode" in tried["triton_32"].failure
  assert trial.choose(SHAPE.dtype, tried)[0] == "xla"


def test_a_kernel_that_ends_the_process_is_not_taken():
  def start(shape, names):
    lines, end = [{"ready": True}], ""
    for name in names:
      if name == "triton_64":
        return lines, "ended with status -11: "
      fine = trial.Tried(1.0, dict.fromkeys(trial.PARTS, 0.0), None)
      lines.append({"kernel": name, **fine._asdict()})
    return lines, end

  tried = trial.measure(SHAPE, start)
  assert tried["triton_64"].failure == "ended with status -11: "
  assert tried["triton_32"].failure is None


@pytest.mark.parametrize("answer", [([], "no device"), ([], "")])
def test_where_nothing_runs_there_is_no_trial(answer):
  with pytest.raises(trial.TrialError):
    trial.measure(SHAPE, lambda shape, names: answer)


def test_the_other_process_sees_the_gpu_of_this_one():
  assert trial.visible(None, 3) == "3"
  assert trial.visible("6,GPU-5f", 1) == "GPU-5f"


def test_a_trial_on_another_device_is_none():
  request = {"shape": SHAPE, "kernels": ["xla"], "device": "NVIDIA H100"}
  with pytest.raises(trial.TrialError, match="'cpu', not 'NVIDIA H100'"):
    next(trial.serve(json.dumps(request)))


@pytest.mark.slow
def test_a_real_process_tries_and_survives():
  tried = trial.measure(SHAPE)
  assert tried["xla"].seconds > 0
  assert all("interpret mode" in tried[x].failure for x in attention_gpu.TILES)
