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
    lowered_from: int | None = None  # the recipe's micro batch size, where a rank takes fewer

    def describe(self) -> str:
        """One line for a person: ranks, degrees, batch."""
        return (
            f"{self.world_size} ranks = pipeline {self.pipeline} x data {self.data} "
            f"x tensor {self.tensor}; global batch "
            f"{self.data * self.accumulation * self.micro_batch} = data {self.data} x accumulation "
            f"{self.accumulation} x micro batch {self.micro_batch}"
            f"{self._lowered()}"
        )

    def _lowered(self) -> str:
        if self.lowered_from is None:
            return ""
        share = self.accumulation * self.micro_batch
        return f", lowered from {self.lowered_from} to divide the {share} sequences of a rank"


def plan_layout(recipe: Recipe, world_size: int) -> Layout:
    """Divide the ranks into pipeline x data x tensor, and the global batch into micro batches.

    `train.micro_batch_size` is the most sequences that a rank takes at once: where it does not divide
    a rank's part of the global batch, the micro batch is the largest smaller size that does.

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
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        below = max((n for n in divisors if n < data), default=1)
        raise UserError(
            f"train.global_batch_size: {batch} is no multiple of the data parallel size {data}; "
            f"use {below * tensor * pipeline} ranks, or a global batch of {data * (batch // data + 1)}"
        )
    share = batch // data
    fitting = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
    return Layout(
        world_size=world_size,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        micro_batch=fitting,
        accumulation=share // fitting,
        lowered_from=micro if fitting < micro else None,
    )
