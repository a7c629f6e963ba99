"""Which rank does what: as DeepSpeed numbers them, and the groups that are really made."""

from itertools import product

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from models.parallel.grid import AXES, SAMPLE_AXES, WEIGHT_AXES, Grid
from models.parallel.topology import ONE_RANK, TensorParallel, Topology
from tests.ranks import run_ranks

SHAPES = list(product((1, 2, 3, 4), repeat=3))
GROUPS = {**{axis: (axis,) for axis in AXES}, "model": WEIGHT_AXES}


@pytest.mark.parametrize(("tensor", "pipeline", "data"), SHAPES)
def test_ranks_and_groups_are_deepspeeds(tensor: int, pipeline: int, data: int) -> None:
    grid = Grid(tensor=tensor, pipeline=pipeline, data=data)
    assert grid.world_size == tensor * pipeline * data
    theirs = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    for rank in range(tensor * pipeline * data):
        place = theirs.get_coord(rank)
        coordinates = {"pipeline": place.pipe, "data": place.data, "tensor": place.model}
        assert grid.coordinates(rank) == coordinates
        assert grid.rank(**coordinates) == rank
    for axis, name in (("tensor", "model"), ("data", "data"), ("pipeline", "pipe")):
        assert grid.groups(axis) == theirs.get_axis_comm_lists(name)
    models = [sorted(theirs.get_axis_list("data", d)) for d in range(data)]
    assert grid.groups(*WEIGHT_AXES) == models


def test_groups_of_the_drawing() -> None:
    grid = Grid(tensor=2, pipeline=2, data=2)
    assert grid.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.groups("pipeline", "tensor") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert grid.describe() == "pipeline 2 x data 2 x tensor 2"


def test_an_axis_without_an_entry_is_an_error() -> None:
    message = "no axis 'expert'; choose pipeline, data, tensor"
    with pytest.raises(ValueError, match=message):
        Grid(tensor=2).groups("expert")
    with pytest.raises(ValueError, match=message):
        Grid(expert=2)


def test_a_new_axis_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context ranks between data and tensor ranks: they hold other tokens and the same weights."""
    monkeypatch.setattr(
        "models.parallel.grid.AXES",
        {"pipeline": "weights", "data": "samples", "context": "samples", "tensor": "weights"},
    )
    grid = Grid(data=2, context=2, tensor=2)
    assert grid.groups("context") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("data", "context") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [grid.rank(**grid.coordinates(rank)) for rank in range(8)] == list(range(8))


def test_the_axes_divide_weights_or_samples() -> None:
    assert {*WEIGHT_AXES, *SAMPLE_AXES} == set(AXES)


def test_ranks_that_share_a_key_value_head_are_neighbours() -> None:
    assert Grid(tensor=4, data=2).key_value_groups(2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Grid(tensor=4, pipeline=2).key_value_groups(4) == Grid(tensor=4, pipeline=2).groups(
        "tensor"
    )
    for tensor, pipeline, data in SHAPES:
        for sharing in (n for n in range(1, tensor + 1) if tensor % n == 0):
            grid = Grid(tensor=tensor, pipeline=pipeline, data=data)
            found = grid.key_value_groups(sharing)
            assert sorted(rank for ranks in found for rank in ranks) == list(
                range(tensor * pipeline * data)
            )
            for ranks in found:
                assert len(ranks) == sharing
                assert any(set(ranks) <= set(whole) for whole in grid.groups("tensor"))


Place = dict[str, list[int] | int | None]


def places(grids: list[tuple[Grid, int]]) -> list[Place]:
    """Every grid in turn, as this rank finds itself in it: what the mpu says, and who is in its groups."""
    dist.init_process_group("gloo")
    found: list[Place] = []
    for grid, sharing in grids:
        topology = Topology(grid, sharing)
        groups = {
            "tensor": topology.get_tensor_model_parallel_group(),
            "data": topology.get_data_parallel_group(),
            "pipeline": topology.groups["pipeline"],
            "model": topology.get_model_parallel_group(),
            "key_value": topology.key_value_group,
        }
        place: Place = {
            name: None if group is None else dist.get_process_group_ranks(group)
            for name, group in groups.items()
        }
        place |= {
            "stage": topology.coordinates["pipeline"],
            "data rank": topology.get_data_parallel_rank(),
            "data size": topology.get_data_parallel_world_size(),
            "tensor rank": topology.get_tensor_model_parallel_rank(),
            "tensor size": topology.get_tensor_model_parallel_world_size(),
            "model rank": topology.get_model_parallel_rank(),
            "model size": topology.get_model_parallel_world_size(),
        }
        for sequence_parallel in (False, True):
            tp = topology.tensor_parallel(sequence_parallel)
            if grid["tensor"] == 1:
                assert tp is ONE_RANK and tp.size == 1 and tp.sequence_group is None
                continue
            assert tp == TensorParallel(
                topology.groups["tensor"], topology.key_value_group, sequence_parallel
            )
            assert tp.size == grid["tensor"]
            assert tp.sequence_group is (tp.group if sequence_parallel else None)
        found.append(place)
    return found


def test_each_rank_is_in_the_groups_of_its_coordinates() -> None:
    grids = [
        (Grid(tensor=2, pipeline=2), 1), (Grid(tensor=2, data=2), 2), (Grid(pipeline=2, data=2), 1),
        (Grid(tensor=4), 2), (Grid(pipeline=4), 1), (Grid(data=4), 1),
    ]  # fmt: skip
    for rank, found in enumerate(run_ranks(places, 4, grids)):
        for (grid, sharing), place in zip(grids, found, strict=True):
            stage, data_rank, tensor_rank = grid.coordinates(rank).values()
            for name, axes in GROUPS.items():
                assert place[name] == next(g for g in grid.groups(*axes) if rank in g), name
            sharers = next(g for g in grid.key_value_groups(sharing) if rank in g)
            assert place["key_value"] == (sharers if sharing > 1 else None)
            assert (place["stage"], place["data rank"]) == (stage, data_rank)
            assert (place["tensor rank"], place["tensor size"]) == (tensor_rank, grid["tensor"])
            assert place["data size"] == grid["data"]
            assert place["model rank"] == stage * grid["tensor"] + tensor_rank
            assert place["model size"] == grid["tensor"] * grid["pipeline"]
