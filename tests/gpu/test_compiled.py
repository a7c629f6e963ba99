"""Compiled ZeRO-3 trains right over many steps: on GPUs it once lost gradients without a word."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parity.cases import FAMILIES, Workbench, hundred_steps

pytestmark = pytest.mark.gpu
RANKS = (1, 2)[: max(1, torch.cuda.device_count())]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    folder: Path = tmp_path_factory.mktemp("gpu")
    yield Workbench(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero3_equals_one_gpu_over_a_hundred_steps(
    family: str, ranks: int, bench: Workbench
) -> None:
    differences = bench.compare(hundred_steps(family, ranks))
    assert not [d for d in differences if d.past]
