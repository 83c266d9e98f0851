"""Compiled loops work where nothing can be kept, and from one place."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aunet_jax.compiled import compiled

PACKAGE = Path(__file__).parents[1] / "aunet_jax"


@pytest.fixture
def module(tmp_path, monkeypatch):
  """A module whose machine code can be kept beside it and nowhere else."""
  monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nothing")
  monkeypatch.setenv("HOME", "/dev/null")
  path = tmp_path / "doubling.py"
  path.write_text("def double(x):\n  return 2 * x\n")
  spec = importlib.util.spec_from_file_location("doubling", path)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
  return loaded


def kept(module) -> list[Path]:
  return sorted(Path(module.__file__).parent.glob("__pycache__/*.nb*"))


def test_machine_code_is_kept_for_the_next_process(module):
  assert compiled(module.double)(4) == 8
  assert [path.suffix for path in kept(module)] == [".nbc", ".nbi"]


def test_without_a_place_to_write_it_compiles_all_the_same(module):
  Path(module.__file__).with_name("__pycache__").write_text("not a directory")
  assert compiled(module.double)(4) == 8


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle"])
@pytest.mark.parametrize("number", [0, 1])
def test_damaged_machine_code_is_made_again(module, number, content):
  assert compiled(module.double)(4) == 8
  kept(module)[number].write_bytes(content)
  double = compiled(module.double)
  assert [double(4), double(5)] == [8, 10]


def test_a_directory_that_fills_up_stops_nothing(module, monkeypatch):
  double = compiled(module.double)  # it could be written when this was called
  folder = Path(module.__file__).with_name("__pycache__")
  shutil.rmtree(folder, ignore_errors=True)
  folder.write_text("not a directory")
  assert [double(4), double(5)] == [8, 10]


def test_an_error_of_the_function_itself_is_raised(module):
  with pytest.raises(Exception, match="double|str"):
    compiled(module.double)(object())


def test_nothing_else_in_the_package_asks_for_numba():
  for path in PACKAGE.rglob("*.py"):
    names = {
      alias.name if isinstance(node, ast.Import) else node.module
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.Import | ast.ImportFrom)
      for alias in node.names
    }
    assert ("numba" in names) == (path.name == "compiled.py"), path


def test_a_command_runs_for_a_user_who_can_write_nowhere(tmp_path):
  package = tmp_path / "aunet_jax"
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(PACKAGE, package, ignore=ignored)
  for folder in (package, *package.glob("*/")):
    (folder / "__pycache__").write_text("not a directory")
  nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/nothing"}
  done = subprocess.run(
    [sys.executable, "-m", "aunet_jax.prepare", "--help"],
    cwd=tmp_path,
    env=os.environ | nowhere | {"PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "usage" in done.stdout
