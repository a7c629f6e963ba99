"""Build a recipe's DeepSpeed engine, for any layout."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from launch.checkpoint.full_weights import is_hf
from launch.config.layout import Layout
from launch.config.schema import GPTModel, Recipe
from launch.deepspeed_patches.autocast import keep_tied_parameters_in_their_dtype
from launch.deepspeed_patches.autotp import check_plan, expose_tp_plan
from launch.deepspeed_patches.model_chunks import run_model_chunks
from launch.deepspeed_patches.pipeline import sum_tied_gradients_where_they_are, use_schedule
from launch.deepspeed_patches.speed import apply as speed
from launch.deepspeed_patches.stage0 import (
    count_each_parameter_once,
    keep_grad_norm,
    mark_gradients,
    undo_step_taken_at_construction,
)
from launch.deepspeed_patches.startup import import_muon_uncompiled, vendor_from_proc
from launch.ds_json.view import optimizer_block, training_dtype, zero_stage
from launch.errors import UserError
from launch.runtime.process_group import RankInfo
from launch.training.build_model import build_model, build_partitioned, build_pipeline
from launch.training.compile import compile_engine, gather_whole_blocks
from launch.training.lr_schedule import learning_rate_factor
from launch.training.optimizer import keep_compiler_unloaded, parameter_groups
from models.parallel.topology import Topology
from models.pipeline import GPTPipeline


def make_topology(recipe: Recipe, layout: Layout) -> Topology:
    """All process groups of a layout. Collective: every rank creates every group.

    Raises:
        UserError: if `parallel.copy_engine` asks for what these GPUs cannot do.
    """
    sharing, activation_bytes = 1, 0
    if isinstance(recipe.model, GPTModel):
        shape = recipe.model.shape
        sharing = max(1, layout.grid["tensor"] // shape.kv_heads)
        tokens = layout.micro_batch * recipe.data.sequence_length
        activation_bytes = tokens * shape.hidden * torch.float32.itemsize
    parallel = recipe.parallel
    topology = Topology(layout.grid, sharing, parallel.model_chunks > 1)
    if parallel.copy_engine and torch.cuda.is_available():
        try:
            topology.sum_by_copies(activation_bytes)
        except RuntimeError as error:
            raise UserError(
                "parallel.copy_engine: the GPUs of the tensor ranks do not read each other's memory "
                f"({str(error).splitlines()[0]}); use parallel.copy_engine=false"
            ) from None
    return topology


def build_engine(
    recipe: Recipe, ds_config: dict[str, Any], ranks: RankInfo, topology: Topology
) -> DeepSpeedEngine:
    """The recipe's model on DeepSpeed's engine, ready for `launch/training/train_step.py`."""
    dtype, tp = training_dtype(ds_config), topology.tensor_parallel(recipe.parallel.sequence)
    train = recipe.train
    if topology.grid["pipeline"] > 1:
        model: nn.Module = build_pipeline(recipe, dtype, ranks.device, topology, tp)
    elif zero_stage(ds_config) == 3 and isinstance(recipe.model, GPTModel):
        model = build_partitioned(recipe, ds_config, topology, tp)
        gather_whole_blocks(model)
    else:
        model = build_model(recipe, dtype, ranks.device, tp)
    if tp.size > 1 and is_hf(model):
        check_plan(model, tp.size, zero_stage(ds_config))
        expose_tp_plan(model)

    def schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(
            optimizer, lambda step: learning_rate_factor(train.schedule, step, train.steps)
        )

    if optimizer_block(ds_config)[0].lower() != "muon" or not train.compile:
        import_muon_uncompiled()
    if not train.compile:
        keep_compiler_unloaded()
    keep_tied_parameters_in_their_dtype()
    speed.before_engine()
    with vendor_from_proc():
        engine: DeepSpeedEngine = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model),
            config=ds_config,
            lr_scheduler=schedule,
            dist_init_required=False,
            # A PipelineModule brings its own.
            mpu=topology if tp.size > 1 and not isinstance(model, GPTPipeline) else None,
        )[0]
    undo_step_taken_at_construction(engine)
    speed.on_engine(engine)
    mark_gradients(engine)
    if isinstance(engine, PipelineEngine):
        use_schedule(engine, recipe.parallel.schedule)
        if topology.ring is not None:
            run_model_chunks(engine, topology.ring)
        sum_tied_gradients_where_they_are(engine)
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        count_each_parameter_once(engine, topology)
        keep_grad_norm(engine)
    if train.compile:
        compile_engine(engine, topology.grid, train.cuda_graphs)
    return engine
