"""Killed between two saves and resumed, a run ends bit for bit like one never killed."""

from pathlib import Path
from typing import Any

import pytest

from launch.config.resolve import merge
from tests.ranks import RankDiedError
from tests.resume.runs import STEPS, files, steps_logged, train, values, write_text
from tests.selection import representatives

FP32: dict[str, Any] = {"bf16": {"enabled": False}}


# `fused` is AdamW's.
MUON = {"type": "Muon", "params": {"lr": 1e-2, "fused": None}}
OPTIMIZER_ON_CPU = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def _offload(path: Path) -> dict[str, Any]:
    swap = {"nvme_path": str(path / "swap")}
    # A buffer as small as the model; nothing stays in memory that could be swapped.
    return {
        "offload_optimizer": swap,
        "offload_param": {**swap, "buffer_size": 300_000, "max_in_cpu": 0},
    }


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 0, fp32": ("zero0_fp32.json", {}),
    "stage 1, fp32": ("zero1.json", FP32),
    "stage 2, fp32": ("zero2.json", FP32),
    "stage 3, fp32": ("zero3.json", FP32),
    "stage 2, optimizer on the CPU, fp32": ("zero2_offload_cpu.json", FP32),
    "stage 3, all on the CPU, fp32": ("zero3_offload_cpu.json", FP32),
    "stage 3, all on a disk, fp32": ("zero3_offload_nvme.json", FP32),
    "stage 3, weights on a disk, fp32": ("zero3_offload_nvme.json", {**FP32, **OPTIMIZER_ON_CPU}),
    "stage 0, bf16": ("zero0.json", {}),
    "stage 2, bf16": ("zero2.json", {}),
    "stage 3, bf16": ("zero3.json", {}),
    "stage 0, fp32, Muon": ("zero0_fp32.json", {"optimizer": MUON}),
    "stage 1, bf16, Muon": ("zero1.json", {"optimizer": MUON}),
    "stage 2, bf16 states": ("zero2_bf16_states.json", {}),
    # So large a scale that the first steps are skipped: its state is what a resumed run depends on.
    "stage 1, fp16": (
        "zero1_fp16.json",
        {"fp16": {"initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 2}},
    ),
    "stage 3, fp16": (
        "zero3_fp16.json",
        {"fp16": {"initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 2}},
    ),
    "stage 3, all on a disk, bf16": ("zero3_offload_nvme.json", {}),
    "tensor 2, stage 0, fp32": ("zero0_fp32.json", {}),
    "tensor 2, stage 1, bf16": ("zero1.json", {}),
    "tensor 2 x data 2 with sequence parallelism, stage 3, fp32": ("zero3.json", FP32),
    "tensor 2 x data 2 with sequence parallelism, stage 2, fp32": ("zero2.json", FP32),
    "tensor 2 x data 2, stage 3, fp32": ("zero3.json", FP32),
    "pipeline 2, stage 0, fp32": ("zero0_fp32.json", {}),
    "pipeline 2, stage 1, bf16": ("zero1.json", {}),
    "pipeline 2 x data 2, gpipe, stage 1, fp32": ("zero1.json", FP32),
    "pipeline 2 x tensor 2, stage 1, fp32": ("zero1.json", FP32),
    "pipeline 2, zb-h1, stage 1, bf16": ("zero1.json", {}),
    "pipeline 2, interleaved, stage 1, fp32": ("zero1.json", FP32),
}


def _parallel(layout: str) -> dict[str, Any]:
    """The recipe's block for a layout's name."""
    found: dict[str, Any] = {
        axis: 2 for axis in ("tensor", "pipeline", "data") if f"{axis} 2" in layout
    }
    if "sequence" in layout:
        found["sequence"] = True
    for schedule in ("gpipe", "zb-h1", "interleaved"):
        if schedule in layout:
            found["schedule"] = schedule
    if "interleaved" in layout:
        found["model_chunks"] = 2
    return found


def kinds(layout: str) -> set[str]:
    """Each part of a layout's name, and each two axes that are cut."""
    parts = layout.replace(" with ", ", ").split(", ")
    return {*parts, *parts[0].split(" x ")}


@pytest.mark.parametrize("layout", representatives(LAYOUTS, kinds))
def test_a_killed_run_ends_like_one_never_killed(
    layout: str, tmp_path: Path, built_ops: object
) -> None:
    file, changes = LAYOUTS[layout]
    write_text(tmp_path / "text")
    block: dict[str, Any] = {"config": f"ds_configs/{file}", **changes}
    if "disk" in layout:
        block = merge({"zero_optimization": _offload(tmp_path)}, block)
    whole, killed = (values(tmp_path, run, **block) for run in ("whole", "killed"))
    if "interleaved" in layout:
        whole["model"]["layers"] = killed["model"]["layers"] = 4
    if "disk" in layout:
        # DeepSpeed swaps no tensor below 1 MB: here the matrices are above it, the vectors below.
        whole["model"]["hidden"] = killed["model"]["hidden"] = 192

    parallel = _parallel(layout)
    ranks = 2 ** max(1, sum(axis in parallel for axis in ("tensor", "pipeline", "data")))
    parallel.pop("data", None)
    whole["parallel"] = killed["parallel"] = parallel

    train(whole, ranks=ranks)
    with pytest.raises(RankDiedError, match="-9"):
        train(killed, kill_after=3, ranks=ranks)
    assert [r["step"] for r in steps_logged(tmp_path / "killed")] == [1, 2, 2, 3]
    assert [p.name for p in (tmp_path / "killed/checkpoints").glob("step_*")] == ["step_00000002"]
    train(killed, resume="auto", ranks=ranks)

    expected = steps_logged(tmp_path / "whole")
    assert steps_logged(tmp_path / "killed") == expected
    assert [r["step"] for r in expected if "loss" in r] == list(range(1, STEPS + 1))
    skipped = sum(r.get("skipped", False) for r in expected)
    assert (skipped > 0) == ("fp16" in layout)
    # The schedule moves with each step that is taken.
    assert len({r["learning_rate"] for r in expected if "loss" in r}) > 3 - (skipped > 0)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
