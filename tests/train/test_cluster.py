"""Joining the other processes, and compiled programs that are kept."""

import jax
import pytest

from aunet_jax.train import __main__ as train_main
from aunet_jax.train import cluster


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


@pytest.mark.parametrize(
  "flags",
  [
    ["--num_processes=2"],
    ["--process_id=0"],
    ["--coordinator=localhost:1"],
    ["--coordinator=localhost:1", "--multihost"],
  ],
)
def test_flags_that_contradict_each_other_are_refused(flags, capsys, tmp_path):

  assert train_main.main(["--config=x", f"--workdir={tmp_path}", *flags]) == 2
  assert "--coordinator" in capsys.readouterr().err
