"""Rooms import one way, and the network knows nothing of data or flags.

A file directly in the package is ground: a setting, a helper, a stable name
or a small command over a room.
"""

import ast
import configparser
import functools
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "aunet_jax"

# What a room may import, beside itself and the ground it stands on.
MAY_IMPORT = {
  "splitting": set(),
  "aunet": set(),
  "data": {"splitting"},
  "workdir": {"aunet", "splitting", "data"},
  "evaluate": {"aunet", "splitting", "data", "workdir"},
  "generate": {"aunet", "splitting", "data", "workdir"},
  "convert": {"workdir"},
  "train": {"aunet", "splitting", "data", "workdir", "evaluate", "generate"},
  "compile": {"aunet", "splitting", "data", "generate", "train"},
  "scaling": {"aunet", "splitting", "data", "workdir", "train"},
}
# Ground that rooms may stand on; the rest of it are commands over rooms.
GROUND = {
  "arrays", "compiled", "config", "files", "memory", "settings", "terminal",
}  # fmt: skip


def files() -> dict[str, Path]:
  """Module name below aunet_jax, as "train.step", to its file."""
  return {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
  }


def imported(source: str) -> set[str]:
  """Full names of everything a file imports, at any depth."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def module_of(name: str, modules) -> str | None:
  """The module of ours that importing `name` enters."""
  if not name.startswith("aunet_jax"):
    return None
  parts = name.split(".")[1:]
  for size in range(len(parts), 0, -1):
    for candidate in (parts[:size], [*parts[:size], "__init__"]):
      if ".".join(candidate) in modules:
        return ".".join(candidate)
  assert name in ("aunet_jax", "aunet_jax.load"), f"there is no {name}"
  return "__init__"


@functools.cache
def graph() -> dict[str, set[str]]:
  """Module -> our own modules it imports."""
  modules = files()
  return {
    module: {
      module_of(name, modules)
      for name in imported(path.read_text())
      if name.startswith("aunet_jax")
    }
    for module, path in modules.items()
  }


def room_of(module: str) -> str | None:
  return module.split(".")[0] if "." in module else None


def offences(module: str, targets: set[str]) -> set[str]:
  """The imports of `module` that the table forbids."""
  room = room_of(module)
  found = set()
  for target in targets:
    there = room_of(target)
    if target.endswith("__main__"):
      found.add(target)  # a door is for people
    elif room is None and module not in GROUND:
      continue  # a command over rooms
    elif there is None:
      if target not in GROUND:
        found.add(target)
    elif there != room and there not in MAY_IMPORT.get(room, ()):
      found.add(target)
  return found


@pytest.mark.parametrize("module", sorted(files()))
def test_a_room_imports_only_what_the_table_allows(module):
  assert not offences(module, graph()[module])


def test_every_room_is_in_the_table_and_says_what_it_is():
  rooms = {p.parent.name for p in PACKAGE.glob("*/*.py")}
  assert rooms == set(MAY_IMPORT)
  for room in rooms:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    assert "first" in ast.get_docstring(tree), room


# Modules without a test file of their name, and why.
UNTESTED = {"lingua": "the stable name of convert.lingua"}


def may_test(module: str) -> set[str]:
  """Where the tests of a module may be, below `tests`.

  Names of test files are unique: one that another room or a command has taken
  begins with its room, or ends with "_command".
  """
  *room, name = module.split(".")
  if name == "__main__":
    return {f"commands/test_{room[0]}.py"}
  if not room:
    commands = {f"commands/test_{name}.py", f"commands/test_{name}_command.py"}
    return commands | {f"test_{name}.py"}
  return {f"{room[0]}/test_{name}.py", f"{room[0]}/test_{room[0]}_{name}.py"}


@pytest.mark.parametrize("module", sorted(files()))
def test_every_module_has_a_test_file(module):
  if module.endswith("__init__"):
    return
  tests = PACKAGE.parent / "tests"
  found = any((tests / path).exists() for path in may_test(module))
  assert found != (module in UNTESTED), sorted(may_test(module))


def test_no_module_imports_itself_in_a_circle():
  edges = {
    module: {target for target in targets if target != "__init__"}
    for module, targets in graph().items()
  }
  order = list(graphlib.TopologicalSorter(edges).static_order())
  assert order.index("config") < order.index("aunet.network")
  assert order.index("aunet.network") < order.index("train.__main__")


def test_a_forbidden_import_is_noticed():
  for module, line in [
    ("aunet.network", "from aunet_jax.data import packing"),
    ("aunet.network", "import aunet_jax.train.step"),
    ("data.loader", "from aunet_jax.aunet import AUNet"),
    ("evaluate.score", "from aunet_jax.generate import prefill"),
    ("config", "from aunet_jax.splitting import Splitter"),
    ("scaling.run", "from aunet_jax.train import __main__"),
    ("train.loop", "from aunet_jax import counts"),
  ]:
    targets = {module_of(name, files()) for name in imported(line)}
    assert offences(module, targets), line


def test_only_config_reads_config_dicts():
  for module, path in files().items():
    if module != "config":
      names = imported(path.read_text())
      assert not {n for n in names if n.startswith("ml_collections")}, module


def test_nothing_private_of_jax_is_used():
  for module, path in files().items():
    assert not {n for n in imported(path.read_text()) if "._src" in n}, module


def test_every_file_beside_the_code_is_installed():
  setup = configparser.ConfigParser()
  setup.read(PACKAGE.parent / "setup.cfg")
  patterns = setup["options.package_data"]
  for path in PACKAGE.rglob("*.*"):
    if path.is_file() and path.suffix not in (".py", ".pyc", ".nbi", ".nbc"):
      package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
      assert path.match(patterns.get(package, "")), path
