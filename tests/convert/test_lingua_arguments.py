"""Arguments of the official code: capacities, splitting strategies."""

import json
from pathlib import Path

import pytest

from aunet_jax.convert.lingua_arguments import (
  from_arguments,
  rules_from_strategy,
  strategy_from_rules,
  to_arguments,
)

CASES = Path(__file__).parents[1] / "golden" / "official"


@pytest.mark.parametrize(
  "path", sorted(CASES.glob("*.json")), ids=lambda p: p.stem
)
def test_arguments_go_there_and_back(path):
  model = from_arguments(json.loads(path.read_text())["model"], 258)
  assert from_arguments(to_arguments(model), 258) == model


def test_a_vocabulary_of_minus_one_is_the_embeddings():
  path = sorted(CASES.glob("*.json"))[0]
  arguments = json.loads(path.read_text())["model"]
  for unknown in (-1, None):
    model = from_arguments(arguments | {"vocab_size": unknown}, 300)
    assert model.vocab_size == 300
  assert from_arguments(arguments | {"vocab_size": 260}, 300).vocab_size == 260


@pytest.mark.parametrize(
  "strategy,rules",
  [
    ({"word1": "1@1"}, ("word@1",)),
    ({"word1": "1@1", "word2": "2@1"}, ("word@1", "word@2")),
    ({"pretok": "1", "punct": "1"}, ("pretok", "punct")),
  ],
)
def test_strategies_are_our_rules(strategy, rules):
  assert rules_from_strategy(strategy) == rules
  assert strategy_from_rules(rules) == strategy


def test_arguments_after_the_at_sign_count_only_for_word():
  assert rules_from_strategy({"word1": "1@2"}) == ("word@1",)
  assert rules_from_strategy({"word": "2@1"}) == ("word@2",)
  with pytest.raises(ValueError, match="'word': '1@2'"):
    rules_from_strategy({"word": "1@2"})


def test_a_rule_the_official_code_lacks_is_named():
  with pytest.raises(ValueError, match="stride@4"):
    strategy_from_rules(["stride@4"])
