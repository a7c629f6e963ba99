"""Faults of the step that DeepSpeed's engine and ZeRO take: gradients, their sum, norm and clip."""

from typing import Any

from torch import Tensor

from tests.parity.cases import Case
from tests.parity.faults.seeded import (
    FEW_ROWS,
    LOSS_1,
    LOSS_2,
    NORM_1,
    WEIGHTS,
    Seeded,
)
from tests.parity.planting import plant


def gradients_not_divided_by_the_accumulation_steps() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine.backward

    def wrong(self: Any, loss: Any) -> Any:
        # Not scale_wrt_gas=False: a hook of DeepSpeed's divides all the same in some stages.
        return right(self, loss * self.gradient_accumulation_steps())

    plant(DeepSpeedEngine, "backward", wrong)


def gradients_of_the_last_micro_batch_alone() -> None:
    """They are cleared in every micro batch."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine.step

    def wrong(self: Any) -> None:
        if not self.is_gradient_accumulation_boundary():
            for parameter in self.module.parameters():
                parameter.grad = None
        right(self)

    plant(DeepSpeedEngine, "step", wrong)


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


def gradients_summed_over_ranks_by_stage_3() -> None:
    import torch.distributed as dist
    from deepspeed.runtime.zero import stage3

    right = stage3.reduce_scatter_coalesced

    def wrong(*args: Any) -> Any:
        return [part.mul(dist.get_world_size()) for part in right(*args)]

    plant(stage3, "reduce_scatter_coalesced", wrong)


def gradients_not_reduced() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    plant(DeepSpeedEngine, "buffered_allreduce_fallback", lambda self, *args, **kwargs: None)


def gradients_reduced_in_bf16() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine.allreduce_bucket

    def wrong(self: Any, bucket: Any, *args: Any, **kwargs: Any) -> Any:
        return right(self, [each.bfloat16().float() for each in bucket], *args, **kwargs)

    plant(DeepSpeedEngine, "allreduce_bucket", wrong)


def gradients_reduced_over_the_tensor_ranks() -> None:
    """Not over the data parallel ranks."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine.allreduce_bucket

    def wrong(self: Any, bucket: Any, dp_group: Any, *size: Any) -> Any:
        return right(self, bucket, self.mpu.groups["tensor"], *size)

    plant(DeepSpeedEngine, "allreduce_bucket", wrong)


def data_and_tensor_ranks_confused() -> None:
    """DeepSpeed also copies the first weights from one data parallel rank to the others."""
    from models.parallel.topology import Topology

    plant(Topology, "get_data_parallel_group", lambda self: self.groups["tensor"])


def tied_weight_updated_twice() -> None:
    from launch.training import engine

    right = engine.build_engine

    def wrong(*args: Any) -> Any:
        built = right(*args)
        built.module.embedding.token.weight.register_hook(lambda gradient: 2 * gradient)
        return built

    plant(engine, "build_engine", wrong)


def weights_not_gathered_after_the_step() -> None:
    """Each rank computes on with the new weights of its own partition alone."""
    from deepspeed.runtime.zero import stage_1_and_2

    plant(stage_1_and_2, "all_gather_dp_groups", lambda **arguments: None)


def weights_rounded_to_bf16_after_each_step() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    right = DeepSpeedZeroOptimizer._optimizer_step

    def wrong(self: Any, group: int) -> None:
        right(self, group)
        master: Tensor = self.single_partition_of_fp32_groups[group]
        master.data.copy_(master.bfloat16())

    plant(DeepSpeedZeroOptimizer, "_optimizer_step", wrong)


FIRST = r"embedding\.token\.weight"
ZERO0, ZERO1 = Case("zero0", 1, overrides=(FEW_ROWS,)), Case("zero1", 1, overrides=(FEW_ROWS,))
ZERO0_ON_2, ZERO2_ON_2, ZERO3_ON_2 = (
    Case(stem, 2, overrides=(FEW_ROWS,)) for stem in ("zero0", "zero2", "zero3")
)
TENSOR_AND_DATA = Case("zero0", 4, overrides=(FEW_ROWS, "parallel.tensor=2"))
GRADIENTS, MOMENTS = "parameter gradients", "first moments"

# Where bf16 is left out, its rounding is larger than what the fault does in four steps. A wrong clip
# shows one step later than a wrong gradient: Adam's first step does not depend on its size.
FAULTS = [
    Seeded(
        gradients_not_divided_by_the_accumulation_steps,
        ZERO1,
        NORM_1,
        "backward",
        "output",
        "gradient of its output",
        more=(
            (Case("zero1", 1, "bf16"), NORM_1),
            (Case("zero3", 2), NORM_1),
            (Case("zero3", 2, "bf16"), NORM_1),
            (Case("zero1", 2, overrides=("parallel.pipeline=2",)), NORM_1),
            (Case("zero1", 2, "bf16", overrides=("parallel.pipeline=2",)), NORM_1),
        ),
    ),
    Seeded(gradients_of_the_last_micro_batch_alone, ZERO0, NORM_1, GRADIENTS, FIRST),
    Seeded(
        gradients_summed_over_ranks_by_stage_0,
        ZERO0_ON_2,
        NORM_1,
        GRADIENTS,
        FIRST,
        ranks=(0, 1),
        more=((Case("zero0", 2, "bf16"), NORM_1),),
    ),
    Seeded(
        gradients_summed_over_ranks_by_stage_2,
        ZERO2_ON_2,
        NORM_1,
        GRADIENTS,
        FIRST,
        ranks=(0, 1),
        more=((Case("zero2", 2, "bf16"), NORM_1),),
    ),
    Seeded(
        gradients_summed_over_ranks_by_stage_3, ZERO3_ON_2, NORM_1, GRADIENTS, FIRST, ranks=(0, 1)
    ),
    Seeded(
        gradients_not_reduced,
        ZERO0_ON_2,
        NORM_1,
        GRADIENTS,
        FIRST,
        ranks=(0, 1),
        more=((Case("zero0", 2, "bf16"), NORM_1),),
    ),
    Seeded(gradients_reduced_in_bf16, ZERO0_ON_2, NORM_1, GRADIENTS, FIRST, ranks=(0, 1)),
    Seeded(
        gradients_reduced_over_the_tensor_ranks,
        TENSOR_AND_DATA,
        NORM_1,
        GRADIENTS,
        FIRST,
        ranks=(0, 1, 2, 3),
    ),
    Seeded(
        data_and_tensor_ranks_confused,
        TENSOR_AND_DATA,
        LOSS_1,
        "weights before",
        FIRST,
        ranks=(1, 3),
    ),
    Seeded(
        tied_weight_updated_twice,
        ZERO1,
        NORM_1,
        GRADIENTS,
        FIRST,
        more=((Case("zero1", 1, "bf16"), NORM_1),),
    ),
    Seeded(
        weights_not_gathered_after_the_step,
        ZERO2_ON_2,
        LOSS_2,
        "forward",
        r"embedding\.token",
        "its output",
        step=2,
        ranks=(1,),
    ),
    Seeded(weights_rounded_to_bf16_after_each_step, ZERO1, LOSS_2, WEIGHTS, FIRST),
]
