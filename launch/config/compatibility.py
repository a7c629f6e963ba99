"""Reject combinations of a recipe and its DeepSpeed JSON that do not compose, and name what does."""

from typing import TYPE_CHECKING, Any

from launch.config.layout import compiled_as_whole
from launch.ds_json.view import (
    accumulation_dtype,
    block,
    dtype_name,
    is_enabled,
    optimizer_block,
    zero_block,
    zero_stage,
)
from launch.errors import UserError

if TYPE_CHECKING:
    from launch.config.layout import Layout
    from launch.config.schema import Recipe


def check_composition(recipe: "Recipe", config: dict[str, Any], layout: "Layout") -> None:
    """Check the combination of the recipe and the resolved JSON.

    Raises:
        UserError: naming the key, the reason and the nearest layout.
    """
    zero = zero_block(config)
    if zero_stage(config) == 0 and is_enabled(config, "fp16"):
        # Adam hides it but for its eps, which small gradients then do not exceed. Proof:
        # test_rejected.py::test_fp16_at_stage_0_scales_no_loss
        raise UserError(
            "fp16.enabled: at ZeRO stage 0 DeepSpeed divides gradients by the loss scale, and never "
            "multiplies the loss by it; use deepspeed.config=ds_configs/zero1_fp16.json"
        )
    if block(config, "fp16").get("fp16_master_weights_and_grads"):
        raise UserError(
            "fp16.fp16_master_weights_and_grads: nothing checks master weights in fp16; take the key out, "
            "or use bf16, which deepspeed.config=ds_configs/zero2_bf16_states.json has"
        )
    if optimizer_block(config)[0].lower() == "muon":
        _check_muon(recipe, config, layout)
    if zero_stage(config) == 3:
        _check_zero3(recipe, zero)
    if recipe.train.cuda_graphs:
        _check_cuda_graphs(recipe, layout, zero_stage(config))
    if layout.grid["tensor"] > 1:
        _check_tensor(config)
    if layout.grid["pipeline"] > 1:
        _check_pipeline(recipe, config, layout)
    _check_left_out(config)


# What computes something else than one device, does not work or does not pay (recipes/SPEED.md). ZenFlow's
# proof: test_rejected.py::test_zenflow_transposes_matrices_and_steps_in_each_micro_batch
_LEFT_OUT = {
    "zero_optimization.zero_quantized_weights": "it gathers weights in 8 bits, and nothing checks it",
    "zero_optimization.zero_quantized_gradients": "it sums gradients in 4 bits, and nothing checks it",
    "zero_optimization.zenflow": "it transposes each matrix's weights, and steps in every micro batch",
    "zero_optimization.offload_optimizer.super_offload": "it was slower than offload without it",
    "compile.deepcompile": "with torch 2.11, models did not get through its compile passes",
}


def _check_left_out(config: dict[str, Any]) -> None:
    for key, why in _LEFT_OUT.items():
        *path, name = key.split(".")
        found = config
        for part in path:
            found = block(found, part)
        if found.get(name):
            raise UserError(f"{key}: {why}; take the key out")


def _check_muon(recipe: "Recipe", config: dict[str, Any], layout: "Layout") -> None:
    if is_enabled(config, "fp16"):
        raise UserError(
            "optimizer.type: DeepSpeed's Muon keeps its momentum in the loss scale of the step that made "
            "it, and is wrong when the scale moves (DEEPSPEED_VERSIONS.md); use bf16"
        )
    if layout.grid["tensor"] > 1 or layout.grid["pipeline"] > 1:
        raise UserError(
            "optimizer.type: Muon makes whole matrices orthogonal, and picks them by the names that they "
            "have on one device; use parallel.tensor=1 and parallel.pipeline=1, or AdamW"
        )
    if recipe.model.family == "hf" or not recipe.model.shape.tied:
        raise UserError(
            "optimizer.type: DeepSpeed gives Muon every matrix whose name has neither embed nor lm_head, "
            "an output projection with them; use family gpt with model.tied=true, or AdamW"
        )
    low, wide = is_enabled(config, "bf16"), dtype_name(accumulation_dtype(config)) == "fp32"
    if (zero_stage(config), low, wide) not in ((0, False, wide), (1, True, True)):
        raise UserError(
            "optimizer.type: here DeepSpeed clips what Muon makes of the gradients in their place, and "
            "shows its norm; use deepspeed.config=ds_configs/zero1.json in bf16, or zero0.json"
        )


def _check_zero3(recipe: "Recipe", zero: dict[str, Any]) -> None:
    # Proof: test_rejected.py::test_modules_gathered_whole_for_their_size_stop_the_backward_pass
    for key in ("stage3_module_granularity_threshold", "module_granularity_threshold"):
        if zero.get(key):
            raise UserError(
                f"zero_optimization.{key}: DeepSpeed frees the weights of the modules below it so that the "
                "backward pass stops; take the key out, or name the modules' classes in leaf_module"
            )
    if not recipe.train.compile:
        return
    if recipe.model.family == "hf":
        raise UserError(
            "train.compile: under ZeRO-3 only models of family gpt are compiled, and this is family hf; "
            "use train.compile=false, or deepspeed.config=ds_configs/zero2.json"
        )
    if zero.get("memory_efficient_linear", False):
        raise UserError(
            "zero_optimization.memory_efficient_linear: with train.compile, torch 2.11 loses the gradients "
            "of that linear layer's weights; set it to false, or use train.compile=false"
        )


