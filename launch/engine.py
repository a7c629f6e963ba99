"""From a recipe to a DeepSpeed engine, whatever its layout."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from launch.autotp import check_plan, show_plan
from launch.build import (
    build_model,
    build_partitioned,
    build_pipeline,
    parameter_groups,
    training_dtype,
    zero_stage,
)
from launch.distributed import Ranks
from launch.layout import Layout
from launch.recipe import GPTModel, Recipe
from launch.schedule import learning_rate_factor
from launch.weights import is_hf
from models.gpt import Block
from models.pipeline import GPTPipeline
from models.schedules import use_schedule
from models.topology import Grid, Topology


def make_topology(recipe: Recipe, layout: Layout) -> Topology:
    """All process groups of a layout. A collective: every rank makes every group."""
    sharing = 1
    if isinstance(recipe.model, GPTModel):
        sharing = max(1, layout.tensor // recipe.model.gpt_config().kv_heads)
    return Topology(Grid(layout.tensor, layout.pipeline, layout.data), sharing)


def build_engine(
    recipe: Recipe, ds_config: dict[str, Any], ranks: Ranks, topology: Topology
) -> DeepSpeedEngine:
    """The recipe's model on DeepSpeed's engine, ready for `launch/step.py`."""
    dtype, tp = training_dtype(ds_config), topology.tensor_parallel(recipe.parallel.sequence)
    train = recipe.train
    if topology.grid.pipeline > 1:
        model: nn.Module = build_pipeline(recipe, dtype, ranks.device, topology, tp)
    elif zero_stage(ds_config) == 3 and isinstance(recipe.model, GPTModel):
        model = build_partitioned(recipe, ds_config, topology, tp)
    else:
        model = build_model(recipe, dtype, ranks.device, tp)
    if tp.size > 1 and is_hf(model):
        check_plan(model, tp.size, zero_stage(ds_config))
        show_plan(model)

    def schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(
            optimizer, lambda step: learning_rate_factor(train.schedule, step, train.steps)
        )

    engine: DeepSpeedEngine = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        config=ds_config,
        lr_scheduler=schedule,
        dist_init_required=False,
        # A PipelineModule brings its own.
        mpu=topology if tp.size > 1 and not isinstance(model, GPTPipeline) else None,
    )[0]
    _undo_step_taken_at_construction(engine)
    _mark_gradients(engine)
    if isinstance(engine, PipelineEngine):
        use_schedule(engine, recipe.parallel.schedule)
        _sum_tied_gradients_where_they_are(engine)
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        _count_each_parameter_once(engine, topology)
        _keep_norm(engine)
    if train.compile:
        _compile(engine)
    return engine


def _sum_tied_gradients_where_they_are(engine: PipelineEngine) -> None:
    """Mend DeepSpeed 0.19.8 where gradients are accumulated in fp32 beside a 16-bit model.

    There ZeRO-1 (in fp16, or offloaded; not BF16_Optimizer) moves each micro batch's gradient to
    `grad_accum`, and the pipeline engine adds up the tied copies' `grad`, which is then empty: each copy
    of a tied weight goes its own way.
    """
    if not getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return

    def reduce_tied_gradients(self: PipelineEngine) -> None:
        for weight, group in self.module.get_tied_weights_and_groups():
            dist.all_reduce(weight.grad_accum, group=group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: reduce_tied_gradients}


def _compile(engine: DeepSpeedEngine) -> None:
    if not isinstance(engine, PipelineEngine):
        engine.compile()
        return
    # What lies between the blocks of a stage is messages.
    for module in engine.module.modules():
        if isinstance(module, Block):
            module.compile()


def _undo_step_taken_at_construction(engine: DeepSpeedEngine) -> None:
    """Mend DeepSpeed 0.19.8 at stage 0 in bf16 or fp16 (and nowhere else).

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


def _mark_gradients(engine: DeepSpeedEngine) -> None:
    """Mend the gradient norm of DeepSpeed 0.19.8 at stage 0 in bf16 or fp16 (and nowhere else).

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


def _count_each_parameter_once(engine: DeepSpeedEngine, topology: Topology) -> None:
    """Make the marks say which ranks' gradients make up the norm, at stage 0.

    DeepSpeed 0.19.8 clips there with a function that knows two cases: a marked parameter counts on
    every rank, any other on the first rank of the model alone. Under pipeline parallelism that leaves
    out the norms and biases of every stage but the first, and counts a tied weight twice.
    """
    for parameter in engine.module.parameters():
        shard = getattr(parameter, "tensor_model_parallel", False)
        copy = getattr(parameter, "ds_pipe_replicated", False)
        parameter.tensor_model_parallel = (shard or topology.tensor_rank == 0) and not copy


def _keep_norm(engine: DeepSpeedEngine) -> None:
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
