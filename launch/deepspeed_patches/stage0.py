"""ZeRO stage 0: a step too many, and gradient norms that are missing or leave parameters out."""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import is_model_parallel_parameter

from models.parallel.topology import Topology


def undo_step_taken_at_construction(engine: DeepSpeedEngine) -> None:
    """Undo the optimizer step that an engine takes while it is built. Does nothing where none is taken.

    Defect: at stage 0 in bf16 or fp16, FP16_UnfusedOptimizer steps on zero gradients to allocate Adam's
        state. That decays the master weights once, and the first real step has the bias correction of
        a second one: its update is 0.73 of what it should be (betas 0.9 and 0.95).
    Versions: DeepSpeed 0.19.8.
    Workaround: clear the optimizer's state, and copy the master weights from the model again.
    Proof: test_stage0.py::test_optimizer_steps_at_construction
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
    """Mark the gradients of shards as shards. Does nothing but at stage 0 in bf16 or fp16.

    Defect: FP16_UnfusedOptimizer looks for the mark of a shard (`tensor_model_parallel`) on gradients,
        and only parameters have it. Norm and clipping leave out the shards of all tensor ranks but
        the first: the norm is 5 to 21% low.
    Versions: DeepSpeed 0.19.8.
    Workaround: copy the mark to each gradient when it has been accumulated.
    Proof: test_stage0.py::test_bf16_norm_leaves_out_shards
    """
    if not isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        return

    def mark(parameter: Any) -> None:
        parameter.grad.tensor_model_parallel = True

    for parameter in engine.module.parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            parameter.register_post_accumulate_grad_hook(mark)


def count_each_parameter_once(engine: DeepSpeedEngine, topology: Topology) -> None:
    """Mark what this rank counts in the norm of the whole model. For stage 0 in fp32 or autocast.

    Defect: DeepSpeed clips on a norm that counts a parameter with the mark of a shard on every rank, and
        any other on the first rank of the model alone. In a pipeline it leaves out norms and biases of
        all stages but the first, and counts a tied weight twice.
    Versions: DeepSpeed 0.19.8.
    Workaround: set the mark where this rank is the one, or one of those, that should count.
    Proof: test_stage0.py::test_pipeline_clips_on_the_norm_of_the_first_stage,
        test_stage0.py::test_pipeline_counts_a_tied_weight_twice
    """
    for parameter in engine.module.parameters():
        shard = getattr(parameter, "tensor_model_parallel", False)
        copy = getattr(parameter, "ds_pipe_replicated", False)
        parameter.tensor_model_parallel = (
            shard or topology.coordinates["tensor"] == 0
        ) and not copy


def keep_grad_norm(engine: DeepSpeedEngine) -> None:
    """Have `engine.get_global_grad_norm()` return the norm before clipping, as at other stages.

    Defect: at stage 0 in fp32 or autocast the engine steps with torch's optimizer and keeps no norm.
    Versions: DeepSpeed 0.19.8.
    Workaround: compute it before each step. Call `count_each_parameter_once` first.
    Proof: test_stage0.py::test_fp32_keeps_no_norm
    """
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
