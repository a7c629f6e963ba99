"""Which C++ ops a JSON loads: those that are built before ranks start."""

import json
from pathlib import Path

import pytest

from launch.ops.builder import ops_needed
from launch.paths import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_ops_needed_by_each_config(path: Path) -> None:
    config = json.loads(path.read_text())
    torch_adam = config["optimizer"]["params"].get("torch_adam", False)
    expected: list[str] = []
    if not torch_adam:
        expected.append("cpu_adam" if "offload" in path.stem else "fused_adam")
    if "nvme" in path.stem:
        expected.append("async_io")
    assert ops_needed(config) == expected


ADAM = {"type": "AdamW", "params": {}}
NVME = {"device": "nvme", "nvme_path": "/tmp"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, []),
        ({"optimizer": ADAM}, ["fused_adam"]),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, []),
        ({"optimizer": {"type": "SGD"}}, []),
        ({"optimizer": {"type": "Lion"}}, ["fused_lion"]),
        (
            {"optimizer": ADAM, "zero_optimization": {"stage": 2, "offload_optimizer": NVME}},
            ["cpu_adam"],
        ),
        (
            {"optimizer": ADAM, "zero_optimization": {"stage": 3, "offload_optimizer": NVME}},
            ["cpu_adam", "async_io"],
        ),
        (
            {"optimizer": ADAM, "zero_optimization": {"stage": 3, "offload_param": NVME}},
            ["fused_adam", "async_io"],
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {}}}, []),
    ],
)
def test_ops_needed(config: dict[str, object], expected: list[str]) -> None:
    assert ops_needed(config) == expected
