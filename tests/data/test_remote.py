"""Files behind URLs: their names, and what is told of their failures."""

import functools
import gzip
import http.server
import io
import json
import os
import threading

import fsspec
import pytest
from read_all import read_all

from aunet_jax.data import remote


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_connection_that_ends_early_is_an_error(monkeypatch, name):
  lines = [json.dumps({"text": os.urandom(20).hex()}) for _ in range(2000)]
  if name == "a.csv":
    lines = ["text", *lines[1:]]
    lines = [line.replace('"', "").replace(",", "") for line in lines]
  data = "\n".join(lines).encode()
  data = gzip.compress(data) if name.endswith(".gz") else data
  memory = fsspec.filesystem("memory")
  memory.pipe(f"/short/{name}", data)
  url = f"memory://short/{name}"
  assert len(read_all(url)[0]) in (1, 1999, 2000)
  short = data[: data.rindex(b"\n") + 1] if b"\n" in data[-200:] else data[:-9]
  monkeypatch.setattr(
    type(memory), "open", lambda *args, **kwargs: io.BytesIO(short)
  )
  with pytest.raises(remote.ReadError, match="try again") as error:
    read_all(url)
  assert error.value.status == 1


def test_errors_of_any_library_of_a_url_may_be_tried_again(monkeypatch):
  class OddError(Exception):
    pass

  def broken(*args, **kwargs):
    raise OddError("503")

  memory = fsspec.filesystem("memory")
  memory.pipe("/odd/a.txt", b"text")
  monkeypatch.setattr(type(memory), "open", broken)
  with pytest.raises(remote.ReadError, match="503; try again"):
    read_all("memory://odd/a.txt")


@pytest.mark.parametrize(
  "url, name, full",
  [
    ("memory://a", "/a/b.txt", "memory:///a/b.txt"),
    ("zip://*.txt::memory://a.zip", "b.txt", "zip://b.txt::memory://a.zip"),
  ],
)
def test_the_url_of_a_file_that_was_found(url, name, full):
  buffer = io.BytesIO()
  import zipfile

  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("b.txt", "text")
  fsspec.filesystem("memory").pipe("/a.zip", buffer.getvalue())
  system, _ = remote.filesystem(url)
  assert remote.full_url(url, system, name) == full


def test_an_archive_that_is_none_is_named(tmp_path):
  (tmp_path / "a.zip").write_bytes(b"no archive")
  with pytest.raises(
    ValueError, match="cannot open zip://.*a.zip: .*not a zip"
  ):
    remote.filesystem(f"zip://*::{tmp_path}/a.zip")


def test_an_unknown_protocol_is_named():
  with pytest.raises(ValueError, match="cannot open nowhere://a"):
    remote.filesystem("nowhere://a")


@pytest.fixture
def web(tmp_path):
  """A web server of a directory: its URL."""

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Quiet, directory=str(tmp_path))
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  yield f"http://127.0.0.1:{server.server_address[1]}"
  server.shutdown()
  thread.join()
  server.server_close()


def test_files_of_a_web_server(tmp_path, web):
  pytest.importorskip("aiohttp")
  (tmp_path / "a.txt").write_bytes(b"one")
  (tmp_path / "b.jsonl").write_bytes(b'{"text": "two"}\n{"text": "three"}')
  (tmp_path / ".hidden").write_bytes(b"x")
  (tmp_path / "d").mkdir()
  (tmp_path / "d" / "c.txt.gz").write_bytes(gzip.compress(b"four"))
  assert read_all(f"{web}/b.jsonl?download=true") == ([b"two", b"three"], [])
  assert read_all(f"{web}/*.txt") == ([b"one"], [])
  texts, skips = read_all(f"{web}/")
  assert texts == [b"one", b"two", b"three", b"four"]
  assert [skip.reason for skip in skips] == ["hidden name"]
  with pytest.raises(ValueError, match="matches no file"):
    read_all(f"{web}/nothing.txt")
