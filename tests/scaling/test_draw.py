"""Charts: ticks are round, and marks differ."""

from xml.etree import ElementTree

import pytest

from aunet_jax.scaling import draw


def test_models_differ_without_colour_too():
  styles = {draw._style(draw.Series(None, [], [], style)) for style in range(7)}
  assert len({marker for _, _, marker in styles}) == 7
  assert len({colour for colour, _, _ in styles}) == 7


@pytest.mark.parametrize(
  "low, high, log, expected",
  [
    (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (1.9, 3.6, True, [2, 2.5, 3, 3.5]),
    (3e11, 1e14, True, [1e12, 1e13, 1e14]),
    (2e17, 3e22, True, [1e18, 1e19, 1e20, 1e21, 1e22]),
    (-0.33, 0.12, False, [-0.3, -0.2, -0.1, 0, 0.1]),
  ],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, log, expected):
  assert draw.ticks(low, high, log) == pytest.approx(expected)


def test_a_sheet_sets_charts_side_by_side():
  chart = draw.Chart("a", "A", "", "x", "y", [draw.Series("s", [1, 2], [1, 2])])
  text = draw.sheet([chart, chart, chart])
  assert text.count("<svg") == 4
  assert f'<svg x="{draw.WIDTH}" y="0.0"' in text
  root = ElementTree.fromstring(text)
  first, second, third = root
  assert float(third.get("y")) == float(first.get("height"))
  assert root.get("viewBox").split()[2] == str(2 * draw.WIDTH)
