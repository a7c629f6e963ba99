"""Raw DeepSpeed shows what `launch/deepspeed_patches/bf16_optimizer.py` works around."""

from typing import Any

from tests.deepspeed_patches.raw import initialize, repaired
from tests.ranks import run_ranks


def two_micro_batches(repair: bool) -> tuple[int, Any]:
    """How many gradients are copied to fp32 in two backward passes, and the sums of the gradients."""
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    from launch.deepspeed_patches.bf16_optimizer import add_gradients_without_a_copy

    torch.manual_seed(0)
    engine = initialize(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        {
            "bf16": {"enabled": True, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1},
            "gradient_accumulation_steps": 4,
        },
    )
    if repair:
        add_gradients_without_a_copy(engine)
    widened = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), settings: Any = None
        ) -> Any:
            nonlocal widened
            copy = function is torch.ops.aten._to_copy.default
            widened += copy and settings.get("dtype") == torch.float32
            return function(*arguments, **(settings or {}))

    for _ in range(2):
        loss = engine(torch.randn(1, 4, dtype=torch.bfloat16)).square().sum()
        count: Any = Count
        with count():
            engine.backward(loss)
        engine.step()
    return widened, [group.tolist() for group in engine.optimizer.fp32_groups_gradients_flat]


def test_each_gradient_is_copied_before_it_is_added() -> None:
    ((raw, sums),) = run_ranks(two_micro_batches, 1, False)
    ((left, repaired_sums),) = run_ranks(two_micro_batches, 1, True)
    assert raw - left == 2 * 4, repaired("bf16_optimizer.add_gradients_without_a_copy")
    assert repaired_sums == sums
    assert any(any(group) for group in sums)
