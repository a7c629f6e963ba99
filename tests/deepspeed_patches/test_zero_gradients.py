"""Raw DeepSpeed shows what `launch/deepspeed_patches/speed/zero_gradients.py` works around."""

from typing import Any
from unittest import mock

import pytest

from tests.deepspeed_patches.raw import (
    copies_to_fp32,
    initialize,
    operations,
    repaired,
    start,
    weights_of,
)
from tests.ranks import run_ranks


def two_steps(stage: int, repair: bool) -> tuple[int, Any]:
    """How many gradients are copied to fp32 in four backward passes, and the weights after two steps."""
    import torch
    from torch import nn

    from launch.deepspeed_patches.speed.zero_gradients import add_reduced_gradients_without_a_copy

    torch.manual_seed(0)
    engine = initialize(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": stage},
            "gradient_accumulation_steps": 2,
        },
    )
    if repair:
        add_reduced_gradients_without_a_copy(engine)
    widened = 0
    for _ in range(4):
        loss = engine(torch.randn(1, 4, dtype=torch.bfloat16)).square().sum()
        with operations() as asked:
            engine.backward(loss)
        engine.step()
        widened += copies_to_fp32(asked)
    return widened, weights_of(engine)


@pytest.mark.parametrize("stage", [2, 3])
def test_each_reduced_gradient_is_copied_before_it_is_added(stage: int) -> None:
    ((raw, weights),) = run_ranks(two_steps, 1, stage, False)
    ((left, repaired_weights),) = run_ranks(two_steps, 1, stage, True)
    said = repaired("speed/zero_gradients.add_reduced_gradients_without_a_copy")
    assert raw - left == 4 * 4, said
    assert repaired_weights == weights


def waits_of_an_epilogue(repair: bool) -> tuple[bool, int]:
    """Whether the host waits for the stream at a backward pass's end, and how often a stream does."""
    from deepspeed.runtime.zero import stage3

    from launch.deepspeed_patches.speed import zero_gradients

    class Stream:
        waited = False

        def synchronize(self) -> None:
            self.waited = True

    optimizer: Any = object.__new__(stage3.DeepSpeedZeroOptimizer_Stage3)
    vars(optimizer).update(
        offload_optimizer=False,
        reduce_and_partition_stream=Stream(),
        ipg_buckets={},
        params_already_reduced={},
        fp16_groups=[],
        report_ipg_memory_usage=lambda *_: None,
        _backward_hook_state=mock.Mock(),
    )
    accelerator = mock.Mock(**{"resolves_data_dependency.return_value": False})
    with (
        mock.patch.object(stage3, "get_accelerator", return_value=accelerator),
        mock.patch.object(zero_gradients, "get_accelerator", return_value=accelerator),
    ):
        if repair:
            zero_gradients.wait_for_reductions_on_the_gpu(mock.Mock(optimizer=optimizer))
        optimizer.independent_gradient_partition_epilogue()
    stream = optimizer.reduce_and_partition_stream
    waits = accelerator.current_stream.return_value.wait_stream.call_args_list
    return stream.waited, waits.count(mock.call(stream))


def test_host_waits_for_reductions() -> None:
    raw = run_ranks(waits_of_an_epilogue, 1, False)
    assert raw == [(True, 0)], repaired("speed/zero_gradients.wait_for_reductions_on_the_gpu")
    assert run_ranks(waits_of_an_epilogue, 1, True) == [(False, 1)]


def parts_of_a_mean(repair: bool) -> tuple[int, Any]:
    """How many divisions there are before a message, and this rank's parts of two tensors' means.

    gloo has no mean: here a sum, divided after it, stands for NCCL's.
    """
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.zero import stage3

    from launch.deepspeed_patches.speed import zero_gradients

    start()
    send = dist.reduce_scatter_tensor

    def scatter(output: torch.Tensor, whole: torch.Tensor, **settings: Any) -> Any:
        mean = settings.get("op") == dist.ReduceOp.AVG
        handle = send(
            output, whole, **({**settings, "op": dist.ReduceOp.SUM} if mean else settings)
        )
        if mean:
            output.copy_(output / dist.get_world_size())
        return handle

    tensors = [torch.arange(5.0) * (dist.get_rank() + 1), torch.ones(2, 2) * 4]
    if repair:
        with mock.patch.object(dist, "get_backend", return_value="nccl"):
            zero_gradients.let_nccl_divide()
    with mock.patch.object(dist, "reduce_scatter_tensor", scatter), operations() as asked:
        parts = stage3.reduce_scatter_coalesced(tensors, None)
    return sum(name == "div_" for name, _, _ in asked), [part.tolist() for part in parts]


def test_buckets_are_divided_before_they_are_sent() -> None:
    raw = run_ranks(parts_of_a_mean, 2, False)
    nccl = run_ranks(parts_of_a_mean, 2, True)
    said = repaired("speed/zero_gradients.let_nccl_divide")
    assert [divisions for divisions, _ in raw] == [1, 1], said
    assert [divisions for divisions, _ in nccl] == [0, 0], said
    assert [parts for _, parts in nccl] == [parts for _, parts in raw]
    assert raw[0][1] == [[0.0, 1.5, 3.0], [4.0, 4.0]]
