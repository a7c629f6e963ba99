"""launch/config/layout.py: the global batch is the recipe's on any number of ranks; else one line."""

import re
from typing import Any

import pytest

from launch.config.layout import Layout, plan_layout
from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.errors import UserError
from models.parallel.grid import Grid


def recipe(batch: int, micro: int, **parallel: int) -> Recipe:
    values: dict[str, Any] = {
        "name": "a_recipe",
        "model": {"size": "tiny"},
        "data": {"sequence_length": 64},
        "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": micro},
        "deepspeed": {"config": "ds_configs/zero1.json"},
    }
    read = recipe_from_dict(values)
    return read.model_copy(update={"parallel": read.parallel.model_copy(update=parallel)})


@pytest.mark.parametrize(
    ("ranks", "batch", "micro", "expected"),
    [
        (1, 16, 8, Layout(Grid(data=1), 8, 2)),
        (2, 16, 8, Layout(Grid(data=2), 8, 1)),
        (4, 16, 4, Layout(Grid(data=4), 4, 1)),
        (3, 12, 2, Layout(Grid(data=3), 2, 2)),
        (1, 1, 1, Layout(Grid(data=1), 1, 1)),
    ],
)
def test_every_sequence_has_its_place(ranks: int, batch: int, micro: int, expected: Layout) -> None:
    layout = plan_layout(recipe(batch, micro), ranks)
    assert layout == expected
    assert layout.grid["data"] * layout.accumulation * layout.micro_batch == batch


def test_model_parallel_ranks_share_a_batch() -> None:
    layout = plan_layout(recipe(16, 2, tensor=2, pipeline=2), 8)
    assert layout == Layout(Grid(tensor=2, pipeline=2, data=2), micro_batch=2, accumulation=4)
    assert layout.describe() == (
        "8 ranks = pipeline 2 x data 2 x tensor 2; global batch 16 = data 2 x accumulation 4 "
        "x micro batch 2"
    )


@pytest.mark.parametrize(
    ("ranks", "batch", "micro", "message"),
    [
        (
            3, 16, 8,
            "train.global_batch_size: 16 is no multiple of the data parallel size 3; "
            "use 2 ranks, or a global batch of 18",
        ),
        (
            32, 16, 8,
            "train.global_batch_size: 16 is no multiple of the data parallel size 32; "
            "use 16 ranks, or a global batch of 32",
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_rejected(ranks: int, batch: int, micro: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        plan_layout(recipe(batch, micro), ranks)


@pytest.mark.parametrize("ranks", range(1, 40))
def test_the_advice_works(ranks: int) -> None:
    """Whoever does what the message says gets a layout."""
    batch, micro = 24, 8
    try:
        plan_layout(recipe(batch, micro), ranks)
    except UserError as error:
        advised_ranks = re.search(r"use (\d+) ranks, or a global batch of (\d+)", str(error))
        assert advised_ranks
        plan_layout(recipe(batch, 1), int(advised_ranks[1]))
        plan_layout(recipe(int(advised_ranks[2]), 1), ranks)


@pytest.mark.parametrize(
    ("ranks", "batch", "micro", "expected", "accumulation"),
    [(4, 16, 8, 4, 1), (2, 12, 4, 3, 2), (1, 14, 4, 2, 7), (1, 7, 4, 1, 7), (16, 16, 8, 1, 1)],
)
def test_a_micro_batch_is_the_most_that_a_rank_takes(
    ranks: int, batch: int, micro: int, expected: int, accumulation: int
) -> None:
    layout = plan_layout(recipe(batch, micro), ranks)
    assert (layout.micro_batch, layout.accumulation) == (expected, accumulation)
    assert layout.grid["data"] * layout.accumulation * layout.micro_batch == batch
    assert f"micro batch {expected}, lowered from {micro} to divide the" in layout.describe()


def test_ranks_that_model_parallelism_does_not_divide() -> None:
    with pytest.raises(
        UserError, match="6 ranks are no multiple of tensor 2 x pipeline 2; start a"
    ):
        plan_layout(recipe(16, 2, tensor=2, pipeline=2), 6)
    with pytest.raises(UserError, match="start a multiple of 4 ranks"):
        plan_layout(recipe(16, 2, tensor=2, pipeline=2), 2)
