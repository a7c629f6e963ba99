"""Faults of the optimizer, its parameter groups and the learning rate's schedule."""

import functools
from typing import Any

import torch

from tests.parity.cases import Case
from tests.parity.faults.seeded import (
    FEW_ROWS,
    LOSS_2,
    LOSS_3,
    LOSS_4,
    NORM_2,
    NORM_3,
    WEIGHTS,
    Seeded,
)
from tests.parity.planting import plant


def _plant_adamw(change: Any) -> None:
    """`change(settings)` changes what torch's AdamW is made with."""
    right = torch.optim.AdamW.__init__

    @functools.wraps(right)  # launch/config/resolve.py looks at the parameters it takes
    def wrong(self: Any, params: Any, **settings: Any) -> None:
        right(self, params, **change(settings))

    plant(torch.optim.AdamW, "__init__", wrong)


def betas_swapped() -> None:
    _plant_adamw(lambda settings: {**settings, "betas": settings["betas"][::-1]})


def epsilon_of_another_framework() -> None:
    """1e-6, as in TensorFlow's Adam for BERT."""
    _plant_adamw(lambda settings: {**settings, "eps": 1e-6})


def weight_decay_added_to_the_gradient() -> None:
    """Adam with L2 regularisation in the place of AdamW."""
    right = torch.optim.AdamW.step

    def wrong(self: Any, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=group["weight_decay"])
        return right(self, closure)

    plant(torch.optim.AdamW, "step", wrong)


def weight_decay_of_vectors() -> None:
    from launch.training import engine

    def wrong(model: Any) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters())}]

    plant(engine, "parameter_groups", wrong)


def offloaded_adam_without_weight_decay() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    right = DeepSpeedCPUAdam.__init__

    @functools.wraps(right)
    def wrong(self: Any, *args: Any, **settings: Any) -> None:
        right(self, *args, **{**settings, "weight_decay": 0.0})

    plant(DeepSpeedCPUAdam, "__init__", wrong)


def offloaded_adam_without_bias_correction() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    right = DeepSpeedCPUAdam.__init__

    @functools.wraps(right)
    def wrong(self: Any, *args: Any, **settings: Any) -> None:
        right(self, *args, **{**settings, "bias_correction": False})

    plant(DeepSpeedCPUAdam, "__init__", wrong)


def moments_forgotten_after_each_step() -> None:
    right = torch.optim.AdamW.step

    def wrong(self: Any, closure: Any = None) -> Any:
        self.state.clear()
        return right(self, closure)

    plant(torch.optim.AdamW, "step", wrong)


def learning_rate_one_step_late() -> None:
    from launch.training import engine

    right = vars(engine)["learning_rate_factor"]
    plant(
        engine,
        "learning_rate_factor",
        lambda schedule, step, steps: right(schedule, max(step - 1, 0), steps),
    )


def schedule_stepped_by_each_rank() -> None:
    """As Accelerate does unless told otherwise: two ranks take two steps of the schedule at a time."""
    import torch.distributed as dist

    from launch.training import engine

    right = vars(engine)["learning_rate_factor"]

    def wrong(schedule: Any, step: int, steps: int) -> Any:
        return right(schedule, step * dist.get_world_size(), steps)

    plant(engine, "learning_rate_factor", wrong)


def learning_rate_of_the_first_group_alone() -> None:
    """The schedule does not reach the second parameter group: norms and biases."""
    from launch.training import engine

    right = vars(engine)["LambdaLR"]

    def wrong(optimizer: Any, factor: Any) -> Any:
        return right(optimizer, [factor, *[lambda step: 1.0] * (len(optimizer.param_groups) - 1)])

    plant(engine, "LambdaLR", wrong)


FIRST, FIRST_VECTOR = r"embedding\.token\.weight", r"blocks\.0\.attention_norm\.weight"
ZERO1, ZERO0 = (Case(stem, 1, overrides=(FEW_ROWS,)) for stem in ("zero1", "zero0"))
OFFLOADED = Case("zero2_offload_cpu", 1, overrides=(FEW_ROWS,))
MOMENTS = "first moments"
FAULTS = [
    Seeded(betas_swapped, ZERO1, LOSS_3, MOMENTS, FIRST),
    Seeded(epsilon_of_another_framework, ZERO1, LOSS_2, WEIGHTS, FIRST),
    Seeded(weight_decay_added_to_the_gradient, ZERO0, LOSS_2, MOMENTS, FIRST),
    Seeded(weight_decay_of_vectors, ZERO1, NORM_2, WEIGHTS, FIRST_VECTOR),
    Seeded(offloaded_adam_without_weight_decay, OFFLOADED, NORM_3, WEIGHTS, FIRST),
    Seeded(offloaded_adam_without_bias_correction, OFFLOADED, LOSS_2, WEIGHTS, FIRST),
    Seeded(moments_forgotten_after_each_step, ZERO0, LOSS_3, MOMENTS, FIRST, step=2),
    Seeded(learning_rate_one_step_late, ZERO1, LOSS_3, "learning rate", "learning rate", step=2),
    Seeded(
        schedule_stepped_by_each_rank,
        Case("zero1", 2, overrides=(FEW_ROWS,)),
        LOSS_4,
        "learning rate",
        "learning rate",
        step=3,
        ranks=(0, 1),
    ),
    Seeded(learning_rate_of_the_first_group_alone, ZERO1, LOSS_2, WEIGHTS, FIRST_VECTOR),
]
