"""fp32 sums of 16-bit gradients, in one pass over memory."""

from functools import cache
from typing import Any

from torch import Tensor

BLOCK = 4096  # elements of a program of the GPU's kernel


def accumulate(total: Tensor, gradient: Tensor, first: bool = False) -> None:
    """Add a gradient to its fp32 sum, or with `first` begin the sum with it.

    torch's kernels for two dtypes take one element at a time, and reach 60% of an H100's memory
    bandwidth. Ours gives the same bits.

    Args:
        total: contiguous, in fp32 or what sums are kept in.
        gradient: as many elements, in any dtype.
        first: overwrite what `total` holds.
    """
    if total.is_cuda and gradient.is_contiguous():
        blocks = (total.numel() + BLOCK - 1) // BLOCK
        _kernel()[(blocks,)](total, gradient, total.numel(), first, BLOCK, num_warps=8)
    elif first:
        total.copy_(gradient.view(total.shape))
    else:
        total.add_(gradient.view(total.shape))


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    def kernel(total, gradient, elements, first: tl.constexpr, block: tl.constexpr):
        here = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = here < elements
        value = tl.load(gradient + here, inside).to(tl.float32)
        if not first:
            value += tl.load(total + here, inside)
        tl.store(total + here, value, inside)

    return triton.jit(kernel)
