"""Labels that count unequally, and rows of several documents, equal one device in every layout.

The loss is the mean over the labels of the global batch: of eight micro batches two have no label that
counts and two have three (`launch/parity/weights.py`).
"""

import dataclasses

import pytest

from tests.parity.cases import DOCUMENTS, LARGE_EPS, Case, Workbench
from tests.parity.hf_cases import HFCase
from tests.parity.kinds import KINDS, axes_of
from tests.selection import representatives

STEMS = ("zero0", "zero1", "zero2", "zero3", "zero2_offload_cpu")
LAYOUTS = [
    *(Case(stem, ranks) for stem in STEMS for ranks in (1, 2)),
    Case("zero2", 4, "bf16", "llama", checkpoint_activations=True),
    Case("zero3", 2, "bf16"),
    *KINDS.values(),
    *(dataclasses.replace(KINDS[kind], precision="bf16") for kind in ("pp2_tp2_sequence", "3d")),
    Case("zero1", 4, "fp32", "llama", overrides=("parallel.pipeline=4", "model.layers=5")),
]
CASES = [
    *(
        dataclasses.replace(
            case,
            uneven_weights=True,
            overrides=(*case.overrides, *LARGE_EPS, DOCUMENTS),
        )
        for case in LAYOUTS
    ),
    *(
        dataclasses.replace(
            KINDS[kind], uneven_weights=True, overrides=(*KINDS[kind].overrides, *LARGE_EPS)
        )
        for kind in ("tp2", "pp2_dp2")
    ),
    HFCase("zero1", 2, "fp32", model="llama", uneven_weights=True, overrides=(DOCUMENTS,)),
    HFCase(
        "zero3", 2, "fp32", model="qwen3", tensor=1, uneven_weights=True, overrides=(DOCUMENTS,)
    ),
]


def kinds(case: Case) -> set[object]:
    """Precision, and the axes that are sharded; each with rows of several documents.

    A ZeRO stage sees gradients alone, whatever they are of: test_zero.py has them all.
    """
    return {*axes_of(case) - {case.stem}, DOCUMENTS in case.overrides, type(case)}


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(
    "case",
    representatives(CASES, kinds, cost=lambda case: case.ranks),
    ids=lambda case: case.name,
)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case)
    assert not [d for d in differences if d.past]
    assert {d.quantity for d in differences} >= {"loss", "grad norm", "weights"}
