"""Sums of 16-bit gradients have the bits of torch's own; `tests/gpu` runs the same for the GPU's kernel."""

import pytest
import torch

from models.parallel.gradient_sums import BLOCK, accumulate

SHAPES = [(1,), (3, 5), (BLOCK,), (BLOCK + 1,), (7, BLOCK)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check_sums(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Begin a sum with one gradient and add another, in a flat buffer with something on both sides."""
    generator = torch.Generator(device).manual_seed(0)
    gradients = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)]
    count = gradients[0].numel()
    buffer = torch.full((count + 2,), torch.nan, device=device)
    total = buffer[1:-1]
    accumulate(total, gradients[0], first=True)
    accumulate(total, gradients[1])
    expected = gradients[0].float() + gradients[1].float()
    assert torch.equal(total, expected.view(-1))
    assert buffer[[0, -1]].isnan().all(), "nothing beside the sum is written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_has_the_bits_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_sums(shape, dtype, "cpu")
