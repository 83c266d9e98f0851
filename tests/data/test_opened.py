"""What damage costs, and which errors are the network's."""

import io
import zlib

import pytest

from aunet_jax.data import opened, remote


def _opened(size, position, is_remote=False):
  return opened.Opened(
    io.BytesIO(b""),
    where="a",
    field="text",
    separator=None,
    size=size,
    position=lambda: position,
    is_remote=is_remote,
  )


def test_what_is_lost_is_the_rest_at_the_rate_of_what_was_read():
  file = _opened(size=1000, position=250)
  file.given_bytes = 1000
  skip = file.damage("a:7", zlib.error("bad"))
  assert skip == ("a:7", "corrupt file", "bad", 3000)
  file.taken_bytes = 200  # 50 more were read, to no document
  assert file.damage("a:7", zlib.error("bad")).lost_bytes == 3050
  file.given_bytes = file.taken_bytes = 0  # all of it is lost
  assert file.damage("a:7", zlib.error("bad")).lost_bytes == 1000


@pytest.mark.parametrize(
  "error, position",
  [(EOFError("ends"), 500), (zlib.error("bad"), 0)],
)
def test_where_nothing_tells_what_is_lost_it_is_unknown(error, position):
  assert _opened(1000, position).damage("a", error).lost_bytes is None


def test_an_error_of_the_disk_is_no_corrupt_file():
  skip = _opened(1000, 10).damage("a", OSError(5, "Input/output error"))
  assert skip.reason == "unreadable"


@pytest.mark.parametrize(
  "error, position, is_network",
  [
    (ConnectionResetError("reset"), 10, True),
    (OSError(5, "Input/output error"), 10, True),
    (EOFError("ends"), 10, True),  # before the file does
    (EOFError("ends"), 1000, False),
    (OSError("Invalid data stream"), 10, False),
    (zlib.error("bad"), 10, False),
  ],
)
def test_damage_of_a_remote_file(error, position, is_network):
  file = _opened(1000, position, is_remote=True)
  if is_network:
    with pytest.raises(remote.ReadError, match="try again"):
      file.damage("a", error)
  else:
    assert file.damage("a", error).reason == "corrupt file"


def test_a_remote_file_has_to_be_read_to_its_end():
  _opened(1000, 1000, is_remote=True).check_complete()
  with pytest.raises(remote.ReadError, match="after 10 of 1,000 bytes"):
    _opened(1000, 10, is_remote=True).check_complete()


def test_a_file_that_became_shorter_is_damaged():
  _opened(1000, 1000).check_complete()
  _opened(1000, 1500).check_complete()  # it grew
  with pytest.raises(EOFError, match="shorter while it was read: 10 bytes"):
    _opened(1000, 10).check_complete()
