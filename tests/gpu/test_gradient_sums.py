"""The GPU's kernel for sums of 16-bit gradients, and NCCL's means, beside torch's own."""

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.unit.test_gradient_sums import DTYPES, SHAPES, check_sums

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_has_the_bits_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_sums(shape, dtype, "cuda")


def parts_of_means() -> Any:
    """This rank's parts of two tensors' means, by DeepSpeed and by the workaround."""
    from launch.runtime.process_group import init_process_group, prepare_environment

    prepare_environment()
    ranks = init_process_group()
    from deepspeed.runtime.zero import stage3

    from launch.deepspeed_patches.speed.zero_gradients import let_nccl_divide

    tensors = [
        torch.arange(float(n), device=ranks.device).bfloat16() + ranks.rank for n in (5, 4096)
    ]
    theirs = stage3.reduce_scatter_coalesced(tensors, None)
    let_nccl_divide()
    ours = stage3.reduce_scatter_coalesced(tensors, None)
    return [[part.tolist() for part in parts] for parts in (theirs, ours)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a mean over ranks takes two GPUs")
def test_nccls_means_are_deepspeeds() -> None:
    for theirs, ours in run_ranks(parts_of_means, 2):
        assert ours == theirs
