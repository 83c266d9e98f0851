"""What was skipped is counted, and its share of the text is estimated."""

import gzip
import json
import os
import tracemalloc

import pytest

from aunet_jax.data import reading, sources


def _lines(shard, count=2000):
  return b"".join(
    json.dumps({"text": f"document {shard} {n} " * 30}).encode() + b"\n"
    for n in range(count)
  )


def _read(path, tmp_path, fraction=0.01):
  """(tally, documents) of all that is in a directory."""
  files, skips = sources.list_sources(str(path))
  with reading.Tally(tmp_path / "skipped", fraction, _quiet) as tally:
    documents = list(reading.read_all(files, skips, "text", tally, _quiet))
  return tally, documents


def _quiet(line):
  del line


def _shards(tmp_path, damage, number=3):
  directory = tmp_path / "shards"
  directory.mkdir()
  for shard in range(number):
    data = gzip.compress(_lines(shard))
    if shard == 1:
      data = damage(data)
    (directory / f"{shard}.jsonl.gz").write_bytes(data)
  return directory


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: data[: len(data) // 50],
    lambda data: data[: len(data) // 2],
    lambda data: data[:300] + bytes(200) + data[500:],
    lambda data: b"no such data" * 2000,
  ],
  ids=["cut at 2%", "cut at half", "zeros inside", "garbage"],
)
def test_a_damaged_shard_counts_as_what_it_held(tmp_path, damage):
  directory = _shards(tmp_path, damage)
  with pytest.raises(ValueError, match="bytes of text are lost") as error:
    _read(directory, tmp_path)
  assert "1.jsonl.gz" in str(error.value)
  assert "data.max_skip_fraction=0.01" in str(error.value)
  tally, documents = _read(directory, tmp_path, 0.5)
  assert 4000 <= len(documents) < 6000 and sum(tally.counts.values()) == 1


def test_an_estimate_is_near_the_truth(tmp_path):
  directory = _shards(tmp_path, lambda data: data[: len(data) // 2])
  tally, documents = _read(directory, tmp_path, 0.5)
  lost = 3 * 2000 - len(documents)
  text = len(json.loads(_lines(0).splitlines()[1500])["text"])
  with pytest.raises(ValueError, match="lost") as error:
    tally._max_fraction = 0.1
    tally.check()
  said = int(str(error.value).split()[1].replace(",", ""))
  assert said == pytest.approx(lost * text, rel=0.15)


def test_little_damage_to_much_text_goes_on(tmp_path):
  directory = _shards(tmp_path, lambda data: data + b"garbage after it")
  tally, documents = _read(directory, tmp_path)
  assert len(documents) == 6000 and tally.counts == {"corrupt file": 1}


@pytest.mark.parametrize("what", ["link", "unreadable directory"])
def test_what_cannot_be_opened_counts_as_much_as_others(
  tmp_path, what, monkeypatch
):
  directory = _shards(tmp_path, bytes)
  if what == "link":
    (directory / "3.jsonl.gz").symlink_to("nowhere")
  else:
    (directory / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
      if str(path).endswith("closed"):
        raise PermissionError(13, "Permission denied")
      return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
  with pytest.raises(ValueError, match="about [0-9,]+ of") as error:
    _read(directory, tmp_path)
  words = str(error.value).replace(",", "").split()
  assert int(words[1]) / int(words[3]) == pytest.approx(0.25, rel=0.02)


def test_one_long_bad_line_counts_by_its_length(tmp_path):
  directory = tmp_path / "d"
  directory.mkdir()
  lines = _lines(0, 200) + b'{"text": "' + b"x" * 5000 + b"\n"
  (directory / "a.jsonl").write_bytes(lines)
  with pytest.raises(ValueError, match="about 5,0"):
    _read(directory, tmp_path)


def test_harmless_skips_do_not_count(tmp_path):
  directory = _shards(tmp_path, bytes)
  for name in (".a", ".b", "empty.txt"):
    (directory / name).write_text("")
  (directory / "link.gz").symlink_to("0.jsonl.gz")
  tally, _ = _read(directory, tmp_path, 0.0)
  assert tally.counts == {"hidden name": 2, "duplicate path": 1, "empty": 1}


def test_a_bad_first_file_does_not_stop_before_the_rest_is_read(tmp_path):
  directory = _shards(tmp_path, bytes, number=4)
  (directory / "00.jsonl").write_text("not JSON\n")
  tally, documents = _read(directory, tmp_path)
  assert len(documents) == 8000 and tally.counts == {"malformed JSON": 1}


def test_names_that_no_terminal_shows_are_escaped():
  lines = []
  log = reading.SkipLog(lines.append)
  name = os.fsdecode(b"caf\xe9\x1b[2J\n") + "größer"
  log.add(sources.Skip(name, "corrupt file", "x"))
  assert lines == [r"skipped caf\udce9\x1b[2J\ngrößer: corrupt file: x"]
  for line in lines:
    line.encode()


def test_the_first_of_every_reason_are_logged_and_all_are_counted():
  lines = []
  log = reading.SkipLog(lines.append)
  for number in range(5):
    log.add(sources.Skip(f"a:{number}", "null text", "x"))
  log.add(sources.Skip("b", "empty", "x"))
  log.finish()
  assert len(lines) == 4 and lines[-1] == "skipped in all: 5 null text, 1 empty"


@pytest.mark.parametrize("name", ["a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.gz"])
def test_a_large_document_is_in_memory_once(tmp_path, name):
  # JSON needs its line and its value while it is parsed; neither stays.
  size = 8 << 20
  text = b"0123456789abcde\n" * (size // 16)
  directory = tmp_path / "d"
  directory.mkdir()
  if "jsonl" in name:
    text = text.replace(b"\n", b" ")
  for number in range(3):
    data = b'{"text": "%s"}\n' % text if "jsonl" in name else text
    data = gzip.compress(data, 1) if name.endswith(".gz") else data
    (directory / f"{number}{name}").write_bytes(data)
  del data
  files, skips = sources.list_sources(str(directory))
  held, peak = [], []
  with reading.Tally(tmp_path / "skipped", 0.0, _quiet) as tally:
    tracemalloc.start()
    for document in reading.read_all(files, skips, "text", tally, _quiet):
      current, high = tracemalloc.get_traced_memory()
      held.append(current / size)
      peak.append(high / size)
      assert document.text == text
      del document
    tracemalloc.stop()
  assert len(held) == 3
  assert max(held) < 1.5
  assert max(peak) < (3.5 if "jsonl" in name else 1.6)
