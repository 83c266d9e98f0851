"""The manifest of a checkpoint, against what can happen to its files."""

import json
import zlib

import pytest

from aunet_jax.workdir import manifest


@pytest.fixture
def folder(tmp_path):
  step = tmp_path / "5"
  (step / "params").mkdir(parents=True)
  (step / "params" / "a").write_bytes(b"0123456789")
  manifest.write(step)
  return step


def test_it_holds_sizes_and_checksums_that_other_tools_know(folder):
  files = json.loads((folder / manifest.FILE).read_text())["files"]
  assert files == {"params/a": [10, zlib.crc32(b"0123456789")]}


def test_a_file_that_grew_is_seen_as_too_long(folder):
  with (folder / "params" / "a").open("ab") as file:
    file.write(b"\0\0\0")
  assert manifest.damage(folder) == "params/a is 3 bytes too long"


def write_entries(folder, files) -> None:
  crc = zlib.crc32(json.dumps(files, sort_keys=True).encode())
  text = json.dumps({"crc32": crc, "files": files})
  (folder / manifest.FILE).write_text(text)


@pytest.mark.parametrize(
  "files",
  [5, [], ["params/a"], {"params/a": 5}, {"params/a": [10]},
   {"params/a": [10, None]}, {"params/a": ["10", 1]}, {"/etc/passwd": [1, 1]},
   {"params/../../x": [1, 1]}, {"a": [1, 1]}, None],
)  # fmt: skip
def test_a_manifest_of_another_form_is_damaged(folder, files):
  write_entries(folder, files)
  if files != []:
    assert "manifest.json is damaged" in manifest.damage(folder)
  (folder / manifest.FILE).write_text("[" * 100_000)
  assert "manifest.json is damaged" in manifest.damage(folder)


def test_what_is_no_folder_is_damaged(tmp_path, folder):
  (tmp_path / "6").write_text("")
  assert manifest.damage(tmp_path / "6") == "it is not a directory"
  (tmp_path / "7").symlink_to(tmp_path / "nowhere")
  assert manifest.damage(tmp_path / "7") == "it is not a directory"
  (tmp_path / "8").symlink_to(folder)
  assert manifest.damage(tmp_path / "8") == "it is a link"
  assert manifest.damage(tmp_path / "8", ("params",)) is None  # to read alone
