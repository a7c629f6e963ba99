"""Master weights and moments in bf16 (`bf16_optimizer_states`): equal to one device that rounds too."""

from typing import Any

import pytest

from launch.parity.run import TrainingRecord, run_layout
from tests.parity.cases import Case, Workbench
from tests.parity.kinds import PP2, TP2
from tests.parity.planting import plant
from tests.selection import representatives

MASTERS = "deepspeed.bf16.bf16_master_weights_and_grads=true"
STATES = (MASTERS, "deepspeed.bf16.bf16_optimizer_states=true")
LOW_SUMS = "deepspeed.data_types.grad_accum_dtype=bf16"  # ZeRO-1 keeps fp32 states without it
CASES = [
    Case("zero2", 2, "bf16", overrides=STATES),
    Case("zero2", 1, "bf16", "llama", micro_batch=2, overrides=(*STATES, LOW_SUMS)),
    Case("zero3", 2, "bf16", "llama", overrides=STATES),
    Case("zero1", 4, "bf16", overrides=(*STATES, LOW_SUMS, TP2, PP2)),
    Case("zero3", 4, "bf16", overrides=(*STATES, TP2)),
    Case("zero2_offload_cpu", 2, "bf16", overrides=STATES),
    Case("zero2_offload_cpu", 2, "bf16", "llama", overrides=(MASTERS,)),
    Case("zero3_offload_cpu", 2, "bf16", overrides=STATES),
]


def kinds(case: Case) -> set[str]:
    return {case.stem if "offload" not in case.stem else "offload", *case.overrides} - {TP2}


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(
    "case", representatives(CASES, kinds, lambda case: case.ranks), ids=lambda case: case.name
)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}


def _with_fp32_states(*arguments: Any) -> TrainingRecord:
    import torch
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    plant(DeepSpeedZeroOptimizer, "_configure_master_weights", lambda *_, **__: torch.float32)
    return run_layout(*arguments)


def test_states_in_fp32_are_told_apart(bench: Workbench) -> None:
    differences = bench.compare(Case("zero2", 1, "bf16", overrides=STATES), _with_fp32_states)
    assert {d.quantity for d in differences if d.past} >= {"loss"}
