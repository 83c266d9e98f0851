"""Training in bfloat16 learns what training in float32 learns."""

import pytest

from benchmarks import numerics


@pytest.mark.slow
def test_200_steps_in_bfloat16_stay_within_the_noise_of_float32():
  result = numerics.compare(200)
  curves = result["curves"]
  assert curves["float32"][0] > 6 > 4 > curves["float32"][-1]  # it learns
  assert curves["bfloat16"] != curves["float32"]
  assert result["difference_bfloat16"] < result["difference_other_seed"]
  means = result["last_half_mean_bits_per_byte"]
  assert abs(means["bfloat16"] - means["float32"]) < 0.02 * means["float32"]
