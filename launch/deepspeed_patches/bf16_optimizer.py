"""BF16_Optimizer: each gradient is widened in a copy before it is added."""

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine


def add_gradients_without_a_copy(engine: DeepSpeedEngine) -> None:
    """Add a bf16 gradient to its fp32 sum in one pass. Does nothing for other optimizers.

    Defect: BF16_Optimizer copies each micro batch's gradients to fp32 and adds the copy: 22 bytes of
        memory traffic for each weight where 10 do. GPT 1.3B lost 1.6% of its speed on an H100.
    Versions: DeepSpeed 0.19.8.
    Workaround: add the bf16 gradient itself, which torch widens in the same kernel, to the same bits.
    Proof: test_bf16_optimizer.py::test_each_gradient_is_copied_before_it_is_added
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        return

    def add(parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][index]
        total.data.add_(parameter.grad.data.view(total.shape))
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    optimizer._update_hp_grad = torch.no_grad()(add)
