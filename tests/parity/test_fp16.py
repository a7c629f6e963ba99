"""fp16 with a fixed loss scale equals one device in fp16, in every kind of layout."""

import pytest

from launch.certify.run import run_rank
from tests.parity.cases import Case, Workbench
from tests.parity.half import fp16
from tests.selection import representatives

TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
CASES = [
    Case("zero1", 2, "fp16", "gpt2", overrides=fp16(1)),
    Case("zero2", 2, "fp16", "llama", overrides=fp16(2)),
    Case("zero3", 2, "fp16", "gpt2", overrides=fp16(3)),
    Case("zero1", 2, "fp16", "gpt2", overrides=(*fp16(1), TENSOR)),
    Case("zero3", 4, "fp16", "llama", overrides=(*fp16(3), TENSOR, "parallel.sequence=true")),
    # A tied weight on both stages, whose gradients DeepSpeed leaves apart: launch/training/engine.py.
    Case("zero1", 2, "fp16", "gpt2", overrides=(*fp16(1), PIPELINE)),
    Case("zero1", 2, "fp16", "gpt2", overrides=(*fp16(1), PIPELINE, "parallel.schedule=zb-h1")),
    Case("zero1", 4, "fp16", "llama", overrides=(*fp16(1), TENSOR, PIPELINE)),
]


def kinds(case: Case) -> set[str]:
    """ZeRO stage, and the axes that are cut."""
    return {case.stem, *(axis for axis in (TENSOR, PIPELINE) if axis in case.overrides)}


@pytest.mark.parametrize("case", representatives(CASES, kinds), ids=lambda case: case.name)
def test_layout_equals_one_device(case: Case, bench: Workbench) -> None:
    differences = bench.compare(case, run_rank)
    assert not [d for d in differences if d.past]
