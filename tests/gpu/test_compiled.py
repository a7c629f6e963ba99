"""Compiled ZeRO-3 trains right over many steps: on GPUs it once lost gradients without a word."""

import pytest
import torch

from tests.parity.cases import FAMILIES, Workbench, hundred_steps

pytestmark = pytest.mark.gpu
RANKS = (1, 2)[: max(1, torch.cuda.device_count())]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero3_equals_one_gpu_over_a_hundred_steps(
    family: str, ranks: int, bench: Workbench
) -> None:
    differences = bench.compare(hundred_steps(family, ranks))
    assert not [d for d in differences if d.past]
