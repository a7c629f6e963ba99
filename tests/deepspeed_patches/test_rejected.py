"""Raw DeepSpeed shows the defects for which `launch/config/compatibility.py` rejects a combination.

A test here fails once DeepSpeed has repaired the defect; its message names the rule to remove.
"""

import pytest

from tests.deepspeed_patches.raw import TwoShards, initialize, start
from tests.ranks import run_ranks

REPAIRED = "DeepSpeed has repaired this: remove the rule from launch/config/compatibility.py"


def gradient_below_a_shard(hpz: int) -> list[float]:
    """The second layer's weight is 1 in the first shard and 2 in the other; two ranks hold each."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    start()
    first, second = (torch.nn.Linear(2, 2, bias=False) for _ in range(2))
    torch.nn.init.constant_(second.weight, dist.get_rank() % 2 + 1.0)
    zero = {
        "stage": 3, "zero_hpz_partition_size": hpz, "stage3_param_persistence_threshold": 0,
    }  # fmt: skip
    engine = initialize(
        torch.nn.Sequential(first, second), {"zero_optimization": zero}, mpu=TwoShards()
    )
    engine.backward(engine(torch.ones(1, 2)).sum())
    gradient: list[float] = safe_get_full_grad(first.weight).flatten().tolist()
    return gradient


def test_hpz_mixes_the_shards_of_tensor_ranks() -> None:
    right = [[2.0] * 4, [4.0] * 4] * 2
    assert run_ranks(gradient_below_a_shard, 4, 1) == right
    assert run_ranks(gradient_below_a_shard, 4, 2) != right, REPAIRED


def train_with_pipe_partitioned_alone() -> None:
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    start()
    model = PipelineModule(
        [LayerSpec(torch.nn.Linear, 2, 2) for _ in range(2)],
        topology=PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1),
        loss_fn=lambda y, label: y.sum(),
    )
    config = {
        "pipeline": {"pipe_partitioned": True, "grad_partitioned": False},
        "gradient_accumulation_steps": 2,
    }
    engine = initialize(model, config)
    sample = torch.ones(1, 2)
    engine.train_batch(iter([(sample, sample)] * 2))


def test_pipe_partitioned_without_grad_partitioned_fails() -> None:
    with pytest.raises(AssertionError):
        run_ranks(train_with_pipe_partitioned_alone, 4)
        pytest.fail(REPAIRED)


def backward_through_a_module_gathered_whole(threshold: int) -> None:
    import torch

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(self.norm(x))
            return y

    zero = {"stage": 3, "stage3_module_granularity_threshold": threshold}
    engine = initialize(torch.nn.Sequential(Block()), {"zero_optimization": zero})
    engine.backward(engine(torch.ones(1, 2)).sum())


def test_modules_gathered_whole_for_their_size_stop_the_backward_pass() -> None:
    run_ranks(backward_through_a_module_gathered_whole, 1, 0)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        run_ranks(backward_through_a_module_gathered_whole, 1, 100)
        pytest.fail(REPAIRED)


def step_in_fp16(stage: int) -> float:
    """How far SGD moves a weight whose gradient is 1, at a learning rate of 1/2 and a loss scale of 16."""
    import torch
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    config = {
        "fp16": {"enabled": True, "loss_scale": 16},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = initialize(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    engine.backward(engine(torch.ones(1, 1, dtype=torch.float16)).sum())
    engine.step()
    return 1.0 - float(model.weight)


def test_fp16_at_stage_0_scales_no_loss() -> None:
    assert run_ranks(step_in_fp16, 1, 1) == [0.5]
    assert run_ranks(step_in_fp16, 1, 0) == [0.5 / 16], REPAIRED


def train_in_two_micro_batches(zenflow: bool) -> tuple[bool, list[bool]]:
    """Whether a matrix is as it was once the engine is built, and whether each micro batch moves it."""
    import torch

    from launch.deepspeed_patches.startup import vendor_from_proc
    from launch.ops.builder import build_ops

    build_ops(("cpu_adam",), print)  # DeepSpeed's own build takes a minute and a half
    model = torch.nn.Linear(4, 6, bias=False)
    before = model.weight.detach().clone()
    zero: dict[str, object] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    if zenflow:
        each_step = {"select_strategy": "step", "select_interval": 1, "update_interval": 1}
        zero["zenflow"] = {"topk_ratio": 0.1, **each_step}
    config = {
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}},
        "zero_optimization": zero,
    }
    with vendor_from_proc():
        engine = initialize(model, config)
    kept, moved = torch.equal(model.weight, before), []
    for _ in range(2):
        before = model.weight.detach().clone()
        engine.backward(engine(torch.ones(1, 4)).square().sum())
        engine.step()
        moved.append(not torch.equal(model.weight, before))
    return kept, moved


def test_zenflow_transposes_matrices_and_steps_in_each_micro_batch(built_ops: object) -> None:
    assert run_ranks(train_in_two_micro_batches, 1, False) == [(True, [False, True])]
    ((kept, moved),) = run_ranks(train_in_two_micro_batches, 1, True)
    assert not kept and moved == [True, True], REPAIRED
