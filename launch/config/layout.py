"""Batch arithmetic: how the global batch is split over ranks and accumulation steps."""

from dataclasses import dataclass

from launch.config.schema import Recipe
from launch.errors import UserError
from models.parallel.grid import Grid


@dataclass(frozen=True)
class Layout:
    """The grid of ranks, and each rank's share of a step.

    The global batch is `grid["data"] * accumulation * micro_batch` sequences.
    """

    grid: Grid
    micro_batch: int
    accumulation: int
    lowered_from: int | None = None  # the recipe's micro batch size, if it was lowered

    def describe(self) -> str:
        """One readable line: ranks, degrees, batch."""
        return (
            f"{self.grid.world_size} ranks = {self.grid.describe()}; global batch "
            f"{self.global_batch} = data {self.grid['data']} x accumulation {self.accumulation} "
            f"x micro batch {self.micro_batch}{self._lowered()}"
        )

    @property
    def global_batch(self) -> int:
        """Sequences per step, over all ranks."""
        return self.grid["data"] * self.accumulation * self.micro_batch

    def _lowered(self) -> str:
        if self.lowered_from is None:
            return ""
        share = self.accumulation * self.micro_batch
        return f", lowered from {self.lowered_from} to divide the {share} sequences of a rank"


def compiled_as_whole(grid: Grid, stage: int, cpu_checkpointing: bool) -> bool:
    """Whether torch.compile sees the whole model, and not each block: `launch/training/compile.py`."""
    whole_weights = stage < 2 or (stage == 2 and grid["data"] == 1)
    return grid["pipeline"] == 1 and whole_weights and not cpu_checkpointing


def plan_layout(recipe: Recipe, world_size: int) -> Layout:
    """Split the ranks over the axes of the grid, and the global batch into micro batches.

    `train.micro_batch_size` is an upper limit: if it does not divide a rank's share of the global
    batch, the micro batch is the next smaller size that does.

    Raises:
        UserError: if something does not divide evenly; the message suggests values that do.
    """
    degrees = recipe.parallel.degrees()
    model_size = recipe.parallel.model_parallel_size
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
