"""Workarounds for DeepSpeed at ZeRO stage 0."""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import is_model_parallel_parameter

from models.parallel.topology import Topology


def undo_step_taken_at_construction(engine: DeepSpeedEngine) -> None:
    """Work around DeepSpeed 0.19.8 at stage 0 in bf16 or fp16 (and nowhere else).

    To allocate Adam's state, FP16_UnfusedOptimizer steps on zero gradients. That decays the weights
    once, and the first real step then has the bias correction of a second one: its update is 0.73
    times what it should be (betas 0.9, 0.95). The model's own weights are still the first ones.
    """
    wrapper = engine.optimizer
    if not isinstance(wrapper, FP16_UnfusedOptimizer):
        return
    wrapper.optimizer.state.clear()
    with torch.no_grad():
        for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)


def mark_gradients(engine: DeepSpeedEngine) -> None:
    """Work around the gradient norm of DeepSpeed 0.19.8 at stage 0 in bf16 or fp16 (and nowhere else).

    FP16_UnfusedOptimizer looks for the mark of a shard on the gradients, and only parameters have it:
    the shards of all tensor ranks but the first are left out of the norm, and of the clipping.
    """
    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        return

    def mark(parameter: Any) -> None:
        parameter.grad.tensor_model_parallel = True

    for parameter in engine.module.parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            parameter.register_post_accumulate_grad_hook(mark)


def count_each_parameter_once(engine: DeepSpeedEngine, topology: Topology) -> None:
    """Make the marks say which ranks' gradients make up the norm, at stage 0.

    DeepSpeed 0.19.8 clips there with a function that knows two cases: a marked parameter counts on
    every rank, any other on the first rank of the model alone. Under pipeline parallelism that leaves
    out the norms and biases of every stage but the first, and counts a tied weight twice.
    """
    for parameter in engine.module.parameters():
        shard = getattr(parameter, "tensor_model_parallel", False)
        copy = getattr(parameter, "ds_pipe_replicated", False)
        parameter.tensor_model_parallel = (
            shard or topology.coordinates["tensor"] == 0
        ) and not copy


def keep_norm(engine: DeepSpeedEngine) -> None:
    """At stage 0 in fp32 DeepSpeed steps with torch's optimizer and keeps no gradient norm: do so."""
    take_model_step = engine._take_model_step

    def with_norm(*arguments: Any) -> None:
        engine._global_grad_norm = _grad_norm(engine)
        take_model_step(*arguments)

    engine._take_model_step = with_norm


def _grad_norm(engine: DeepSpeedEngine) -> float:
    mpu = engine.mpu
    first = mpu is None or mpu.get_model_parallel_rank() == 0
    counted = [
        parameter.grad
        for parameter in engine.module.parameters()
        if parameter.grad is not None and (first or is_model_parallel_parameter(parameter))
    ]
    square = torch.nn.utils.get_total_norm(counted).to(engine.device).square()
    if mpu is not None:
        dist.all_reduce(square, group=mpu.get_model_parallel_group())
    return float(square.sqrt())
