"""The collectives of tensor parallelism as autograd functions, each with an explicit group.

Megatron-LM (arXiv:1909.08053, section 3) calls the first two f and g: f is the identity in the
forward pass and an all-reduce in the backward pass; g is the reverse.

    function            forward                    backward
    copy_to_group       the same tensor            all-reduce (sum)           f
    reduce_from_group   all-reduce (sum)           the same tensor            g
    scatter_to_group    this rank's part           all-gather
    gather_from_group   all-gather                 this rank's part
    all_gather          all-gather                 reduce-scatter (sum)       sequence parallelism,
    reduce_scatter      reduce-scatter (sum)       all-gather                 arXiv:2205.05198

The two gathers differ in what follows them. After `gather_from_group`, every rank does the same
work on the whole tensor, so every rank has the whole gradient and takes its part. After
`all_gather`, each rank does different work (its heads, its columns), so the gradients must be
summed.

Two mistakes are often copied, and neither raises an error. One is a plain `dist.all_reduce` in the
forward of a row-parallel layer: it changes a tensor behind autograd's back, which happens to work
after a linear layer (which does not save its output) and is wrong after any op that does. The other
is a column-parallel layer whose input is not wrapped in `copy_to_group`: its weights still get the
right gradient, but everything below it gets only this rank's part.

With a group of one rank, or None, every function returns its input.

Under torch.compile, the collectives are torch's functional ones: the compiler knows what they do, and
that the result is not there before its wait. It moves the waits down (`launch/training/compile.py`), so
that a layer's weight gradient is computed while the gradient of its input is summed. (When torch 2.11
traced `dist.all_reduce` itself, in bf16 with NCCL, a model did not learn at all.) All ranks must run the
same collectives in the same order, so the graphs of all ranks must be alike: code may depend on the
number of ranks, but a branch must not depend on the rank.

Two ranks may add up large tensors by copies: `sum_by_copies`, `copy_engine.py`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Work

from models.parallel.copy_engine import CopyEngineGroup

Group = dist.ProcessGroup | None

# torch 2.13 renames the single-tensor collectives and warns on the old names; 2.11 lacks the new.
_all_gather_single: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# Collectives that the compiler can see. They take a group's name, and their result must be waited for.
_functional: Any = torch.ops._c10d_functional

# torch has no public names for these.
_group_named: Any = torch._C._distributed_c10d._resolve_process_group
_name_group: Any = torch._C._distributed_c10d._register_process_group

LEAST_BYTES = 2**20  # of a sum by copies: less goes to NCCL, in one launch
# By a group's name: the name of the group that adds up its large tensors, and the most bytes of one.
_summed_by: dict[str, tuple[str, int]] = {}
_copy_engine_groups: list[dist.ProcessGroup] = []  # torch keeps the names alone


def sum_by_copies(group: dist.ProcessGroup, most_bytes: int) -> None:
    """Let a group's two GPUs add up large tensors by copies; see `copy_engine.py`, also for errors.

    NCCL adds up those of less than `LEAST_BYTES` and of more than `most_bytes`.
    """
    name, timeout = f"copies of {group.group_name}", dist.distributed_c10d.default_pg_timeout
    _copy_engine_groups.append(CopyEngineGroup(group, most_bytes, timeout))
    _name_group(name, _copy_engine_groups[-1])
    _summed_by[group.group_name] = name, most_bytes


def _name_to_sum(x: Tensor, group: dist.ProcessGroup) -> str:
    """The name of the group that adds up this tensor."""
    name, most_bytes = _summed_by.get(group.group_name, ("", 0))
    by_copies = LEAST_BYTES <= x.numel() * x.element_size() <= most_bytes
    return name if by_copies else group.group_name


def group_size(group: Group) -> int:
    """Number of ranks in a group; 1 for None (this rank alone)."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This rank's index in a group; 0 for None (this rank alone)."""
    return 0 if group is None else dist.get_rank(group)


