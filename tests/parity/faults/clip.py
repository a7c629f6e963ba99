"""Faults of clipping. They show in the step after: the norm that is told is that before clipping.

bf16's rounding is larger than what these do in four steps.
"""

from typing import Any

import torch

from tests.parity.cases import Case
from tests.parity.faults.seeded import FEW_ROWS, LOSS_2, Seeded
from tests.parity.planting import plant


def clipped_on_the_local_norm() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    right = DeepSpeedZeroOptimizer.unscale_and_clip_grads

    def wrong(self: Any, gradients: Any, total_norm: Any) -> Any:
        return right(self, gradients, torch.nn.utils.get_total_norm(gradients))

    plant(DeepSpeedZeroOptimizer, "unscale_and_clip_grads", wrong)


def clipped_twice() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    right = DeepSpeedZeroOptimizer.unscale_and_clip_grads

    def wrong(self: Any, gradients: Any, total_norm: Any) -> None:
        for _ in range(2):
            right(self, gradients, total_norm)

    plant(DeepSpeedZeroOptimizer, "unscale_and_clip_grads", wrong)


def not_clipped() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    plant(DeepSpeedEngine, "clip_fp32_gradients", lambda self: None)


def each_gradient_clipped_by_its_own_norm() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    def wrong(self: Any) -> None:
        for parameter in self.module.parameters():
            torch.nn.utils.clip_grad_norm_([parameter], self.gradient_clipping())

    plant(DeepSpeedEngine, "clip_fp32_gradients", wrong)


def tied_weight_twice_in_the_norm() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    def wrong(self: Any) -> None:
        named = self.module.named_parameters(remove_duplicate=False)
        gradients = [parameter.grad for _, parameter in named]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(
            self.module.parameters(), self.gradient_clipping(), norm
        )

    plant(DeepSpeedEngine, "clip_fp32_gradients", wrong)


FIRST, MOMENTS = r"embedding\.token\.weight", "first moments"
ZERO0, ZERO1 = (Case(stem, 1, overrides=(FEW_ROWS,)) for stem in ("zero0", "zero1"))
ZERO2_ON_2 = Case("zero2", 2, overrides=(FEW_ROWS,))
FAULTS = [
    Seeded(clipped_on_the_local_norm, ZERO2_ON_2, LOSS_2, MOMENTS, FIRST, ranks=(0, 1)),
    Seeded(clipped_twice, ZERO1, LOSS_2, MOMENTS, FIRST),
    Seeded(not_clipped, ZERO0, LOSS_2, MOMENTS, FIRST),
    Seeded(each_gradient_clipped_by_its_own_norm, ZERO0, LOSS_2, MOMENTS, FIRST),
    Seeded(tied_weight_twice_in_the_norm, ZERO0, LOSS_2, MOMENTS, FIRST),
]
