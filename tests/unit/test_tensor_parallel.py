"""The layers sharded over ranks: outputs and every gradient are those of torch's own layers."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.parallel.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    Shard,
    VocabParallelEmbedding,
)
from tests.collectives import Traffic
from tests.ranks import run_ranks
from tests.unit.tp_cases import (
    Distances,
    column_apart,
    embedding_apart,
    row_apart,
    start,
)

BOUND = 1e-13  # of fp64 numbers, so that nothing but the order of sums can hide in it


def all_layers_apart() -> Distances:
    """Every layer in every way, in fp64, with a plain process group and nothing else."""
    group = start()
    torch.set_default_dtype(torch.float64)
    found: Distances = {}

    def add(case: str, distances: Distances) -> None:
        found.update({f"{case}, {name}": distance for name, distance in distances.items()})

    for sequence_parallel in (False, True):
        mode = f"sequence parallel {sequence_parallel}"
        for parts in ([16], [8, 4, 4], [16, 4, 4], [12, 12]):
            for bias in (True, False):
                distances = column_apart(
                    group, parts, bias=bias, sequence_parallel=sequence_parallel
                )
                assert ("bias" in distances) == bias
                add(f"column {parts}, bias {bias}, {mode}", distances)
        for parts in ([13], [5], [5, 3]):  # on 4 ranks, the last holds nothing but padding of 5
            distances = column_apart(group, parts, pad=True, sequence_parallel=sequence_parallel)
            add(f"column padded {parts}, {mode}", distances)
        for bias in (True, False):
            distances = row_apart(group, bias=bias, sequence_parallel=sequence_parallel)
            assert ("bias" in distances) == bias
            add(f"row, bias {bias}, {mode}", distances)
    for vocab in (12, 13, 5):
        add(f"embedding of {vocab}", embedding_apart(group, vocab))
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_equal_torchs(ranks: int) -> None:
    for found in run_ranks(all_layers_apart, ranks):
        assert {name: d for name, d in found.items() if d > BOUND} == {}
        # What is the same on all ranks has the same gradient to the last bit.
        assert {name for name, d in found.items() if "copies of" in name and d > 0} == set()
        assert len(found) > 80


def marks_and_errors() -> None:
    group = start()
    column = ColumnParallelLinear(8, [4, 2], group=group)
    row = RowParallelLinear(8, 6, group=group)
    cut: list[Any] = [
        column.weight,
        column.bias,
        row.weight,
        VocabParallelEmbedding(5, 8, group).weight,
    ]
    shapes = [[3, 8], [3], [6, 4], [3, 8]]
    whole_shapes = [[6, 8], [6], [6, 8], [5, 8]]
    for parameter, shape, whole in zip(cut, shapes, whole_shapes, strict=True):
        assert parameter is not None and list(parameter.shape) == shape
        assert parameter.tensor_model_parallel
        assert parameter.shard.whole_shape(parameter.shape) == whole
    assert not hasattr(row.bias, "tensor_model_parallel") and not hasattr(row.bias, "shard")
    with pytest.raises(ValueError, match="output features: 3 is no multiple of the 2 ranks"):
        ColumnParallelLinear(8, [4, 3], group=group)
    with pytest.raises(ValueError, match="input features: 7 is no multiple of the 2 ranks"):
        RowParallelLinear(7, 8, group=group)
    layer = ColumnParallelLinear(8, [4], group=group, sequence_parallel=True)
    after = RowParallelLinear(4, 8, group=group, sequence_parallel=True)
    for parameter in (*layer.parameters(), *after.parameters()):
        nn.init.ones_(parameter)
    with pytest.raises(ValueError, match="no multiple of the 2 ranks"):
        after(torch.ones(1, 3, 2))  # 3 tokens over 2 ranks


def test_cut_parameters_are_marked_and_bad_sizes_rejected() -> None:
    run_ranks(marks_and_errors, 2)


def pair_traffic(sequence_parallel: bool) -> list[tuple[list[str], list[str]]]:
    """What a column- and a row-parallel layer send, forward and backward."""
    group = start()
    first = ColumnParallelLinear(8, [16], True, group, sequence_parallel)
    second = RowParallelLinear(16, 8, False, group, sequence_parallel)
    for parameter in (*first.parameters(), *second.parameters()):
        nn.init.ones_(parameter)
    x = torch.ones(1, 4, 8, requires_grad=True)
    with Traffic() as forward:
        y = second(first(x).relu())
    with Traffic() as backward:
        y.sum().backward()
    return [(forward.names, backward.names)]


def test_a_pair_of_layers_sends_once_each_way() -> None:
    assert run_ranks(pair_traffic, 2, False)[0] == [(["allreduce_"], ["allreduce_"])]
    both = ["_allgather_base_", "_reduce_scatter_base_"]
    assert run_ranks(pair_traffic, 2, True)[0] == [(both, both)]


def test_one_rank_has_torchs_own_layers() -> None:
    torch.manual_seed(0)
    x, tokens = torch.randn(2, 3, 8), torch.arange(6).view(2, 3)
    pairs: list[tuple[nn.Module, nn.Module, Tensor]] = [
        (ColumnParallelLinear(8, [4, 2]), nn.Linear(8, 6), x),
        (RowParallelLinear(8, 6), nn.Linear(8, 6), x),
        (VocabParallelEmbedding(6, 8), nn.Embedding(6, 8), tokens),
    ]
    for ours, theirs, given in pairs:
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours(given), theirs(given))
        assert not any(hasattr(p, "tensor_model_parallel") for p in ours.parameters())


def test_each_rank_gets_a_piece_of_each_part() -> None:
    whole = torch.arange(8)  # queries 0 to 3, keys 4 and 5, values 6 and 7
    shards = [Shard(0, (4, 2, 2), rank, 2) for rank in range(2)]
    assert [s.cut(whole).tolist() for s in shards] == [[0, 1, 4, 6], [2, 3, 5, 7]]
    padded = [Shard(0, (3, 5), rank, 2) for rank in range(2)]
    assert [s.cut(whole).tolist() for s in padded] == [[0, 1, 3, 4, 5], [2, 0, 6, 7, 0]]
    assert padded[0].widths == [2, 3]


def test_merge_undoes_cut() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        size, dim = rng.choice([1, 2, 3, 4, 8]), rng.randrange(3)
        parts = tuple(rng.randint(1, 20) for _ in range(rng.randint(1, 4)))
        shape = [rng.randint(1, 4) for _ in range(3)]
        shape[dim] = sum(parts)
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        shards = [Shard(dim, parts, rank, size) for rank in range(size)]
        cut = [shard.cut(whole) for shard in shards]
        assert len({piece.shape for piece in cut}) == 1, seed
        for shard in shards:
            assert torch.equal(shard.merge(cut), whole), seed
            assert shard.whole_shape(cut[0].shape) == shape, seed
        if not any(part % size for part in parts):  # nothing is there twice, and nothing is made up
            assert sum(piece.numel() for piece in cut) == whole.numel(), seed


def outside_this_project() -> list[float]:
    """An MLP in somebody else's project: a group of some of the ranks, and a loop over SGD."""
    dist.init_process_group("gloo")
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    torch.manual_seed(dist.get_rank())
    up, down = ColumnParallelLinear(4, [8], group=group), RowParallelLinear(8, 4, group=group)
    for parameter in (*up.parameters(), *down.parameters()):
        nn.init.normal_(parameter, std=0.3)
    assert down.bias is not None
    nn.init.zeros_(down.bias)  # whole on both ranks, so alike
    torch.manual_seed(7)
    x, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    losses = []
    for _ in range(40):
        loss = (down(up(x).relu()) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in (*up.parameters(), *down.parameters()):
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.3)
                parameter.grad = None
    return losses


def test_layers_train_with_a_group_of_some_of_the_ranks() -> None:
    losses = run_ranks(outside_this_project, 4)
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]
    assert all(own[-1] < own[0] / 2 for own in losses)
