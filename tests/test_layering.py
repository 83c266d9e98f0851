"""Dependencies point one way, and the model knows nothing of data or flags."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "aunet_jax"
# What the network may be made of; never data, checkpoints or command lines.
MODEL = {
  "aunet",
  "layers",
  "attention",
  "attention_gpu",
  "pooling",
  "grouped",
  "sharding",
  "config",
}


def imported(path: Path) -> set[str]:
  """Full names of everything a file imports, at any depth."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def graph() -> dict[str, set[str]]:
  """Module -> our own modules it imports."""
  modules = {path.stem for path in PACKAGE.glob("*.py")}
  return {
    path.stem: {
      name.split(".")[1]
      for name in imported(path)
      if name.startswith("aunet_jax.") and name.split(".")[1] in modules
    }
    for path in PACKAGE.glob("*.py")
  }


def test_no_module_imports_itself_in_a_circle():
  order = list(graphlib.TopologicalSorter(graph()).static_order())
  assert order.index("config") < order.index("aunet") < order.index("train")


def test_the_model_imports_only_what_it_is_made_of():
  for module in MODEL:
    assert graph()[module] <= MODEL, module


def test_only_config_reads_config_dicts():
  for path in PACKAGE.glob("*.py"):
    if path.stem != "config":
      readers = {n for n in imported(path) if n.startswith("ml_collections")}
      assert not readers, path.name


def test_nothing_private_of_jax_is_used():
  for path in PACKAGE.glob("*.py"):
    assert not {n for n in imported(path) if "._src" in n}, path.name
