"""Faults that a layout could have, planted one at a time: parity has to see each of them.

Each is planted inside the ranks, in DeepSpeed's code or in ours, at the place where it would arise.
"""

import functools
from typing import Any

import pytest

from tests.parity.cases import Case, Workbench
from tests.parity.planting import Fault, faulty_layout, first_seen, plant
from tests.selection import representatives


def gradients_not_divided_by_the_accumulation_steps() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine.backward

    def wrong(self: Any, loss: Any) -> Any:
        # Not scale_wrt_gas=False: a hook of DeepSpeed's divides all the same in some stages.
        return right(self, loss * self.gradient_accumulation_steps())

    plant(DeepSpeedEngine, "backward", wrong)


def gradients_summed_over_ranks_by_stage_0() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine.allreduce_bucket

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.gradient_average = False
        return right(self, *args, **kwargs)

    plant(DeepSpeedEngine, "allreduce_bucket", wrong)


def gradients_summed_over_ranks_by_stage_2() -> None:
    import torch.distributed as dist
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    right = DeepSpeedZeroOptimizer.average_tensor

    def wrong(self: Any, tensor: Any, dtype: Any) -> Any:
        return right(self, tensor.mul_(dist.get_world_size()), dtype)

    plant(DeepSpeedZeroOptimizer, "average_tensor", wrong)


def gradients_not_reduced() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    plant(DeepSpeedEngine, "buffered_allreduce_fallback", lambda self, *args, **kwargs: None)


def clipped_on_the_local_norm() -> None:
    import torch
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    right = DeepSpeedZeroOptimizer.unscale_and_clip_grads

    def wrong(self: Any, gradients: Any, total_norm: Any) -> Any:
        return right(self, gradients, torch.nn.utils.get_total_norm(gradients))

    plant(DeepSpeedZeroOptimizer, "unscale_and_clip_grads", wrong)


def ranks_read_the_samples_of_rank_0() -> None:
    from launch.data.batches import Batches

    right = Batches.rank_batch

    def wrong(self: Any, step: int, layout: Any, data_rank: int) -> Any:
        return right(self, step, layout, 0)

    plant(Batches, "rank_batch", wrong)


def offloaded_adam_without_weight_decay() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    right = DeepSpeedCPUAdam.__init__

    @functools.wraps(right)  # launch/config/resolve.py looks at the parameters it takes
    def wrong(self: Any, *args: Any, **settings: Any) -> None:
        right(self, *args, **{**settings, "weight_decay": 0.0})

    plant(DeepSpeedCPUAdam, "__init__", wrong)


def tied_weight_updated_twice() -> None:
    from launch.training import engine

    right = engine.build_engine

    def wrong(*args: Any) -> Any:
        built = right(*args)
        built.module.embedding.token.weight.register_hook(lambda gradient: 2 * gradient)
        return built

    plant(engine, "build_engine", wrong)


def tied_weight_twice_in_the_norm() -> None:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    def wrong(self: Any) -> None:
        named = self.module.named_parameters(remove_duplicate=False)
        gradients = [parameter.grad for _, parameter in named]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(
            self.module.parameters(), self.gradient_clipping(), norm
        )

    plant(DeepSpeedEngine, "clip_fp32_gradients", wrong)


def step_taken_at_construction() -> None:
    from launch.training import engine

    plant(engine, "undo_step_taken_at_construction", lambda engine: None)


# Where bf16 is left out, its rounding is larger than what the fault does in four steps. A wrong clip
# shows one step later than a wrong gradient: Adam's first step does not depend on its size.
BOTH, FP32 = ("fp32", "bf16"), ("fp32",)
FAULTS = [
    (gradients_not_divided_by_the_accumulation_steps, "zero1", 1, BOTH, "grad norm at step 1"),
    (gradients_not_divided_by_the_accumulation_steps, "zero3", 2, BOTH, "grad norm at step 1"),
    (gradients_summed_over_ranks_by_stage_0, "zero0", 2, BOTH, "grad norm at step 1"),
    (gradients_summed_over_ranks_by_stage_2, "zero2", 2, BOTH, "grad norm at step 1"),
    (gradients_not_reduced, "zero0", 2, BOTH, "grad norm at step 1"),
    (clipped_on_the_local_norm, "zero2", 2, FP32, "loss at step 3"),
    (ranks_read_the_samples_of_rank_0, "zero3", 2, BOTH, "loss at step 1"),
    (offloaded_adam_without_weight_decay, "zero2_offload_cpu", 1, FP32, "loss at step 3"),
    (tied_weight_updated_twice, "zero1", 1, BOTH, "grad norm at step 1"),
    (tied_weight_twice_in_the_norm, "zero0", 1, FP32, "loss at step 3"),
]
PLANTED = [
    pytest.param(
        fault, Case(stem, ranks, precision), sign, id=f"{fault.__name__}-{stem}-{precision}"
    )
    for fault, stem, ranks, precisions, sign in FAULTS
    for precision in precisions
]


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(
    ("fault", "case", "sign"), representatives(PLANTED, lambda fault, case, sign: {fault.__name__})
)
def test_fault_is_caught(fault: Fault, case: Case, sign: str, bench: Workbench) -> None:
    assert first_seen(bench.compare(case, faulty_layout, fault))[:1] == [sign]
    assert first_seen(bench.sound(case)) == []


# bf16 with a bf16 copy of the weights at stage 0, which our own JSONs avoid.
BF16_STAGE_0 = {
    "deepspeed.bf16.enabled": True,
    "deepspeed.torch_autocast.enabled": False,
    "deepspeed.data_types.grad_accum_dtype": "bf16",
}


def test_the_step_that_stage_0_takes_at_construction_is_caught(bench: Workbench) -> None:
    case = Case("zero0", 2)
    faulty = bench.compare(case, faulty_layout, step_taken_at_construction, changes=BF16_STAGE_0)
    assert first_seen(faulty)[:1] == ["loss at step 2"]
    assert first_seen(bench.sound(case, BF16_STAGE_0)) == []
