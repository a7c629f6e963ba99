"""ZeRO-2 and ZeRO-3: gradients that are copied before they are added, and a host that waits for them."""

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from models.parallel.gradient_sums import accumulate


def add_reduced_gradients_without_a_copy(engine: DeepSpeedEngine) -> None:
    """Add a reduced 16-bit gradient to its fp32 sum in one pass, with ZeRO-1, 2 and 3.

    Does nothing where the optimizer is on the CPU.

    Defect: DeepSpeed copies a reduced gradient to fp32 and adds the copy: 22 bytes of memory traffic for
        each weight where 10 do. These kernels run beside the backward pass and take bandwidth from it.
    Versions: DeepSpeed 0.19.8.
    Workaround: add the 16-bit gradient itself.
    Proof: test_zero_gradients.py::test_each_reduced_gradient_is_copied_before_it_is_added
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:

        def add(total: Tensor | None, gradient: Tensor) -> None:
            if total is not None:
                accumulate(total, gradient)

        optimizer._add_to_grad_partition_buffer = torch.no_grad()(add)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer:
        _add_partitions(optimizer)


def _add_partitions(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    private = "_DeepSpeedZeroOptimizer_Stage3__"
    scatter = getattr(optimizer, f"{private}avg_scatter_grads")
    sums = getattr(optimizer, f"{private}param_id_to_grad_partition")

    def scatter_in_16_bits(parameters: list[Any], dtype: torch.dtype) -> list[Tensor]:
        before = optimizer.gradient_accumulation_dtype
        optimizer.gradient_accumulation_dtype = dtype  # what it would convert to
        try:
            gradients: list[Tensor] = scatter(parameters, dtype)
        finally:
            optimizer.gradient_accumulation_dtype = before
        return gradients

    def add(parameters: list[Any], gradients: list[Tensor]) -> list[Tensor]:
        totals = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            rank = optimizer._get_param_partition_rank(parameter)
            if parameter.partition_numel() * rank < parameter.ds_numel:  # else all of it is padding
                total = sums[parameter.ds_id].narrow(0, 0, gradient.numel())
                accumulate(total, gradient, first=optimizer.micro_step_id == 0)
                totals.append(total)
                if not get_accelerator().is_synchronized_device():
                    parameter.grad.record_stream(get_accelerator().current_stream())
            parameter.grad = None
        return totals

    setattr(optimizer, f"{private}avg_scatter_grads", scatter_in_16_bits)
    optimizer.partition_grads = torch.no_grad()(add)


def wait_for_reductions_on_the_gpu(engine: DeepSpeedEngine) -> None:
    """ZeRO-3: let the host go on while the last gradients are reduced. Does nothing without GPUs.

    Defect: after each micro batch's backward pass, the host waits until the GPU has reduced all gradients.
        Then the GPU waits for the host, which runs DeepSpeed's hooks before it has a kernel for it.
    Versions: DeepSpeed 0.19.8.
    Workaround: have the GPU's stream wait. With an optimizer on the CPU the host has to wait, and does.
    Proof: test_zero_gradients.py::test_host_waits_for_reductions
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) or optimizer.offload_optimizer:
        return
    stream = optimizer.reduce_and_partition_stream
    if stream is not None:
        stream.synchronize = lambda: get_accelerator().current_stream().wait_stream(stream)


def let_nccl_divide() -> None:
    """ZeRO-3: have NCCL compute means, and not sums of gradients that a pass before it divided.

    Does nothing without NCCL.

    Defect: DeepSpeed divides each bucket by the number of ranks before it sends it: 4 bytes of memory
        traffic for each weight of each micro batch, beside the backward pass.
    Versions: DeepSpeed 0.19.8.
    Workaround: the same message with NCCL's mean, which divides as it adds.
    Proof: test_zero_gradients.py::test_buckets_are_divided_before_they_are_sent
    """
    if dist.get_backend() == "nccl":
        stage3.reduce_scatter_coalesced = _scatter_means


@torch.no_grad()
def _scatter_means(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """This rank's part of the mean of each tensor over the ranks of a group, with one message.

    A tensor of n elements is cut into parts of ceil(n / ranks); the last one may be shorter, or empty.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    widths = [math.ceil(tensor.numel() / ranks) for tensor in tensors]
    sent = []
    for at in range(ranks):
        for tensor, width in zip(tensors, widths, strict=True):
            part = tensor.view(-1)[at * width : (at + 1) * width]
            sent += [part, part.new_zeros(width - part.numel())]
    flat = torch.cat([part for part in sent if part.numel()])
    mean = flat.new_empty(sum(widths))
    dist.reduce_scatter_tensor(mean, flat, op=dist.ReduceOp.AVG, group=group)
    return [
        own[: max(0, tensor.numel() - rank * width)]
        for own, tensor, width in zip(mean.split(widths), tensors, widths, strict=True)
    ]
