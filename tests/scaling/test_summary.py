"""Fits as lines to read in a terminal."""

from aunet_jax.scaling import summary


def test_numbers_are_short_and_intervals_are_shown_where_there_are_any():
  assert summary.number(1.23456e20) == "1.235e20"
  assert summary.number(None) == "?"
  entry = {"value": 0.33, "low": None, "high": None}
  assert summary.with_interval(entry) == "0.33"
  entry |= {"low": 0.31}
  assert summary.with_interval(entry) == "0.33 [0.31, ?]"


def test_the_budget_that_was_held_out_is_compared_with_its_prediction():
  assert summary.heldout_text({}) is None
  predicted = {"value": 1.25, "low": 1.2, "high": 1.3}
  point = {"loss": 1.2345, "predicted": predicted, "relative_error": 0.01256}
  held = {"budget": 1e20, "points": [point]}
  text = summary.heldout_text({"heldout": held})
  assert text == (
    "held out 1e20 FLOPs: 1.2345, predicted 1.25 [1.2, 1.3] (+1.26%)"
  )
  size = {"best_size": 4e9, "predicted_size": 5e9, "relative_error": 0.25}
  text = summary.heldout_text({"heldout": held | size})
  assert "best size 4e09, predicted 5e09 (+25.0%)" in text
