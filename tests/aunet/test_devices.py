"""The table of devices, by the names JAX gives them."""

import types

import jax
import pytest

from aunet_jax.aunet import devices


@pytest.mark.parametrize(
  ("kind", "flops"),
  [
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),
  ],
)
def test_peak_flops_of_known_devices(kind, flops):
  assert devices.peak_flops(types.SimpleNamespace(device_kind=kind)) == flops


def test_a_cpu_has_no_known_peak():
  assert devices.peak_flops(jax.devices()[0]) is None


def test_no_record_hides_a_later_one():
  for number, device in enumerate(devices.DEVICES):
    kind = types.SimpleNamespace(device_kind=device.name)
    assert devices.find(kind) is devices.DEVICES[number]
  assert devices.memory_limit(types.SimpleNamespace(device_kind="TPU9")) is None
