"""Faults of the zero-bubble schedule: weight gradients that come late, twice, wrong or not at all."""

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests.parity.cases import Case
from tests.parity.faults.seeded import FEW_ROWS, NORM_1, Seeded
from tests.parity.kinds import PP2
from tests.parity.planting import plant


def _change_steps(wrong: Any) -> None:
    """`wrong` gets the instructions of a step, which it returns as they should not be."""
    from models.pipeline_schedules import ZeroBubbleSchedule

    right = ZeroBubbleSchedule.steps

    def steps(self: Any) -> Any:
        yield wrong([instruction for step in right(self) for instruction in step])

    plant(ZeroBubbleSchedule, "steps", steps)


def weight_gradients_of_one_micro_batch_dropped() -> None:
    """The last stage leaves out its last weight pass."""
    from models.pipeline_schedules import WeightPass

    def wrong(step: list[Any]) -> list[Any]:
        last = max(i for i, one in enumerate(step) if isinstance(one, WeightPass))
        return step[:last] + step[last + 1 :] if _on_last_rank() else step

    _change_steps(wrong)


def weight_pass_after_the_step() -> None:
    from models.pipeline_schedules import WeightPass

    def wrong(step: list[Any]) -> list[Any]:
        last = max(i for i, one in enumerate(step) if isinstance(one, WeightPass))
        return [*step[:last], *step[last + 1 :], step[last]] if _on_last_rank() else step

    _change_steps(wrong)


def weight_pass_after_the_sum_of_tied_gradients() -> None:
    """The head's gradient of one micro batch misses the embedding on the first stage."""
    from deepspeed.runtime.pipe.schedule import ReduceTiedGrads

    def wrong(step: list[Any]) -> list[Any]:
        where = next(i for i, one in enumerate(step) if isinstance(one, ReduceTiedGrads))
        step[where - 1], step[where] = step[where], step[where - 1]
        return step

    _change_steps(wrong)


def weight_gradients_counted_twice() -> None:
    """The backward pass computes them too."""
    from models.parallel.weight_gradients import WeightGradients

    right = WeightGradients.put

    def wrong(self: Any, x: Tensor, dy: Tensor, edges: Any) -> None:
        right(self, x, dy, edges)
        right(self, x, dy, edges)

    plant(WeightGradients, "put", wrong)


def gradient_received_into_the_memory_of_one_that_waits() -> None:
    """DeepSpeed receives every gradient into the same tensor."""
    from deepspeed.runtime.pipe.schedule import RecvGrad

    from launch.deepspeed_patches import pipeline

    right = pipeline.run_weight_passes

    def wrong(engine: Any) -> None:
        right(engine)
        engine._INSTRUCTION_MAP[RecvGrad] = type(engine)._INSTRUCTION_MAP[RecvGrad]

    plant(pipeline, "run_weight_passes", wrong)


def weight_gradients_that_bf16_optimizer_does_not_get() -> None:
    """A weight pass without what it does for BF16_Optimizer: the next backward pass clears them."""
    from launch.deepspeed_patches import pipeline
    from models.pipeline_schedules import WeightPass

    right = pipeline.run_weight_passes

    def wrong(engine: Any) -> None:
        right(engine)
        later = engine.module.later
        engine._INSTRUCTION_MAP[WeightPass] = lambda self: later.run()

    plant(pipeline, "run_weight_passes", wrong)


def biases_left_out_of_the_weight_pass() -> None:
    from models.parallel.weight_gradients import WeightGradients

    right = WeightGradients.put

    def wrong(self: Any, x: Tensor, dy: Tensor, edges: Any) -> None:
        right(self, x, dy, edges[:1])

    plant(WeightGradients, "put", wrong)


def _on_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


ZERO_BUBBLE = "parallel.schedule=zb-h1"
SPLIT = Case("zero1", 2, overrides=(FEW_ROWS, PP2, ZERO_BUBBLE))
IN_BF16 = Case("zero1", 2, "bf16", overrides=(FEW_ROWS, PP2, ZERO_BUBBLE))
# BF16_Optimizer's hooks take gradients as they come; without them, it has to be told.
DEFERRED = replace(
    IN_BF16, overrides=(*IN_BF16.overrides, "deepspeed.bf16.immediate_grad_update=false")
)
THREE_STAGES = Case(
    "zero1", 3, overrides=(FEW_ROWS, "parallel.pipeline=3", "model.layers=3", ZERO_BUBBLE)
)
BOTH, GRADIENTS, TIED = (0, 1), "parameter gradients", r"embedding\.token\.weight"

FAULTS = [
    Seeded(
        weight_gradients_of_one_micro_batch_dropped, SPLIT, NORM_1, GRADIENTS, TIED, ranks=BOTH,
        more=((IN_BF16, NORM_1),),
    ),
    Seeded(weight_pass_after_the_step, SPLIT, NORM_1, GRADIENTS, TIED, ranks=BOTH),
    Seeded(weight_pass_after_the_sum_of_tied_gradients, SPLIT, NORM_1, GRADIENTS, TIED),
    Seeded(
        weight_gradients_counted_twice, SPLIT, NORM_1, GRADIENTS, TIED, ranks=BOTH,
        more=((IN_BF16, NORM_1),),
    ),
    Seeded(
        gradient_received_into_the_memory_of_one_that_waits, THREE_STAGES, NORM_1, GRADIENTS,
        r"blocks\.1\.mlp\.down\.weight", ranks=(1,),
    ),
    Seeded(
        weight_gradients_that_bf16_optimizer_does_not_get, DEFERRED, NORM_1, GRADIENTS, TIED,
        ranks=BOTH,
    ),
    Seeded(
        biases_left_out_of_the_weight_pass, SPLIT, NORM_1, GRADIENTS,
        r"blocks\.0\.attention\.qkv\.bias",
    ),
]  # fmt: skip
