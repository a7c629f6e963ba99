"""Raw DeepSpeed shows what `launch/deepspeed_patches/speed/bf16_optimizer.py` works around."""

from typing import Any

from tests.deepspeed_patches.raw import initialize, repaired
from tests.ranks import run_ranks


def two_steps(repair: bool) -> tuple[int, int, Any]:
    """How many gradients are copied to fp32, and sums set to zero; and the weights after two steps.

    A step has two micro batches. In the second step, one layer is not used.
    """
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    from launch.deepspeed_patches.speed.bf16_optimizer import add_gradients_without_a_copy

    torch.manual_seed(0)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.at_first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs: torch.Tensor, both: bool) -> torch.Tensor:
            hidden = self.always(inputs)
            loss: torch.Tensor = (self.at_first(hidden) if both else hidden).square().sum()
            return loss

    engine = initialize(
        Layers(),
        {
            "bf16": {"enabled": True, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1},
            "gradient_accumulation_steps": 2,
        },
    )
    if repair:
        add_gradients_without_a_copy(engine)
    widened = zeroed = 0
    flat = {group.data_ptr() for group in engine.optimizer.fp32_groups_gradients_flat}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), settings: Any = None
        ) -> Any:
            nonlocal widened, zeroed
            copy = function is torch.ops.aten._to_copy.default
            widened += copy and settings.get("dtype") == torch.float32
            zeroed += function is torch.ops.aten.zero_.default and arguments[0].data_ptr() in flat
            return function(*arguments, **(settings or {}))

    count: Any = Count
    for micro_batch in range(4):
        loss = engine(torch.randn(1, 4, dtype=torch.bfloat16), micro_batch < 2)
        with count():
            engine.backward(loss)
            if micro_batch % 2:
                before = widened
                engine.step()
                widened = before
            else:
                engine.step()
    groups = engine.optimizer.fp32_groups_flat_partition
    return widened, zeroed, [group.tolist() for group in groups]


def test_each_gradient_is_copied_before_it_is_added() -> None:
    ((raw, zeroed, weights),) = run_ranks(two_steps, 1, False)
    ((left, still_zeroed, repaired_weights),) = run_ranks(two_steps, 1, True)
    said = repaired("speed/bf16_optimizer.add_gradients_without_a_copy")
    assert raw - left == 2 * (4 + 2), said
    assert zeroed == 2 * 2 and still_zeroed == 0, said
    assert repaired_weights == weights


def sums_before_the_step(repair: bool) -> list[float]:
    """The fp32 sums of gradients that the step of one rank gets."""
    import torch
    from torch import nn

    from launch.deepspeed_patches.speed.bf16_optimizer import leave_gradients_that_nobody_sums

    torch.manual_seed(0)
    engine = initialize(
        nn.Linear(4, 4, bias=False),
        {
            "bf16": {"enabled": True, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1},
            "gradient_accumulation_steps": 2,
        },
    )
    if repair:
        leave_gradients_that_nobody_sums(engine)
    for _ in range(2):
        engine.backward(engine(torch.randn(1, 4, dtype=torch.bfloat16)).square().sum())
        if engine.is_gradient_accumulation_boundary():
            break
        engine.step()
    (sums,) = engine.optimizer.fp32_groups_gradients_flat
    values: list[float] = sums.tolist()
    return values


def test_one_rank_rounds_its_gradients() -> None:
    import torch

    (raw,) = run_ranks(sums_before_the_step, 1, False)
    (exact,) = run_ranks(sums_before_the_step, 1, True)
    said = repaired("speed/bf16_optimizer.leave_gradients_that_nobody_sums")
    assert torch.tensor(exact).bfloat16().tolist() == raw, said
    assert exact != raw, said
