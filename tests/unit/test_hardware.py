"""A device's peak is found by its whole name, as drivers write it."""

import pytest

from launch.runtime.hardware import peak_tflops

NAMES = {
    "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0, "NVIDIA GH200 480GB": 989.0, "NVIDIA B200": 2250.0, "NVIDIA GB200": 2500.0,
    "NVIDIA H20": 148.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A10": 125.0, "NVIDIA A10G": 70.0,
    "NVIDIA L4": 121.0, "NVIDIA L40": 181.0, "NVIDIA L40S": 362.0, "Tesla V100-SXM2-16GB": 125.0,
    "Tesla T4": 65.0, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 6000 Ada Generation": 364.2, "AMD Instinct MI300X": 1307.4,
    "NVIDIA RTX 4000 Ada Generation": None, "Quadro RTX 6000": None, "NVIDIA T400": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_peak(name: str) -> None:
    assert peak_tflops(name) == NAMES[name]
