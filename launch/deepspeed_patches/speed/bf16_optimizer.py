"""BF16_Optimizer: gradients that are copied, cleared and rounded for nothing, or while nothing is sent."""

from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from models.parallel.gradient_sums import accumulate

# Elements of a message: large enough for NCCL's full speed.
PIECE = 64 * 2**20


def add_gradients_without_a_copy(engine: DeepSpeedEngine) -> None:
    """Add a bf16 gradient to its fp32 sum in one pass. Does nothing for other optimizers.

    Defect: BF16_Optimizer copies each micro batch's gradients to fp32 and adds the copy: 22 bytes of
        memory traffic for each weight where 10 do. GPT 1.3B lost 1.6% of its speed on an H100. It also
        sets the sums to zero twice in a step, and adds the first micro batch's gradients to the zeros.
    Versions: DeepSpeed 0.19.8.
    Workaround: add the bf16 gradient itself, and begin each sum with the first one. Only a weight that
        has got no gradient gets zeros, before the sums are used.
    Proof: test_bf16_optimizer.py::test_each_gradient_is_copied_before_it_is_added
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        return
    has_gradient = optimizer.fp32_groups_has_gradients
    complete = False

    def add(parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][index]
        accumulate(total, parameter.grad, first=not has_gradient[group][index])
        parameter._hp_grad = total
        has_gradient[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    def forget() -> None:
        nonlocal complete
        complete = False
        for group in has_gradient:
            group[:] = [False] * len(group)

    def complete_sums() -> None:
        # Once a step: a weight without a gradient here may get another rank's when they are reduced.
        nonlocal complete
        if complete:
            return
        complete = True
        for has, totals in zip(has_gradient, optimizer.fp32_groups_gradients, strict=True):
            for there, total in zip(has, totals, strict=True):
                if not there:
                    total.zero_()

    def with_complete_sums(function: Any) -> Any:
        @wraps(function)
        def use(*arguments: Any, **settings: Any) -> Any:
            complete_sums()
            return function(*arguments, **settings)

        return torch.no_grad()(use)

    optimizer._update_hp_grad = torch.no_grad()(add)
    optimizer.clear_hp_grads = forget
    optimizer.get_grads_for_reduction = with_complete_sums(optimizer.get_grads_for_reduction)
    optimizer.step = with_complete_sums(optimizer.step)


def reduce_sums_in_pieces(engine: DeepSpeedEngine) -> None:
    """Reduce the fp32 sums a piece at a time, from where they lie. Does nothing for other optimizers.

    Defect: before an all-reduce, DeepSpeed rounds the fp32 sums to bf16, all at once, and then sends them;
        after it, it divides them, widens them, and copies them once more. Nothing of this runs beside the
        message: 4 ms of a step of GPT 1.3B on H200s, and 2.6 GB. With one data parallel rank nothing is
        sent, and they are rounded all the same: 7 ms on an H100, and the digits that `grad_accum_dtype` is
        to keep.
    Versions: DeepSpeed 0.19.8.
    Workaround: while one piece is on its way, round the next and widen the one before. Leave the sums as
        they are with one data parallel rank. Not where the JSON has gradients divided before they are sent.
    Proof: test_bf16_optimizer.py::test_sums_are_copied_as_a_whole,
        test_bf16_optimizer.py::test_one_rank_rounds_its_gradients
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        return
    group = optimizer.dp_process_group
    ranks = dist.get_world_size(group)
    if ranks == 1:
        engine.buffered_allreduce_fallback = lambda **_: None
        return
    divides_after = engine.gradient_average and engine.postscale_gradients()
    if not divides_after or engine.gradient_predivide_factor() != 1.0:
        return

    @torch.no_grad()
    def reduce(**_: Any) -> None:
        sums, _of_experts = optimizer.get_grads_for_reduction()
        before: tuple[Tensor, Tensor, Any] | None = None
        for piece in (piece for each in sums for piece in each.split(PIECE)):
            message = piece.to(engine.communication_data_type, copy=True)
            work = dist.all_reduce(message, group=group, async_op=True)
            if before:
                _receive(*before, ranks)
            before = piece, message, work
        if before:
            _receive(*before, ranks)

    engine.buffered_allreduce_fallback = reduce


def _receive(piece: Tensor, message: Tensor, work: Any, ranks: int) -> None:
    work.wait()
    piece.copy_(message.mul_(1.0 / ranks))
