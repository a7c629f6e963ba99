"""Which sums a copy-engine group takes over, with one of gloo's in its place: a CPU has no copy engine.

What the group itself computes: tests/gpu/test_copy_engine.py.
"""

import gc
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.errors import UserError
from launch.paths import ROOT
from launch.training import engine
from models.parallel import collectives
from models.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from tests.parity.planting import plant
from tests.ranks import run_ranks
from tests.unit.tp_cases import start

CALLS: list[int] = []


class Counted(dist.ProcessGroup):
    """Sums over gloo's group, and notes the sizes of what it adds up, in bytes."""

    def __init__(self, group: dist.ProcessGroup, most_bytes: int, timeout: timedelta) -> None:
        assert timeout > timedelta(0)
        of_rank_and_size: Any = super().__init__
        of_rank_and_size(dist.get_rank(group), dist.get_world_size(group))
        self.group = group

    def _begin(self, tensors: list[Tensor], *options: Any) -> Any:
        CALLS.append(tensors[0].numel() * tensors[0].element_size())
        return self.group.allreduce(tensors)

    allreduce: Any = _begin


def pass_through_layers(compiled: bool, limits: tuple[int, int] | None) -> tuple[list[Any], Any]:
    """A column- and a row-parallel layer: the result, the gradients, and the sums that were counted."""
    group = start()
    if limits is not None:
        plant(collectives, "CopyEngineGroup", Counted)
        plant(collectives, "LEAST_BYTES", limits[0])
        collectives.sum_by_copies(group, limits[1])
        gc.collect()  # torch keeps a group's name, and not the group
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(
        ColumnParallelLinear(8, [32], group=group),
        RowParallelLinear(32, 8, group=group),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    if compiled:
        model.compile()
    torch.manual_seed(7)
    x = torch.randn(3, 5, 8, requires_grad=True)
    model(x).square().sum().backward()
    maximum = collectives.all_reduce(torch.tensor([float(dist.get_rank())]), group, maximum=True)
    found = [x.grad, *(parameter.grad for parameter in model.parameters()), maximum]
    return [None if tensor is None else tensor.tolist() for tensor in found], list(CALLS)


@pytest.mark.parametrize("compiled", [False, True])
def test_large_sums_alone_are_taken_over(compiled: bool) -> None:
    whole = 3 * 5 * 8 * 4  # bytes of the result, and of the gradient of the input
    right = run_ranks(pass_through_layers, 2, compiled, None)
    assert [calls for _, calls in right] == [[], []]
    for limits, counted in (
        ((whole, whole), [whole, whole]),
        ((whole + 1, 2 * whole), []),
        ((0, whole - 1), []),
    ):
        found = run_ranks(pass_through_layers, 2, compiled, limits)
        assert [calls for _, calls in found] == [counted] * 2
        assert [values for values, _ in found] == [values for values, _ in right]


def group_of_four() -> None:
    group = start()
    with pytest.raises(ValueError, match="copies add up the tensors of 2 ranks, not 4"):
        collectives.sum_by_copies(group, 2**20)


@pytest.mark.parametrize("gpus", [False, True])
def test_gpus_that_cannot_read_each_others_memory(
    gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Apart:
        def __init__(self, *arguments: Any) -> None:
            pass

        def sum_by_copies(self, most_bytes: int) -> None:
            raise RuntimeError("CUDA error: peer access is not supported\nand more")

    monkeypatch.setattr(engine, "Topology", Apart)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    overrides = ["parallel.copy_engine=true"]
    recipe = load_recipe(ROOT / "recipes/gpt_tiny_tp2_zero1.yaml", overrides)
    layout = plan_layout(recipe, 2)
    if not gpus:
        assert isinstance(engine.make_topology(recipe, layout), Apart)
        return
    with pytest.raises(
        UserError, match=r"parallel.copy_engine: .* is not supported\); use parallel"
    ):
        engine.make_topology(recipe, layout)


def test_two_ranks_alone_have_one() -> None:
    run_ranks(group_of_four, 4)