def start_sum(x: Tensor, group: dist.ProcessGroup) -> Work:
    """Begin to add up a contiguous tensor over the ranks, in place; wait before it is read.

    Not for code that is compiled.
    """
    name = _name_to_sum(x, group)
    work: Work
    if name != group.group_name:
        work = _group_named(name).allreduce([x])
    else:
        work = dist.all_reduce(x, group=group, async_op=True)
    return work


def all_reduce(x: Tensor, group: dist.ProcessGroup, maximum: bool = False) -> Tensor:
    """The sum (or the maximum) over the ranks, as a new tensor of any shape. No gradient."""
    result: Tensor
    if torch.compiler.is_compiling():
        name = group.group_name if maximum else _name_to_sum(x, group)
        sent = _functional.all_reduce(x.contiguous(), "max" if maximum else "sum", name)
        result = _functional.wait_tensor(sent)
    else:
        result = x.clone(memory_format=torch.contiguous_format)
        if maximum:
            dist.all_reduce(result, dist.ReduceOp.MAX, group=group)
        else:
            start_sum(result, group).wait()
    return result


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    size, dim, x = group_size(group), dim % x.dim(), x.contiguous()
    if torch.compiler.is_compiling():
        sent = _functional.all_gather_into_tensor(x, size, group.group_name)
        parts: Tensor = _functional.wait_tensor(sent)
    else:
        parts = x.new_empty((size * x.shape[0], *x.shape[1:]))
        _all_gather_single(parts, x, group=group)
    whole: Tensor = parts.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)
    return whole


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    _check_divides(x, dim, group)
    size, dim = group_size(group), dim % x.dim()
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    mine: Tensor
    if torch.compiler.is_compiling():
        sent = _functional.reduce_scatter_tensor(parts.flatten(0, 1), "sum", size, group.group_name)
        mine = _functional.wait_tensor(sent)
    else:
        mine = torch.empty_like(parts[0])
        _reduce_scatter_single(mine, parts.flatten(0, 1), group=group)
    return mine


def _part(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    _check_divides(x, dim, group)
    return x.chunk(group_size(group), dim)[group_rank(group)].contiguous()


def _check_divides(x: Tensor, dim: int, group: dist.ProcessGroup) -> None:
    size = group_size(group)
    if x.shape[dim] % size:
        raise ValueError(f"dimension {dim} of {list(x.shape)} is no multiple of the {size} ranks")


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    apply: Any = function.apply  # torch does not type it
    result: Tensor = apply(*arguments)
    return result


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.dim, ctx.group), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _part(gradient, ctx.dim, ctx.group), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(gradient, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.dim, ctx.group), None, None


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Pass a tensor that all ranks share to work that differs by rank. Any shape; same shape out.

    Use it too for a shared weight that ranks apply to different tokens or heads: its gradient is
    then summed over the ranks.
    """
    return x if group_size(group) == 1 else _apply(_Copy, x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Sum the ranks' partial results. Any shape; same shape out."""
    return x if group_size(group) == 1 else _apply(_Reduce, x, group)


def scatter_to_group(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of a shared tensor: `[..., n, ...]` to `[..., n / ranks, ...]`.

    Raises:
        ValueError: if dimension `dim` is not divisible by the number of ranks.
    """
    return x if group_size(group) == 1 else _apply(_Scatter, x, dim, group)


def gather_from_group(x: Tensor, dim: int, group: Group) -> Tensor:
    """The whole tensor from the ranks' parts, when every rank then does the same work.

    `[..., n, ...]` to `[..., n * ranks, ...]`.
    """
    return x if group_size(group) == 1 else _apply(_Gather, x, dim, group)


def all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """The whole tensor from the ranks' parts, when the ranks then do different work.

    `[..., n, ...]` to `[..., n * ranks, ...]`. Before a column-parallel layer: dimension 1 of
    `[batch, sequence / ranks, hidden]`.
    """
    return x if group_size(group) == 1 else _apply(_AllGather, x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of the sum over the ranks: `[..., n, ...]` to `[..., n / ranks, ...]`.

    After a row-parallel layer: dimension 1 of `[batch, sequence, hidden]`.

    Raises:
        ValueError: if dimension `dim` is not divisible by the number of ranks.
    """
    return x if group_size(group) == 1 else _apply(_ReduceScatter, x, dim, group)
