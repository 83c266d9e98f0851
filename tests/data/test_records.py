"""What caches are keyed by stays what it was."""

from aunet_jax.data.records import Skip, Source


def test_the_identity_of_a_source():
  known = ("a.jsonl.gz", "jsonl", ".gz", 5, "7")
  assert Source(*known).identity() == list(known)
  assert Source(*known, insisted=True).identity() == [*known, "insisted"]


def test_a_source_is_remote_by_its_url():
  assert Source("gs://a/b", "text", None, 1, "").is_remote
  assert Source("hf:a", "hf", None, 0, "").is_remote
  assert not Source("/a/b", "text", None, 1, "").is_remote


def test_a_skip_loses_nothing_unless_it_says_so():
  assert Skip("a", "empty", "no bytes").lost_bytes == 0
