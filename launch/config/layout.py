"""The batch arithmetic: how a recipe's global batch is divided over ranks and time."""

from dataclasses import dataclass

from launch.config.schema import Recipe
from launch.errors import UserError


@dataclass(frozen=True)
class Layout:
    """What each rank does in one step.

    `global_batch = data * accumulation * micro_batch`, in sequences.
    """

    world_size: int
    tensor: int
    pipeline: int
    data: int
    micro_batch: int
    accumulation: int

    def describe(self) -> str:
        """One line for a person: ranks, degrees, batch."""
        return (
            f"{self.world_size} ranks = pipeline {self.pipeline} x data {self.data} "
            f"x tensor {self.tensor}; global batch "
            f"{self.data * self.accumulation * self.micro_batch} = data {self.data} x accumulation "
            f"{self.accumulation} x micro batch {self.micro_batch}"
        )


def plan_layout(recipe: Recipe, world_size: int) -> Layout:
    """Divide the ranks into pipeline x data x tensor, and the global batch into micro batches.

    Raises:
        UserError: where something does not divide; the message names values that do.
    """
    tensor, pipeline = recipe.parallel.tensor, recipe.parallel.pipeline
    data, rest = divmod(world_size, tensor * pipeline)
    if rest or not data:
        raise UserError(
            f"parallel: {world_size} ranks are no multiple of tensor {tensor} x pipeline {pipeline}; "
            f"start a multiple of {tensor * pipeline} ranks"
        )
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if batch % data:
        fitting = [n for n in range(1, batch + 1) if batch % n == 0]
        below = max((n for n in fitting if n < data), default=1)
        raise UserError(
            f"train.global_batch_size: {batch} is no multiple of the data parallel size {data}; "
            f"use {below * tensor * pipeline} ranks, or a global batch of {data * (batch // data + 1)}"
        )
    accumulation, rest = divmod(batch // data, micro)
    if rest or not accumulation:
        largest = max(
            n for n in range(1, min(micro, batch // data) + 1) if (batch // data) % n == 0
        )
        raise UserError(
            f"train.micro_batch_size: {micro} does not divide the {batch // data} sequences that each "
            f"of {data} data parallel ranks gets of a global batch of {batch}; "
            f"use {largest} (--set train.micro_batch_size={largest})"
        )
    return Layout(world_size, tensor, pipeline, data, micro, accumulation)
