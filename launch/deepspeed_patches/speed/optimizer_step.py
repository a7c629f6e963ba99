"""The optimizer step: small kernels by the hundred, which a GPU runs faster than the host starts them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, get_allgather_dtype
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def take_norms_at_once(engine: DeepSpeedEngine) -> None:
    """Compute all gradients' norms in one kernel. For ZeRO-1 to 3 with the optimizer on the GPU.

    Defect: DeepSpeed takes the norm of one gradient after the other, each with a copy to another dtype:
        two kernels for each of 292 weights of GPT 1.3B, while nothing else runs.
    Versions: DeepSpeed 0.19.8.
    Workaround: take the norms together, and let DeepSpeed combine them as if they were one gradient.
    Proof: test_optimizer_step.py::test_norms_are_taken_one_by_one
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        found = optimizer.get_grads_for_norm
        if optimizer._uses_muon:  # reads whole matrices, of which a rank may own a part
            return

        def gradients_for_norm(for_clipping: bool = False) -> Any:
            if for_clipping:  # all that the step reads
                return optimizer.fp32_groups_gradient_flat_partition
            gradients, of_experts = found()
            return _norms(gradients, torch.float32), of_experts

        optimizer.get_grads_for_norm = gradients_for_norm
        return
    zero3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer
    zero2 = isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload
    if not zero2 and not zero3:
        return
    combine = optimizer.get_grad_norm_direct

    def norm(gradients: Sequence[Tensor], parameters: Sequence[Any]) -> Tensor:
        real = [each for each in gradients if not getattr(each, "_zero_padding", False)]
        first = optimizer.model_parallel_rank == 0 or (
            zero3
            and optimizer._grad_norm_counts_every_rank(
                parameters, optimizer._get_param_partition_group(parameters[0])
            )
        )
        counted = [
            (gradient, parameter)
            for gradient, parameter in zip(real, parameters, strict=False)  # padding may follow
            if (first or is_model_parallel_parameter(parameter))
            and not getattr(parameter, "ds_pipe_replicated", False)
        ]
        total: Tensor
        if counted:
            norms = _norms([gradient for gradient, _ in counted], torch.float64)
            total = combine(norms, [counted[0][1]])
        else:
            total = combine(gradients, parameters)
        return total

    optimizer.get_grad_norm_direct = norm


def _norms(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The norms of tensors as one tensor, whose norm is that of all together."""
    if not tensors:
        return []
    return [torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))]


def look_for_overflow_once(engine: DeepSpeedEngine) -> None:
    """Find an overflow by the norm alone. For ZeRO-1 and 2 in bf16.

    Defect: DeepSpeed looks for infinities and NaN in each gradient, four kernels for each, and then takes
        the norm, which is infinite or NaN if a gradient is, and checks that too.
    Versions: DeepSpeed 0.19.8.
    Workaround: leave the first check out. A step with an overflow is skipped as before.
    Proof: test_optimizer_step.py::test_overflow_is_looked_for_twice
    """
    optimizer = engine.optimizer
    if (
        isinstance(optimizer, DeepSpeedZeroOptimizer)
        and optimizer.dtype == torch.bfloat16
        and optimizer.check_grad_overflow
        and optimizer.compute_grad_norm
        and not optimizer.cpu_offload
    ):
        optimizer.check_overflow = lambda **_: None


def gather_small_weights_at_once(engine: DeepSpeedEngine) -> None:
    """ZeRO-3: gather the weights that stay on every rank in one message, into the memory that they have.

    Defect: in each step, weights below `stage3_param_persistence_threshold` are freed one by one and
        gathered one by one: 194 messages for the norms and biases of GPT 1.3B, while nothing else runs.
    Versions: DeepSpeed 0.19.8.
    Workaround: keep them, and overwrite them with what one message brings. Not where a weight is sent in
        another dtype than its own, a second copy of it is kept on a node, or the partitions are in
        host memory: NCCL sends nothing from there, and DeepSpeed brings each to the GPU.
    Proof: test_optimizer_step.py::test_small_weights_are_gathered_one_by_one,
        test_optimizer_step.py::test_weights_in_host_memory_are_left_to_deepspeed
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) or optimizer.offload_param:
        return
    small = optimizer.persistent_parameters
    if len({id(each.ds_process_group) for each in small}) != 1 or any(
        each.ds_secondary_tensor is not None
        or get_allgather_dtype(each, each.ds_tensor) != each.ds_tensor.dtype
        for each in small
    ):
        return
    release, finish = optimizer._partition_all_parameters, optimizer._post_step

    def release_but_small() -> None:
        for each in small:
            each.ds_status = ZeroParamStatus.NOT_AVAILABLE
        release()

    def gather_and_finish(timer_names: set[str]) -> None:
        _gather_in_place(small)
        finish(timer_names)  # finds nothing left to gather

    optimizer._partition_all_parameters = release_but_small
    optimizer._post_step = gather_and_finish


@torch.no_grad()
def _gather_in_place(parameters: Sequence[Any]) -> None:
    """Write the ranks' partitions of parameters into the parameters, with one message."""
    group = parameters[0].ds_process_group
    widths = [each.ds_tensor.numel() for each in parameters]
    sent = torch.cat([each.ds_tensor.view(-1) for each in parameters])
    received = sent.new_empty(dist.get_world_size(group) * sent.numel())
    dist.all_gather_into_tensor(received, sent, group=group)
    places: list[Tensor] = []
    pieces: list[Tensor] = []
    for rank, row in enumerate(received.split(sent.numel())):
        for each, width, piece in zip(parameters, widths, row.split(widths), strict=True):
            if rank == 0 and each.data.numel() != each.ds_numel:
                each.data = torch.empty(each.ds_shape, dtype=sent.dtype, device=sent.device)
            length = min(width, each.ds_numel - rank * width)  # the last partition is padded
            if length > 0:
                places.append(each.data.view(-1).narrow(0, rank * width, length))
                pieces.append(piece.narrow(0, 0, length))
    torch._foreach_copy_(places, pieces)
    for each in parameters:
        each.ds_status = ZeroParamStatus.AVAILABLE
