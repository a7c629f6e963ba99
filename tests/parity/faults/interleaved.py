"""Faults of the interleaved schedule: passes of a stage's model chunks, and what goes round the stages."""

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.parity.cases import Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_1, NORM_1, Seeded
from tests.parity.kinds import INTERLEAVED, PP2, TP2
from tests.parity.planting import plant


def backward_pass_of_the_last_micro_batch_left_out_in_one_chunk() -> None:
    """Of the chain's first part, which sends nothing back: no stage waits for it."""
    from deepspeed.runtime.pipe.schedule import BackwardPass

    from models.pipeline_schedules import InterleavedSchedule

    right = InterleavedSchedule.steps

    def wrong(self: Any) -> Any:
        steps = list(right(self))
        if self.stage_id == 0:
            last = max(i for i, step in enumerate(steps) if BackwardPass in map(type, step))
            steps[last] = [one for one in steps[last] if not isinstance(one, BackwardPass)]
        return iter(steps)

    plant(InterleavedSchedule, "steps", wrong)


def shares_of_tensor_ranks_put_together_in_the_wrong_order() -> None:
    """Each tensor rank has received its share of an activation or gradient; the whole is gathered wrong."""
    from launch.deepspeed_patches import model_chunks

    right = vars(model_chunks)["gather_from_group"]

    def wrong(share: Tensor, dim: int, group: Any) -> Any:
        return right(share, dim, group).roll(share.numel(), 0)

    plant(model_chunks, "gather_from_group", wrong)


def gradients_divided_by_the_last_rank_in_each_chunk() -> None:
    """By the accumulation steps: the engine does it where it takes a pass for that of the loss."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine

    def wrong(self: Any, gradient: Tensor) -> Any:
        if dist.get_rank() == dist.get_world_size() - 1:
            return DeepSpeedEngine._backward_prologue_per_tensor(self, gradient)
        return gradient

    plant(PipelineEngine, "_backward_prologue_per_tensor", wrong)


FOUR_PARTS = Case(
    "zero1", 2,
    overrides=(
        FEW_ROWS, PP2, *INTERLEAVED, "model.layers=4",
    ),
)  # fmt: skip
WITH_TENSOR_RANKS = replace(FOUR_PARTS, ranks=4, overrides=(TP2, *FOUR_PARTS.overrides))

FAULTS = [
    Seeded(
        backward_pass_of_the_last_micro_batch_left_out_in_one_chunk, FOUR_PARTS, NORM_1, "backward",
        r"blocks\.0",
    ),
    Seeded(
        shares_of_tensor_ranks_put_together_in_the_wrong_order, WITH_TENSOR_RANKS, LOSS_1, "forward",
        r"blocks\.1", "its input", ranks=(2, 3),
    ),
    Seeded(
        gradients_divided_by_the_last_rank_in_each_chunk, FOUR_PARTS, NORM_1, "backward",
        r"blocks\.1\.mlp", ranks=(1,),
    ),
]  # fmt: skip
