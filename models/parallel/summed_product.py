"""A row-parallel product in chunks: one chunk is summed over the ranks while the next is computed.

A row-parallel layer's result is a sum over the ranks, and all that follows in the forward pass waits for
it. Of two chunks of tokens, the first is summed beside the second's matrix product, so half of the sum
costs no time. In the backward pass the layer has no sum, and its products are computed at once.

The product, its chunks and their sums are one operator to the compiler. It would else be free to order the
sums, which do not depend on each other, and two ranks that order them differently add one's first chunk to
the other's second.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.parallel.collectives import group_named, start_sum


def summed_product(x: Tensor, weight: Tensor, group: dist.ProcessGroup, chunks: int) -> Tensor:
    """The sum over the ranks of `x W^T`, `[..., in / ranks]` to `[..., out]`, in chunks of rows.

    This rank's `weight` is `[out, in / ranks]`. The backward pass is that of
    `reduce_from_group(F.linear(x, weight), group)`.
    """
    if torch.is_autocast_enabled(x.device.type):
        # As autocast does for F.linear; the gradients are cast back on their way.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    apply: Any = _SummedProduct.apply  # torch does not type it
    result: Tensor = apply(x, weight, group.group_name, chunks)
    return result


def _in_chunks(x: Tensor, weight: Tensor, group_name: str, chunks: int) -> Tensor:
    group, rows = group_named(group_name), x.flatten(0, -2)
    y = rows.new_empty(len(rows), len(weight))
    sums = []
    for part, result in zip(rows.chunk(chunks), y.chunk(chunks), strict=True):
        torch.mm(part, weight.t(), out=result)
        sums.append(start_sum(result, group))
    for each in sums:
        each.wait()
    return y.view(*x.shape[:-1], -1)


def _shape(x: Tensor, weight: Tensor, group_name: str, chunks: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


# `torch.library.custom_op` does the same with twice the overhead, in the middle of every forward pass.
_LIBRARY = torch.library.Library("models", "DEF")
_LIBRARY.define("summed_product(Tensor x, Tensor weight, str group_name, int chunks) -> Tensor")
_LIBRARY.impl("summed_product", _in_chunks, "CompositeExplicitAutograd")
torch.library.register_fake("models::summed_product", _shape, lib=_LIBRARY)
_operator: Any = torch.ops.models.summed_product.default


class _SummedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group_name: str, chunks: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = _operator(x, weight, group_name, chunks)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.flatten(0, -2).t() @ x.flatten(0, -2), None, None
