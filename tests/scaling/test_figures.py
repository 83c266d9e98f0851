"""Names that lead from a chart to its run."""

import re

from aunet_jax.scaling import figures


def test_runs_and_models_have_names_that_a_page_and_a_file_may_hold():
  assert figures.anchor("aunet<2> 1e19/s0") == "run-aunet-2--1e19-s0"
  for name in ('a"b', "größe", "x y@1,2"):
    assert re.fullmatch(r"[A-Za-z0-9.@_-]+", figures.anchor(name))
    assert re.fullmatch(r"[a-z0-9-]+", figures.slug(name))
  assert figures.slug("AU-Net 2") == "au-net-2"
