"""Compiled ZeRO-3 trains right over many steps: on GPUs it once lost gradients without a word.

And CUDA graphs, which CPUs have none of, launch what they recorded.
"""

import pytest
import torch

from tests.parity.cases import FAMILIES, Case, Workbench, hundred_steps
from tests.parity.kinds import COMPILE, STDLIB

pytestmark = pytest.mark.gpu
RANKS = (1, 2)[: max(1, torch.cuda.device_count())]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero3_equals_one_gpu_over_a_hundred_steps(
    family: str, ranks: int, bench: Workbench
) -> None:
    differences = bench.compare(hundred_steps(family, ranks))
    assert not [d for d in differences if d.past]


GRAPHS = (COMPILE, "train.cuda_graphs=true", STDLIB)
RECORDED = {  # ranks, ZeRO stage, overrides
    "one GPU": (1, 1, ()),
    "ZeRO-2 on one GPU": (1, 2, ()),
    "recomputed": (1, 1, ("model.checkpoint_activations=true",)),
    "MLP in chunks": (1, 1, ("model.mlp_chunks=3",)),
    "both": (1, 1, ("model.checkpoint_activations=true", "model.mlp_chunks=3")),
    "loss in chunks": (1, 1, ("model.loss_chunks=3",)),
    "data 2": (2, 1, ()),
    "tensor 2": (2, 1, ("parallel.tensor=2",)),
}


@pytest.mark.parametrize("layout", [name for name, (n, _, _) in RECORDED.items() if n in RANKS])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_equal_one_gpu(family: str, layout: str, bench: Workbench) -> None:
    ranks, stage, overrides = RECORDED[layout]
    case = Case(f"zero{stage}", ranks, "bf16", family, 2, overrides=(*GRAPHS, *overrides))
    assert not [d for d in bench.compare(case) if d.past]
