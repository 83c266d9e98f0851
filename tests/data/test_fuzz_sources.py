"""A few random trees of files, read as an oracle says; more: --trees=10000."""

import pytest

from benchmarks import fuzz_sources


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_are_read_as_the_oracle_says(tmp_path, seed):
  reader = fuzz_sources.Reader(others=False)
  for number in range(10 * seed, 10 * seed + 10):
    assert not fuzz_sources.check_tree(number, reader, str(tmp_path))


@pytest.mark.slow
def test_trees_that_another_user_may_not_read(capfd):
  assert fuzz_sources.main(["--trees=300", "--seed=100000"]) == 0
  assert "300 trees, 0 disagree" in capfd.readouterr().out


def test_the_oracle_notices_what_is_missing(tmp_path):
  def blind(paths, field, separator):
    found, left_out = fuzz_sources.read(paths, field, separator)
    return [(path, texts[:-1], why) for path, texts, why in found], left_out

  blind.others = False
  wrong = [
    line
    for seed in range(4)
    for line in fuzz_sources.check_tree(seed, blind, str(tmp_path))
  ]
  assert wrong and all("texts" in line for line in wrong)
