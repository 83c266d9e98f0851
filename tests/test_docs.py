"""The documents name files that exist, and the map has every room."""

import re
from pathlib import Path

import pytest
import test_layering

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
    if "://" not in target:
      assert (page.parent / target).exists(), target


def test_the_map_has_every_room_and_the_file_to_read_first():
  readme = (ROOT / "README.md").read_text()
  rows = re.findall(r"^\| `(\w+)/` \|.*\| `([\w.]+)` \|$", readme, re.M)
  assert {room for room, _ in rows} == set(test_layering.MAY_IMPORT)
  drawn = (ROOT / "docs" / "rooms.svg").read_text()
  for room, first in rows:
    folder = ROOT / "aunet_jax" / room
    assert (folder / first).exists()
    assert f"`{first}` first" in (folder / "__init__.py").read_text(), room
    assert f">{room}/<" in drawn


def test_every_command_is_listed():
  listed = re.findall(
    r"^\| `(\w+)` \|", (ROOT / "docs" / "commands.md").read_text(), re.M
  )
  package = ROOT / "aunet_jax"
  commands = {path.parent.name for path in package.glob("*/__main__.py")}
  commands |= {
    path.stem
    for path in package.glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
  }
  assert set(listed) == commands
