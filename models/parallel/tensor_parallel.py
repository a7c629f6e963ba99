"""Linear layers and an embedding sharded over tensor ranks (Megatron-LM, arXiv:1909.08053).

A column-parallel layer followed by a row-parallel one needs one all-reduce in each direction. The
first shards its outputs, so each rank computes its own features. Whatever is between them (GELU,
attention heads) works on those features alone. The second shards its inputs to match, and its
result is the sum over the ranks.

Each layer takes a plain process group and can be used alone; with None it is a single-device layer.
Under sequence parallelism (arXiv:2205.05198), activations outside such a pair are sharded along the
sequence: the first layer gathers them, and the second reduce-scatters its result.

A sharded parameter describes its sharding in `parameter.shard` and is marked
`tensor_model_parallel`, which tells DeepSpeed that its gradient is only a part of the norm.
Parameters without the mark are the same on every rank and count once.

A layer's `product` computes `x W^T + b`. It is `F.linear`, unless a pipeline stage puts one in its
place that splits the backward pass (`weight_gradients.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parallel.collectives import (
    Group,
    all_gather,
    copy_to_group,
    group_rank,
    group_size,
    reduce_from_group,
    reduce_scatter,
)

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Shard:
    """How a whole parameter is sharded along `dim` over `size` ranks; `rank` is this rank.

    `parts` are the sizes of the parts of a fused matrix, which are sharded separately: the rows of
    queries, keys and values, or of SwiGLU's gate and up. Every rank then holds a piece of each, in
    that order. (Sharded as one matrix, rank 0 of 2 would get all the queries and half the keys, and
    `chunk(qkv, 3)` would silently compute something other than attention.) A part that is not
    divisible by the ranks is padded with zeros at its end.
    """

    dim: int
    parts: tuple[int, ...]
    rank: int
    size: int

    @property
    def widths(self) -> list[int]:
        """Each part's size on one rank."""
        return [-(-part // self.size) for part in self.parts]

    def whole_shape(self, local: Sequence[int]) -> list[int]:
        """The whole parameter's shape, from a shard's shape."""
        return [sum(self.parts) if d == self.dim else n for d, n in enumerate(local)]

    def ranges(self) -> list[tuple[int, int, int]]:
        """Where this rank's shard lies in the whole, along `dim`, without its padding.

        For each part: where it begins in the shard, where in the whole parameter, and its length.
        """
        found, here, there = [], 0, 0
        for part, width in zip(self.parts, self.widths, strict=True):
            start = min(self.rank * width, part)
            found.append((here, there + start, min(width, part - start)))
            here, there = here + width, there + part
        return found

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's shard of a whole parameter: `sum(parts)` to `sum(widths)` along `dim`."""
        pieces = []
        for part, width in zip(whole.split(self.parts, self.dim), self.widths, strict=True):
            missing = width * self.size - part.shape[self.dim]
            if missing:
                shape = [missing if d == self.dim else n for d, n in enumerate(part.shape)]
                part = torch.cat((part, part.new_zeros(shape)), self.dim)
            pieces.append(part.narrow(self.dim, self.rank * width, width))
        return torch.cat(pieces, self.dim)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole parameter, from the shards of all ranks in rank order; padding is dropped."""
        split = [shard.split(self.widths, self.dim) for shard in shards]
        parts = [torch.cat(pieces, self.dim) for pieces in zip(*split, strict=True)]
        whole = [p.narrow(self.dim, 0, n) for p, n in zip(parts, self.parts, strict=True)]
        return torch.cat(whole, self.dim)


def _cut_parameter(
    shape: Sequence[int], dim: int, parts: Sequence[int], group: Group
) -> nn.Parameter:
    """An uninitialised shard of a parameter of `shape`."""
    shard = Shard(dim, tuple(parts), group_rank(group), group_size(group))
    local = [sum(shard.widths) if d == dim else n for d, n in enumerate(shape)]
    parameter = nn.Parameter(torch.empty(local))
    if shard.size > 1:
        marked: Any = parameter  # torch's type lacks these attributes
        marked.shard, marked.tensor_model_parallel = shard, True
    return parameter


def _check_divides(what: str, parts: Sequence[int], group: Group) -> None:
    for part in parts:
        if part % group_size(group):
            raise ValueError(f"{what}: {part} is no multiple of the {group_size(group)} ranks")


def column_parallel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: Group,
    sequence_parallel: bool,
    product: Product = F.linear,
) -> Tensor:
    """`x W^T + b` with the rows of W sharded over the ranks.

    `x` is `[batch, sequence, in]`, the same on every rank, or `[batch, sequence / ranks, in]` with
    `sequence_parallel`. This rank's `weight` is `[out / ranks, in]` and its `bias` `[out / ranks]`.
    The result is `[batch, sequence, out / ranks]`.
    """
    x = all_gather(x, 1, group) if sequence_parallel else copy_to_group(x, group)
    return product(x, weight, bias)


class ColumnParallelLinear(nn.Module):
    """`x W^T + b` with the outputs sharded over the ranks.

    Weight: `[sum(parts), in]`, per rank `[sum(parts) / ranks, in]`; the bias likewise. See `Shard`
    for `parts`. With `pad`, a part need not be a multiple of the ranks.

    Raises:
        ValueError: if a part is not divisible by the number of ranks, without `pad`.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[int],
        bias: bool = True,
        group: Group = None,
        sequence_parallel: bool = False,
        pad: bool = False,
    ) -> None:
        super().__init__()
        if not pad:
            _check_divides("output features", parts, group)
        self.group, self.sequence_parallel = group, sequence_parallel
        self.weight = _cut_parameter([sum(parts), in_features], 0, parts, group)
        self.bias = _cut_parameter([sum(parts)], 0, parts, group) if bias else None
        self.product: Product = F.linear

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, in]` to `[batch, sequence, sum(parts) / ranks]`.

        See `column_parallel`.
        """
        return column_parallel(
            x, self.weight, self.bias, self.group, self.sequence_parallel, self.product
        )


class RowParallelLinear(nn.Module):
    """`x W^T + b` with the inputs sharded over the ranks, as a column-parallel layer leaves them.

    Weight: `[out, in]`, per rank `[out, in / ranks]`. The bias is whole on every rank.

    Raises:
        ValueError: if `in_features` is not divisible by the number of ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group: Group = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        _check_divides("input features", [in_features], group)
        self.group, self.sequence_parallel = group, sequence_parallel
        self.weight = _cut_parameter([out_features, in_features], 1, [in_features], group)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.product: Product = F.linear

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, in / ranks]` to `[batch, sequence, out]`, the same on every rank.

        With sequence parallelism: to `[batch, sequence / ranks, out]`.
        """
        if group_size(self.group) == 1:
            return self.product(x, self.weight, self.bias)
        partial = self.product(x, self.weight, None)
        if self.sequence_parallel:
            y = reduce_scatter(partial, 1, self.group)
        else:
            y = reduce_from_group(partial, self.group)
        if self.bias is None:
            return y
        # After the sum; otherwise the bias would be added once per rank.
        return y + (copy_to_group(self.bias, self.group) if self.sequence_parallel else self.bias)


class VocabParallelEmbedding(nn.Module):
    """An embedding with the vocabulary sharded over the ranks, padded to a multiple of them.

    Weight: `[vocab, hidden]`, per rank `[ceil(vocab / ranks), hidden]`.
    """

    def __init__(self, vocab: int, hidden: int, group: Group = None) -> None:
        super().__init__()
        self.group = group
        self.weight = _cut_parameter([vocab, hidden], 0, [vocab], group)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, sequence]` token ids to `[batch, sequence, hidden]`, the same on every rank."""
        if group_size(self.group) == 1:
            return F.embedding(tokens, self.weight)
        width = self.weight.shape[0]
        rows = tokens - group_rank(self.group) * width
        elsewhere = (rows < 0) | (rows >= width)
        found = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_group(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)
