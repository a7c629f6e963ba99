"""CPUAdam: a resumed run computes the powers of beta in another way than one that was never stopped."""

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine


def count_powers(engine: DeepSpeedEngine, steps: int | None) -> None:
    """Have the optimizer count `steps` steps, as it did before the checkpoint. Does nothing for others.

    Defect: CPUAdam's C++ keeps beta1^t and beta2^t, and multiplies them by beta at each step. No checkpoint
        has them. A new engine calls pow for its first step, which rounds differently, so a resumed run
        is not bit for bit the one that was never stopped.
    Versions: DeepSpeed 0.19.8.
    Workaround: take the steps before on one number. 100,000 of them take a fraction of a second.
    Proof: test_cpu_adam.py::test_a_resumed_optimizer_rounds_differently
    """
    optimizer = getattr(engine.optimizer, "optimizer", None)
    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    group = optimizer.param_groups[0]
    weight, gradient, mean, square = (torch.zeros(1) for _ in range(4))
    for step in range(1, (steps or 0) + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, group["lr"], *group["betas"], group["eps"],
            group["weight_decay"], group["bias_correction"], weight, gradient, mean, square,
        )  # fmt: skip
