"""CPU with 8 fake devices, and strict broadcasting, for every test."""

import importlib.metadata
import os
import shutil
import signal
import tempfile

# Tests compile much and compute little: code that is quick to make, and one
# cache of compiled programs for the session, shared by its workers and with the
# processes that tests start.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later: unknown
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _IS_WORKER:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(
    prefix="aunet_jax_tests_"
  )
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# A shell that starts the tests in the background ignores SIGINT, and nohup
# ignores SIGHUP; so would every process that they start and signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def _step_kept_between_runs():
  """Runs in this process that differ in no setting trace their step once."""
  from aunet_jax.train import loop

  compile_step, kept = loop.compile_step, {}

  def compile_once(config, tx, mesh, shardings, abstract, batch):
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (abstract, batch))
    key = repr((config.model, config.optimizer, config.train, shapes)), mesh
    if key not in kept:
      arguments = (config, tx, mesh, shardings, abstract, batch)
      kept[key] = compile_step(*arguments)
    return kept[key]

  loop.compile_step = compile_once
  yield
  loop.compile_step = compile_step


@pytest.fixture(scope="session")
def _bucket():
  """One for all tests of a process: the clients remember where it is."""
  import fake_bucket

  with fake_bucket.FakeBucket() as bucket:
    os.environ.update(bucket.environment)
    yield bucket


@pytest.fixture
def bucket(_bucket):
  """gs://bucket, empty and without faults."""
  yield _bucket
  _bucket.faults.clear()
  _bucket.objects.clear()
  _bucket.requests.clear()


def pytest_collection_modifyitems(items):
  """Files that start runs come first, so that none is left over at the end."""
  first = ("/train/", "/commands/", "/launch/", "/generate/")
  items.sort(key=lambda item: not any(x in str(item.path) for x in first))


def pytest_sessionfinish(session, exitstatus):
  if not _IS_WORKER:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
