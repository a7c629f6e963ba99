"""Every kind of layout on two GPUs over NCCL, in bf16 and fp16, equals one GPU.

    make test-gpu PYTEST_ARGS="-k two_gpus -s"

prints the rows of the table in models/README.md.
"""

import pytest
import torch

from tests.parity.cases import Case, Workbench
from tests.parity.half import fp16
from tests.parity.kinds import COMPILE, INTERLEAVED, STDLIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs"),
]

TENSOR, PIPELINE = ("parallel.tensor=2",), ("parallel.pipeline=2",)
# The small models have two blocks: a stage's chunks need four.
FOUR_PARTS = (*INTERLEAVED, "model.layers=4")
SEQUENCE = (*TENSOR, "parallel.sequence=true")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    **{f"data 2, ZeRO-{stage}": (stage, ()) for stage in range(4)},
    **{f"tensor 2, ZeRO-{stage}": (stage, TENSOR) for stage in range(4)},
    "tensor 2 with sequence, ZeRO-1": (1, SEQUENCE),
    "tensor 2 with sequence, ZeRO-3": (3, SEQUENCE),
    **{f"pipeline 2, 1f1b, ZeRO-{stage}": (stage, PIPELINE) for stage in range(2)},
    "pipeline 2, zb-h1, ZeRO-1": (1, (*PIPELINE, "parallel.schedule=zb-h1")),
    "pipeline 2, interleaved, ZeRO-1": (1, (*PIPELINE, *FOUR_PARTS)),
    "pipeline 2, gpipe, ZeRO-1": (1, (*PIPELINE, "parallel.schedule=gpipe")),
    "pipeline 2, naive, ZeRO-1": (1, (*PIPELINE, "parallel.schedule=naive")),
}


def cases() -> list[tuple[str, Case]]:
    """Two families and precisions; stage 0 computes fp16 under a scale that moves, and is left out."""
    found = []
    for name, (stage, overrides) in LAYOUTS.items():
        for family in ("gpt2", "llama"):
            for precision in ("fp32", "bf16", "fp16") if stage else ("fp32", "bf16"):
                extra: tuple[str, ...] = (STDLIB,)
                extra += fp16(stage) if precision == "fp16" else ()
                case = Case(
                    f"zero{stage}", 2, precision, family, 2, overrides=(*extra, *overrides),
                    checkpoint_activations=family == "llama",
                )  # fmt: skip
                found.append((name, case))
    return found


@pytest.mark.parametrize(("name", "case"), cases(), ids=lambda value: getattr(value, "name", value))
def test_two_gpus_equal_one(name: str, case: Case, bench: Workbench) -> None:
    differences = bench.compare(case)
    worst = {}
    for quantity in ("loss", "grad norm", "weights"):
        largest = max((d for d in differences if d.quantity == quantity), key=lambda d: d.share)
        worst[quantity] = f"{largest.value:.1e} ({largest.share:.0%})"
    print(f"\n| {name} | {case.family} | {case.precision} | {' | '.join(worst.values())} |")
    assert not [d for d in differences if d.past]


OF_FOUR = {
    "tensor 4": ("parallel.tensor=4",),
    "tensor 2 x data 2": TENSOR,
    "tensor 2 x pipeline 2, interleaved": (*TENSOR, *PIPELINE, *FOUR_PARTS),
}


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="four GPUs")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OF_FOUR)
def test_four_gpus_equal_one(name: str, compiled: bool, bench: Workbench) -> None:
    overrides = (STDLIB, *OF_FOUR[name], *([COMPILE] if compiled else []))
    for precision in ("fp32", "bf16"):
        case = Case("zero1", 4, precision, micro_batch=2, overrides=overrides)
        assert not [d for d in bench.compare(case) if d.past]
