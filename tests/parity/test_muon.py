"""DeepSpeed's Muon equals one written down from its paper, where the gradients' norm is what is clipped."""

from typing import Any

import pytest

from launch.parity.run import TrainingRecord, run_layout
from tests.parity.cases import Case, Workbench
from tests.parity.planting import plant
from tests.selection import representatives

# `fused` is AdamW's. Newton-Schulz: "standard" runs in bf16, "gram" in fp16, or fp32 where that is missing.
MUON = (
    "deepspeed.optimizer.type=Muon", "deepspeed.optimizer.params.fused=null",
    "deepspeed.optimizer.params.momentum=0.9", "deepspeed.optimizer.params.muon_lr=2e-3",
    "model.tied=true",
)  # fmt: skip


def eagerly(*arguments: Any) -> TrainingRecord:
    """The fork server has imported Muon with its kernels marked for compiling, which takes a minute."""
    import torch._dynamo

    torch._dynamo.config.disable = True
    return run_layout(*arguments)


CASES = [
    Case("muon_zero0", 2, "fp32", overrides=MUON),
    Case("zero1", 2, "bf16", overrides=MUON),
    Case("zero0", 2, "bf16", overrides=(*MUON, "deepspeed.optimizer.params.ns_method=standard")),
    Case("zero1", 4, "bf16", "llama", micro_batch=2, overrides=MUON),
]


def kinds(case: Case) -> set[str]:
    return {case.stem}


@pytest.mark.parametrize(
    "case", representatives(CASES, kinds, lambda case: case.ranks), ids=lambda case: case.name
)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case, eagerly)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}


def _without_nesterov(*arguments: Any) -> TrainingRecord:
    from functools import partial

    from deepspeed.runtime.zero.muon import muon_optimizer

    plant(muon_optimizer, "muon_update", partial(muon_optimizer.muon_update, nesterov=False))
    return eagerly(*arguments)


def _embedding_by_muon(*arguments: Any) -> TrainingRecord:
    import deepspeed

    right = deepspeed.set_optimizer_flags

    def wrong(config: Any, model: Any) -> None:
        right(config, model)
        model.embedding.token.weight.use_muon = True

    plant(deepspeed, "set_optimizer_flags", wrong)
    return eagerly(*arguments)


@pytest.mark.parametrize("fault", [_without_nesterov, _embedding_by_muon])
def test_another_step_is_told_apart(fault: Any, bench: Workbench) -> None:
    differences = bench.compare(Case("zero0", 1, "fp32", overrides=MUON), fault)
    assert {d.quantity for d in differences if d.past} >= {"loss", "weights"}