def _check_cuda_graphs(recipe: "Recipe", layout: "Layout", stage: int) -> None:
    """A graph has the addresses of its tensors, and is of what torch.compile sees as one."""
    if not recipe.train.compile:
        raise UserError(
            "train.cuda_graphs: they record compiled code, and train.compile is false; set that to true, "
            "or take the key out"
        )
    if recipe.model.family == "hf":
        raise UserError(
            "train.cuda_graphs: nothing checks them with models of family hf; take the key out"
        )
    if not compiled_as_whole(layout.grid, stage, recipe.model.cpu_checkpointing):
        raise UserError(
            "train.cuda_graphs: they record a model that is compiled as a whole, and this layout compiles "
            "each block by itself; take the key out, or use deepspeed.config=ds_configs/zero1.json without "
            "parallel.pipeline and model.cpu_checkpointing"
        )


def _check_tensor(config: dict[str, Any]) -> None:
    if "tensor_parallel" in config:
        raise UserError(
            "tensor_parallel: the recipe's parallel.tensor decides it; take the block out of the JSON"
        )
    zero = zero_block(config)
    # With the first key, weights were 15 to 25% off after four steps; the second forms its groups
    # the same way. Proof:
    # test_rejected.py::test_hpz_mixes_the_shards_of_tensor_ranks
    for key, without in (("zero_hpz_partition_size", 1), ("zero_quantized_gradients", False)):
        if zero.get(key, without) != without:
            raise UserError(
                f"zero_optimization.{key}: it makes groups of neighbouring ranks, and those hold "
                "different shards with parallel.tensor above 1; take the key out"
            )


def _check_pipeline(recipe: "Recipe", config: dict[str, Any], layout: "Layout") -> None:
    from models.pipeline_stages import stage_bounds

    stage = zero_stage(config)
    if stage in (2, 3):
        raise UserError(
            f"parallel.pipeline: DeepSpeed runs a pipeline with ZeRO-0 or 1, and this is stage {stage}: "
            "gradients have to be whole until all micro batches are through; use "
            f"deepspeed.config=ds_configs/zero1.json, or parallel.pipeline=1"
        )
    low = next((n for n in ("bf16", "fp16") if is_enabled(config, n)), None)
    if stage == 0 and low:
        raise UserError(
            f"{low}.enabled: a pipeline at ZeRO stage 0 would add up gradients in {low}; use "
            "deepspeed.config=ds_configs/zero1.json, or torch_autocast"
        )
    settings = block(config, "pipeline")
    if settings.get("activation_checkpoint_interval"):
        raise UserError(
            "pipeline.activation_checkpoint_interval: use model.checkpoint_activations, which does it "
            "in every layout"
        )
    # Both default to true if and only if the tensor degree is above 1. Proof:
    # test_rejected.py::test_pipe_partitioned_without_grad_partitioned_fails
    cut = [
        bool(settings.get(k, layout.grid["tensor"] > 1))
        for k in ("pipe_partitioned", "grad_partitioned")
    ]
    if cut[0] != cut[1] and not recipe.parallel.sequence:
        raise UserError(
            "pipeline: with pipe_partitioned and grad_partitioned unequal, DeepSpeed stops or hangs; "
            "set both to the same value, or take both out"
        )
    chunks, stages = recipe.parallel.model_chunks, layout.grid["pipeline"]
    if recipe.parallel.sequence or chunks > 1:
        reason = (
            "with parallel.sequence, what stages send is sharded over the tensor ranks already"
            if recipe.parallel.sequence
            else "the engine sends no messages between stages of several model chunks"
        )
        for key in ("pipe_partitioned", "grad_partitioned"):
            if settings.get(key):
                raise UserError(f"pipeline.{key}: {reason}; take the key out")
    if chunks > 1 and layout.accumulation % stages:
        up = -(-layout.accumulation // stages) * stages * layout.micro_batch * layout.grid["data"]
        raise UserError(
            f"parallel.schedule: interleaved takes micro batches in groups of {stages}, one a stage, and "
            f"a step has {layout.accumulation}; use train.global_batch_size={up}, or "
            "parallel.schedule=1f1b parallel.model_chunks=1"
        )
    model: Any = recipe.model
    try:
        bounds = stage_bounds(model.shape, stages * chunks, recipe.parallel.partition)
    except ValueError as error:
        raise UserError(
            f"parallel.partition: {error}; use parameters, flops, uniform or type:block, or fewer stages"
        ) from None
    # What a rank then has is counted elsewhere: a norm on tensor rank 0, tied weights on stage 0. With
    # several chunks, the last stage has blocks in those before.
    without_block = chunks == 1 and bounds[-2] >= model.shape.layers + 2
    without_norm = chunks == 1 and bounds[-2] > model.shape.layers + 2
    counts_none = without_norm or (without_block and layout.grid["tensor"] > 1)
    if counts_none and model.shape.tied and low == "bf16":
        raise UserError(
            "parallel.partition: the last stage has no block, and DeepSpeed's BF16_Optimizer stops on "
            "ranks that have no gradient; use another partition, model.tied=false, or fewer stages"
        )
