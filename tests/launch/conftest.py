"""A world of fakes for each test, and what the launch scripts need to run."""

import shutil

import launch_world
import pytest


def pytest_collection_modifyitems(items):
  if not (shutil.which("bash") and shutil.which("flock")):
    need = "the launch scripts need bash and flock (util-linux)"
    for item in items:
      if "launch" in item.path.parent.name:
        item.add_marker(pytest.mark.skip(reason=need))


@pytest.fixture
def world(tmp_path):
  world = launch_world.World(tmp_path)
  yield world
  world.close()
