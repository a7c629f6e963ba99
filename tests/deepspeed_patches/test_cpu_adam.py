"""Raw DeepSpeed shows what `launch/deepspeed_patches/cpu_adam.py` works around."""

from copy import deepcopy
from typing import Any

from tests.deepspeed_patches.raw import repaired
from tests.ranks import run_ranks

STEPS = 10


def _optimizer() -> Any:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from launch.deepspeed_patches.startup import vendor_from_proc
    from launch.ops.builder import build_ops

    build_ops(("cpu_adam",), print)
    # Weights so small that the last digit of a step is seen in them.
    weights = torch.zeros(64, requires_grad=True)
    with vendor_from_proc():
        return DeepSpeedCPUAdam([weights], lr=0.01, betas=(0.9, 0.95))


def _step(optimizer: Any, number: int) -> Any:
    import torch

    (weights,) = optimizer.param_groups[0]["params"]
    weights.grad = torch.linspace(-1, 1, 64) * (number % 7 + 1)
    optimizer.step()
    return weights.detach().clone()


def steps_that_differ(count: bool) -> list[int]:
    """Steps that a resumed optimizer takes to other bits; with `count`, it counts as ours does."""
    import types

    import torch

    from launch.deepspeed_patches.cpu_adam import count_powers

    whole, found = _optimizer(), []
    for number in range(1, STEPS + 1):
        saved, resumed = deepcopy(whole.state_dict()), _optimizer()
        with torch.no_grad():
            resumed.param_groups[0]["params"][0].copy_(whole.param_groups[0]["params"][0])
        resumed.load_state_dict(saved)
        if count:
            engine: Any = types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=resumed))
            count_powers(engine, number - 1)
        if not torch.equal(_step(resumed, number), _step(whole, number)):
            found.append(number)
    return found


def test_a_resumed_optimizer_rounds_differently(built_ops: object) -> None:
    (raw,), (counted,) = (run_ranks(steps_that_differ, 1, count) for count in (False, True))
    assert raw, repaired("cpu_adam.count_powers")
    assert counted == []
