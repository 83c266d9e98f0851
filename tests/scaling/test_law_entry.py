"""One law of one model: what it is fitted to, and what cannot be told apart."""

import numpy as np

from aunet_jax.scaling import fit, law_entry


def points(size, data):
  return [
    law_entry.Point(f"p{i}", [f"p{i}"], n * d, n, d, n * d, 1.0, [1.0])
    for i, (n, d) in enumerate(zip(size, data, strict=True))
  ]


def test_size_and_data_that_grow_together_are_one_variable():
  size = np.geomspace(1, 1000, 8)
  both = ("size", "data")
  assert law_entry.together(points(size, 20 * size), both)
  assert law_entry.together(points(np.full(8, 5.0), size), both)
  assert not law_entry.together(points(size, [1, 9] * 4), both)
  assert not law_entry.together(points(size, 20 * size), ("compute",))


def test_a_curve_goes_through_its_law_and_has_a_band_only_with_refits():
  law = fit.Law(1.0, (10.0,), (0.1,))
  x = law_entry.grid(np.array([1.0, 100.0]), beyond=10)
  assert (x[0], x[-1], x.size) == (1.0, 1000.0, law_entry.CURVE_POINTS)
  curve = law_entry.curve(x, law, None, x[None])
  np.testing.assert_allclose(curve["value"], 1 + 10 / x**0.1)
  assert curve["low"] is None and curve["high"] is None
