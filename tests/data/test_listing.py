"""Which files a specification names: links, loops, hidden names, globs."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap

import fsspec
import pytest

from aunet_jax.data import listing, remote


def _make(root, *names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"text of {name}")


def _list(*paths):
  """(paths below the common root, (path, reason) of what is left out)."""
  sources, skips = listing.list_sources(list(map(str, paths)))
  return [s.path for s in sources], [(s.where, s.reason) for s in skips]


@pytest.fixture
def tree(tmp_path):
  """A real directory, and one with links to it and hidden names."""
  _make(tmp_path, "real/en/a.txt", "c/fr/a.txt", "c/top.txt", "c/.git/HEAD")
  _make(tmp_path, "c/fr/.x")
  (tmp_path / "c/en").symlink_to(tmp_path / "real/en")
  return tmp_path


def test_a_linked_directory_is_read(tree):
  c = tree / "c"
  files = [f"{c}/en/a.txt", f"{c}/fr/a.txt", f"{c}/top.txt"]
  hidden = [(f"{c}/.git", "hidden name"), (f"{c}/fr/.x", "hidden name")]
  assert _list(c) == (files, hidden)


@pytest.mark.parametrize("pattern", ["c/*", "c/**", "[c]/*", "?/**/*"])
def test_a_glob_gives_what_is_below_the_directories_it_matches(tree, pattern):
  c = tree / "c"
  files, skips = _list(tree / pattern)
  assert files == [f"{c}/en/a.txt", f"{c}/fr/a.txt", f"{c}/top.txt"]
  assert sorted(skips) == [
    (f"{c}/.git", "hidden name"),
    (f"{c}/fr/.x", "hidden name"),
  ]


def test_a_spelled_dot_is_not_hidden(tree):
  assert _list(tree / "c/.git") == ([f"{tree}/c/.git/HEAD"], [])
  assert _list(tree / "c/.*/*") == ([f"{tree}/c/.git/HEAD"], [])
  assert _list(tree / "c/fr/.*") == ([f"{tree}/c/fr/.x"], [])


def test_two_stars_are_any_number_of_directories(tree):
  c = tree / "c"
  assert _list(tree / "c/**/a.txt")[0] == [f"{c}/en/a.txt", f"{c}/fr/a.txt"]
  assert _list(tree / "**/top.txt")[0] == [f"{c}/top.txt"]
  assert _list(f"{c}/**/fr/*")[0] == [f"{c}/fr/a.txt"]


def test_loops_and_second_ways_are_counted_and_read_once(tmp_path):
  _make(tmp_path, "a/x.txt", "b/y.txt")
  (tmp_path / "a/up").symlink_to("..")
  (tmp_path / "a/self").symlink_to(".")
  (tmp_path / "b/a").symlink_to("../a")
  (tmp_path / "b/z.txt").symlink_to("y.txt")
  files, skips = _list(tmp_path)
  assert files == [f"{tmp_path}/a/x.txt", f"{tmp_path}/b/y.txt"]
  assert sorted(skips) == [
    (f"{tmp_path}/a/self", "link loop"),
    (f"{tmp_path}/a/up", "link loop"),
    (f"{tmp_path}/b/a", "duplicate path"),
    (f"{tmp_path}/b/z.txt", "duplicate path"),
  ]
  files, skips = _list(f"{tmp_path}/**/*.txt")  # ends, and finds the same
  assert {os.path.realpath(file) for file in files} == {
    f"{tmp_path}/a/x.txt",
    f"{tmp_path}/b/y.txt",
  }
  assert (f"{tmp_path}/a/up", "link loop") in skips


def test_a_link_to_a_directory_above_the_root_reads_what_is_there(tmp_path):
  _make(tmp_path, "c/x.txt", "other.txt")
  (tmp_path / "c/up").symlink_to("..")
  files, skips = _list(tmp_path / "c")
  assert files == [f"{tmp_path}/c/up/other.txt", f"{tmp_path}/c/x.txt"]
  assert skips == [(f"{tmp_path}/c/up/c", "duplicate path")]


def test_links_in_a_circle_are_unreadable(tmp_path):
  from aunet_jax.data import sources

  _make(tmp_path, "a.txt")
  (tmp_path / "b").symlink_to("c")
  (tmp_path / "c").symlink_to("b")
  found, _ = listing.list_sources(str(tmp_path))
  records = [r for f in found for r in sources.read_source(f, "text")]
  assert [r[1] for r in records[1:]] == ["unreadable"] * 2


def test_a_directory_without_permission_is_counted():
  # Root may read everything, so the listing is done as another user.
  root = pathlib.Path(tempfile.mkdtemp())
  try:
    root.chmod(0o755)
    _make(root, "secret/a.txt", "open/b.txt")
    (root / "secret").chmod(0o700)
    if os.getuid() != 0:
      (root / "secret").chmod(0)
    program = textwrap.dedent("""
      import os, sys
      from aunet_jax.data import listing
      if os.getuid() == 0:
        os.setuid(65534)
      for path in sys.argv[1:]:
        files, skips = listing.list_sources(path)
        print([f.path[-5:] for f in files], *skips)
    """)
    package = str(pathlib.Path(listing.__file__).parents[2])
    patterns = ["", "/*", "/**/*.txt"]
    result = subprocess.run(
      [sys.executable, "-c", program, *(f"{root}{p}" for p in patterns)],
      capture_output=True,
      text=True,
      check=True,
      env={**os.environ, "PYTHONPATH": package},
    )
    for line in result.stdout.splitlines():
      assert line.startswith("['b.txt']") and line.count("unreadable") == 1
      assert f"{root}/secret" in line and "lost_bytes=None" in line
    assert len(result.stdout.splitlines()) == len(patterns)
  finally:
    (root / "secret").chmod(0o700)
    shutil.rmtree(root)


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_a_url_of_a_local_file_is_its_path(tree, scheme):
  c = f"{tree}/c"
  assert _list(f"{scheme}{c}") == _list(c)
  assert _list(f"{scheme}{c}/*") == _list(f"{c}/*")


def test_urls_follow_the_rule_of_paths():
  memory = fsspec.filesystem("memory")
  for name in ("a.txt", "fr/b.txt", ".git/HEAD", "fr/.x", "fr/deep/c.txt"):
    memory.pipe(f"/tree/{name}", b"text")
  url = "memory:///tree"
  hidden = [(f"{url}/.git", "hidden name"), (f"{url}/fr/.x", "hidden name")]
  files = [f"{url}/a.txt", f"{url}/fr/b.txt", f"{url}/fr/deep/c.txt"]
  for pattern in ("", "/*", "/**", "/**/*.*"):
    found, skips = _list(url + pattern)
    assert (found, sorted(skips)) == (files, hidden), pattern
  assert _list(f"{url}/**/c.txt")[0] == files[2:]
  assert _list(f"{url}/fr/*.txt")[0] == files[1:2]
  assert _list(f"{url}/.git/*") == ([f"{url}/.git/HEAD"], [])


def test_a_listing_that_breaks_off_may_be_tried_again(monkeypatch):
  memory = fsspec.filesystem("memory")
  memory.pipe("/listed/a.txt", b"text")

  def broken(*args, **kwargs):
    raise TimeoutError("no answer")

  monkeypatch.setattr(type(memory), "ls", broken)
  with pytest.raises(remote.ReadError, match="no answer; try again") as error:
    _list("memory://listed")
  assert error.value.status == 1


def test_an_archive_behind_a_url_is_listed_and_read(tmp_path):
  from aunet_jax.data import sources

  shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path)
  _make(tmp_path / "in", "x.txt", "deep/y.txt")
  archive = shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path / "in")
  url = f"zip://**::file://{archive}"
  found, _ = listing.list_sources(url)
  texts = [r.text for f in found for r in sources.read_source(f, "text")]
  assert texts == [b"text of deep/y.txt", b"text of x.txt"]


def test_a_kind_in_front_insists(tmp_path):
  _make(tmp_path, "a.jsonl", "b/c.jsonl")
  (source,) = listing.list_sources(f"text:{tmp_path}/a.jsonl")[0]
  assert (source.kind, source.insisted) == ("text", True)
  assert source.identity()[-1] == "insisted"
  found, _ = listing.list_sources(f"csv:{tmp_path}/*,{tmp_path}/b")
  assert [s.kind for s in found] == ["csv", "csv"]
  (tmp_path / "text:x").write_text("a name like any other")
  (source,) = listing.list_sources(f"{tmp_path}/text:x")[0]
  assert not source.insisted


def test_what_caches_are_keyed_by_is_as_it_was(tmp_path):
  _make(tmp_path, "a.jsonl.gz")
  (source,) = listing.list_sources(str(tmp_path))[0]
  status = (tmp_path / "a.jsonl.gz").stat()
  assert source.identity() == [
    str(tmp_path / "a.jsonl.gz"),
    "jsonl",
    ".gz",
    status.st_size,
    str(status.st_mtime_ns),
  ]


def test_only_hidden_names_are_no_text(tmp_path):
  _make(tmp_path, ".a", ".b/c")
  with pytest.raises(ValueError, match="matches no file but 2 left out"):
    listing.list_sources(str(tmp_path))


def test_absolute_paths_keep_their_meaning(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a,b").write_text("")
  spec = "python,hf:x:y,gs://b/c,text:d,e/*"
  assert listing.absolute(spec) == (
    f"python,hf:x:y,gs://b/c,text:{tmp_path}/d,{tmp_path}/e/*"
  )
  assert listing.absolute("a,b") == f"{tmp_path}/a,b"
  assert listing.absolute(None) is None
