"""The batch arithmetic: how a recipe's global batch is divided over ranks and time."""

import math
from dataclasses import dataclass

from launch.config.schema import Recipe
from launch.errors import UserError
from models.parallel.grid import Grid


@dataclass(frozen=True)
class Layout:
    """The ranks' grid, and what each of them does in one step.

    The global batch is `grid["data"] * accumulation * micro_batch` sequences.
    """

    grid: Grid
    micro_batch: int
    accumulation: int
    lowered_from: int | None = None  # the recipe's micro batch size, where a rank takes fewer

    def describe(self) -> str:
        """One line for a person: ranks, degrees, batch."""
        return (
            f"{self.grid.world_size} ranks = {self.grid.describe()}; global batch "
            f"{self.global_batch} = data {self.grid['data']} x accumulation {self.accumulation} "
            f"x micro batch {self.micro_batch}{self._lowered()}"
        )

    @property
    def global_batch(self) -> int:
        """Sequences in one step of all ranks."""
        return self.grid["data"] * self.accumulation * self.micro_batch

    def _lowered(self) -> str:
        if self.lowered_from is None:
            return ""
        share = self.accumulation * self.micro_batch
        return f", lowered from {self.lowered_from} to divide the {share} sequences of a rank"


def plan_layout(recipe: Recipe, world_size: int) -> Layout:
    """Divide the ranks into the axes of the grid, and the global batch into micro batches.

    `train.micro_batch_size` is the most sequences that a rank takes at once: where it does not divide
    a rank's part of the global batch, the micro batch is the largest smaller size that does.

    Raises:
        UserError: where something does not divide; the message names values that do.
    """
    degrees = recipe.parallel.degrees()
    model_size = math.prod(degrees.values())
    data, rest = divmod(world_size, model_size)
    if rest or not data:
        named = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items())
        raise UserError(
            f"parallel: {world_size} ranks are no multiple of {named}; "
            f"start a multiple of {model_size} ranks"
        )
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if batch % data:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        below = max((n for n in divisors if n < data), default=1)
        raise UserError(
            f"train.global_batch_size: {batch} is no multiple of the data parallel size {data}; "
            f"use {below * model_size} ranks, or a global batch of {data * (batch // data + 1)}"
        )
    share = batch // data
    fitting = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
    return Layout(
        grid=Grid(data=data, **degrees),
        micro_batch=fitting,
        accumulation=share // fitting,
        lowered_from=micro if fitting < micro else None,
    )
