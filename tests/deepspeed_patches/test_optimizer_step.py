"""Raw DeepSpeed shows what `launch/deepspeed_patches/speed/optimizer_step.py` works around."""

from collections import Counter
from typing import Any

import pytest

from tests.deepspeed_patches.raw import initialize, operations, repaired, weights_of
from tests.ranks import run_ranks


def a_step(workaround: str | None, stage: int, overflow: bool = False) -> tuple[Any, Any, Any]:
    """What torch and the group are asked for in a step; the norm before clipping; the weights after it."""
    import math

    import torch
    import torch.distributed as dist
    from torch import nn

    from launch.deepspeed_patches.speed import optimizer_step

    torch.manual_seed(0)
    engine = initialize(
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]),
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.01,
        },
    )
    if workaround:
        getattr(optimizer_step, workaround)(engine)
    torch.manual_seed(dist.get_rank())
    inputs = torch.randn(1, 4, dtype=torch.bfloat16) * (math.inf if overflow else 1.0)
    engine.backward(engine(inputs).square().sum())
    with operations() as asked:
        engine.step()
    return (
        Counter(name for name, _, _ in asked),
        float(engine.get_global_grad_norm()),
        weights_of(engine),
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_norms_are_taken_one_by_one(stage: int) -> None:
    raw = run_ranks(a_step, 2, None, stage)
    once = run_ranks(a_step, 2, "take_norms_at_once", stage)
    said = repaired("speed/optimizer_step.take_norms_at_once")
    for (asked, norm, weights), (asked_now, norm_now, weights_now) in zip(raw, once, strict=True):
        assert asked["linalg_vector_norm"] > 3, said
        assert asked_now["_foreach_norm"] == 1, said
        assert asked_now["linalg_vector_norm"] <= 2, said
        assert norm_now == pytest.approx(norm, rel=1e-6)
        assert weights_now == [pytest.approx(group, rel=1e-5) for group in weights]


def test_overflow_is_looked_for_twice() -> None:
    for overflow in (False, True):
        raw = run_ranks(a_step, 1, None, 2, overflow)
        once = run_ranks(a_step, 1, "look_for_overflow_once", 2, overflow)
        (asked, norm, weights), (asked_now, norm_now, weights_now) = raw[0], once[0]
        said = repaired("speed/optimizer_step.look_for_overflow_once")
        assert sum(asked.values()) > sum(asked_now.values()), said
        assert (norm, weights) == (norm_now, weights_now)


def messages_after_a_step(repair: bool, offload: str = "none") -> tuple[int, Any]:
    """How many messages gather weights after a step, and all weights then."""
    from unittest import mock

    import deepspeed
    import torch
    from torch import nn

    from launch.deepspeed_patches.speed.optimizer_step import gather_small_weights_at_once

    torch.manual_seed(0)
    engine = initialize(
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]),
        {
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "offload_param": {"device": offload}},
        },
    )
    if repair:
        gather_small_weights_at_once(engine)
    engine.backward(engine(torch.randn(1, 4, dtype=torch.bfloat16)).square().sum())
    partitions = deepspeed.runtime.zero.partition_parameters
    theirs, ours = partitions.dist, torch.distributed
    name = "all_gather_into_tensor"
    with (
        mock.patch.object(theirs, name, wraps=getattr(theirs, name)) as through_deepspeed,
        mock.patch.object(ours, name, wraps=getattr(ours, name)) as directly,
    ):
        engine.step()
    weights = [parameter.tolist() for parameter in engine.module.parameters()]
    return max(through_deepspeed.call_count, directly.call_count), weights


def test_small_weights_are_gathered_one_by_one() -> None:
    raw = run_ranks(messages_after_a_step, 2, False)
    once = run_ranks(messages_after_a_step, 2, True)
    said = repaired("speed/optimizer_step.gather_small_weights_at_once")
    for (messages, weights), (messages_now, weights_now) in zip(raw, once, strict=True):
        assert messages == 6 and messages_now == 1, said
        assert weights_now == weights
        assert all(weights)


def test_weights_in_host_memory_are_left_to_deepspeed() -> None:
    """It brings each to the GPU before it sends it; NCCL cannot send what is in host memory."""
    raw = run_ranks(messages_after_a_step, 2, False, "cpu")
    left = run_ranks(messages_after_a_step, 2, True, "cpu")
    said = repaired("speed/optimizer_step.gather_small_weights_at_once")
    assert left == raw and raw[0][0] == 6, said
