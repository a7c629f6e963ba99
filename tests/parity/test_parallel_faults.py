"""Faults of tensor, pipeline and 3D parallelism, planted one at a time: parity has to see each.

None of them raises anything. `tests/unit/test_tp_faults.py` shows what each of the tensor parallel
ones does to a single layer; here they are seen in the losses, norms and weights of a run.
"""

from typing import Any

import pytest
from torch import Tensor

from tests.parity.cases import Case, Workbench
from tests.parity.kinds import OFFLOAD, PP2, SEQUENCE, TP2
from tests.parity.planting import Fault, faulty_layout, first_seen, plant
from tests.parity.test_faults import gradients_not_divided_by_the_accumulation_steps
from tests.selection import representatives


def backward_all_reduce_dropped() -> None:
    from models.parallel.collectives import _Copy

    plant(_Copy, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


def row_parallel_sum_without_autograd() -> None:
    import torch.distributed as dist

    from models.parallel import tensor_parallel

    def wrong(x: Tensor, group: Any) -> Tensor:
        summed = x.detach().clone()
        dist.all_reduce(summed, group=group)
        return summed

    plant(tensor_parallel, "reduce_from_group", wrong)


def row_parallel_sum_summed_on_the_way_back_too() -> None:
    from models.parallel import collectives, tensor_parallel

    def wrong(x: Tensor, group: Any) -> Tensor:
        return collectives.copy_to_group(collectives.reduce_from_group(x, group), group)

    plant(tensor_parallel, "reduce_from_group", wrong)


def row_bias_added_on_every_rank() -> None:
    from torch.nn.functional import linear

    from models.parallel.collectives import reduce_from_group
    from models.parallel.tensor_parallel import RowParallelLinear

    def wrong(self: RowParallelLinear, x: Tensor) -> Tensor:
        return reduce_from_group(linear(x, self.weight, self.bias), self.group)

    plant(RowParallelLinear, "forward", wrong)


def shards_not_marked_for_the_norm() -> None:
    from launch.training import engine
    from launch.training.optimizer import parameter_groups

    def wrong(model: Any) -> Any:
        """Row-parallel shards look like copies, of which one counts."""
        for name, parameter in model.named_parameters():
            if name.endswith(("mlp.down.weight", "attention.out.weight")):
                parameter.tensor_model_parallel = False
        return parameter_groups(model)

    plant(engine, "parameter_groups", wrong)


def sequence_parallel_norms_not_reduced() -> None:
    from models import norms

    plant(norms, "copy_to_group", lambda x, group: x)


def losses_of_micro_batches_summed_in_the_pipeline() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    right = PipelineEngine._aggregate_total_loss

    def wrong(self: Any) -> Any:
        return right(self) * self.micro_batches

    plant(PipelineEngine, "_aggregate_total_loss", wrong)


def tied_gradients_not_summed() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import ReduceTiedGrads

    # The engine takes its methods from this table.
    table = {**PipelineEngine._INSTRUCTION_MAP, ReduceTiedGrads: lambda self: None}
    plant(PipelineEngine, "_INSTRUCTION_MAP", table)


def tied_gradients_not_summed_where_they_are() -> None:
    from launch.training import engine

    plant(engine, "sum_tied_gradients_where_they_are", lambda engine: None)


def stage_boundary_that_detaches() -> None:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import RecvGrad

    right = PipelineEngine._exec_recv_grads

    def wrong(self: Any, buffer_id: int) -> None:
        """Nothing of the loss comes back to this stage: what it sent was cut off from the graph."""
        right(self, buffer_id)
        received = self.grad_layer
        for gradient in [received] if isinstance(received, Tensor) else received:
            if gradient.is_floating_point():
                gradient.zero_()

    table = {**PipelineEngine._INSTRUCTION_MAP, RecvGrad: wrong}
    plant(PipelineEngine, "_INSTRUCTION_MAP", table)


def marks_of_stage_0_left_as_they_were() -> None:
    from launch.training import engine

    plant(engine, "count_each_parameter_once", lambda engine, topology: None)


TOKENS, BOTH_WAYS = (TP2, SEQUENCE), (TP2, PP2)
BOTH, FP32, BF16 = ("fp32", "bf16"), ("fp32",), ("bf16",)
STEP_1, LOSS_1, LOSS_2 = "grad norm at step 1", "loss at step 1", "loss at step 2"
FAULTS = [
    (backward_all_reduce_dropped, "zero1", 2, (TP2,), BOTH, STEP_1),
    (backward_all_reduce_dropped, "zero3", 4, (TP2,), BOTH, STEP_1),
    (backward_all_reduce_dropped, "zero1", 4, BOTH_WAYS, BOTH, STEP_1),
    (row_parallel_sum_without_autograd, "zero0", 2, (TP2,), BOTH, STEP_1),
    (row_parallel_sum_summed_on_the_way_back_too, "zero2", 2, (TP2,), BOTH, STEP_1),
    (row_bias_added_on_every_rank, "zero1", 2, (TP2,), BOTH, LOSS_2),
    (row_bias_added_on_every_rank, "zero1", 4, BOTH_WAYS, BOTH, LOSS_2),
    (shards_not_marked_for_the_norm, "zero0", 2, (TP2,), BOTH, STEP_1),
    (shards_not_marked_for_the_norm, "zero1", 4, (TP2,), BOTH, STEP_1),
    (shards_not_marked_for_the_norm, "zero3", 2, (TP2,), BOTH, STEP_1),
    (shards_not_marked_for_the_norm, "zero1", 4, BOTH_WAYS, BOTH, STEP_1),
    (sequence_parallel_norms_not_reduced, "zero1", 2, TOKENS, FP32, STEP_1),
    (sequence_parallel_norms_not_reduced, "zero1", 2, TOKENS, BF16, "weights"),
    (sequence_parallel_norms_not_reduced, "zero3", 4, TOKENS, FP32, STEP_1),
    (gradients_not_divided_by_the_accumulation_steps, "zero1", 2, (PP2,), BOTH, STEP_1),
    (losses_of_micro_batches_summed_in_the_pipeline, "zero1", 2, (PP2,), BOTH, LOSS_1),
    (tied_gradients_not_summed, "zero0", 2, (PP2,), BOTH, STEP_1),
    (tied_gradients_not_summed, "zero1", 4, BOTH_WAYS, BOTH, STEP_1),
    (tied_gradients_not_summed_where_they_are, "zero1", 4, (PP2, *OFFLOAD), BF16, STEP_1),
    (stage_boundary_that_detaches, "zero1", 2, (PP2,), BOTH, STEP_1),
    (stage_boundary_that_detaches, "zero1", 4, BOTH_WAYS, BOTH, STEP_1),
    (marks_of_stage_0_left_as_they_were, "zero0", 2, (PP2,), BOTH, STEP_1),
    (marks_of_stage_0_left_as_they_were, "zero0", 4, BOTH_WAYS, BOTH, STEP_1),
]
PLANTED = [
    pytest.param(
        fault,
        Case(stem, ranks, precision, overrides=overrides),
        sign,
        id=f"{fault.__name__}-{stem}-{ranks}-{precision}",
    )
    for fault, stem, ranks, overrides, precisions, sign in FAULTS
    for precision in precisions
]


@pytest.mark.usefixtures("built_ops")
@pytest.mark.parametrize(
    ("fault", "case", "sign"), representatives(PLANTED, lambda fault, case, sign: {fault.__name__})
)
def test_fault_is_caught(fault: Fault, case: Case, sign: str, bench: Workbench) -> None:
    assert first_seen(bench.compare(case, faulty_layout, fault))[:1] == [sign]
    assert first_seen(bench.sound(case)) == []
