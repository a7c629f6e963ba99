"""Reject layouts that a model does not support, and suggest the nearest one that works."""

from typing import TYPE_CHECKING, Any

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
from models.config import GPTConfig

if TYPE_CHECKING:
    from launch.config.layout import Layout
    from launch.config.schema import Recipe


def check_parallel(recipe: "Recipe") -> None:
    """Check the model's sizes against the degrees of parallelism. Needs only the recipe.

    Raises:
        UserError: naming the key, the reason and the nearest layout.
    """
    parallel = recipe.parallel
    if parallel.pipeline == 1:
        for key, default in (("schedule", "1f1b"), ("partition", "parameters")):
            if getattr(parallel, key) != default:
                raise UserError(
                    f"parallel.{key}: it orders a pipeline, and parallel.pipeline is 1; set that to "
                    "the number of stages, or take the key out"
                )
    if parallel.schedule == "zb-h1" and recipe.train.compile:
        raise UserError(
            "train.compile: a compiled block's backward pass computes all its gradients at once, and "
            "zb-h1 puts those of weights off; use parallel.schedule=1f1b, or train.compile=false"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            "parallel.sequence: it shards the sequence over the tensor ranks, and parallel.tensor "
            "is 1; set that to 2 or more, or take the key out"
        )
    if recipe.model.family == "hf":
        _check_hf(recipe)
        return
    config = recipe.model.shape
    if parallel.tensor > 1 and recipe.train.compile:
        _check_compiled_tensor(recipe, config)
    if not _divides(config, parallel.tensor):
        fitting = [n for n in range(1, config.heads + 1) if _divides(config, n)]
        near = sorted(fitting, key=lambda n: abs(n - parallel.tensor))[:2]
        raise UserError(
            f"parallel.tensor: {parallel.tensor} ranks do not divide the model's {config.heads} heads, "
            f"{config.kv_heads} key/value heads of {config.head_dim}, and ffn of {config.ffn}; "
            f"use {' or '.join(str(n) for n in sorted(near))}"
        )
    if parallel.pipeline > config.layers:
        raise UserError(
            f"parallel.pipeline: {parallel.pipeline} stages are more than the model's {config.layers} "
            f"layers; use {config.layers} or fewer"
        )
    if parallel.sequence and recipe.data.sequence_length % parallel.tensor:
        length = recipe.data.sequence_length // parallel.tensor * parallel.tensor
        raise UserError(
            f"parallel.sequence: {parallel.tensor} tensor ranks do not divide data.sequence_length "
            f"{recipe.data.sequence_length}; use {length}, or parallel.sequence=false"
        )


def _divides(config: GPTConfig, tensor: int) -> bool:
    if config.heads % tensor or config.ffn % tensor:
        return False
    if tensor <= config.kv_heads:
        return config.kv_heads % tensor == 0
    # Ranks that share a key/value head shard its rows.
    return tensor % config.kv_heads == 0 and config.head_dim % (tensor // config.kv_heads) == 0


def _check_compiled_tensor(recipe: "Recipe", config: GPTConfig) -> None:
    """Compiled code runs collectives in the order of the data that they pass on, and in no other.

    So it may run independent ones, such as the sums of the gradients of two norms, in another order
    on each rank, and each would get a part of the other.
    """
    parallel = recipe.parallel
    independent = {
        "parallel.sequence=false": parallel.sequence,
        "model.qk_norm=false": config.qk_norm,
        f"parallel.tensor={config.kv_heads}": parallel.tensor > config.kv_heads,
    }
    for remedy, needed in independent.items():
        if needed:
            raise UserError(
                "train.compile: these tensor ranks run collectives that do not depend on each other, which "
                f"each rank's compiled code may order otherwise; use {remedy}, or train.compile=false"
            )
    if config.dropout:
        raise UserError(
            "train.compile: with tensor ranks, dropout masks come from generators that cannot be compiled, "
            "and nothing checks them; use model.dropout=0.0, or train.compile=false"
        )


def _check_hf(recipe: "Recipe") -> None:
    parallel = recipe.parallel
    if parallel.pipeline > 1:
        raise UserError(
            "parallel.pipeline: stages are made of our own blocks, and model.family is hf; "
            "use parallel.tensor, or a ds_configs/zero3*.json, which shards any model over the ranks"
        )
    if parallel.sequence:
        raise UserError(
            "parallel.sequence: DeepSpeed's AutoTP, which shards models of family hf, leaves the sequence "
            "whole; take the key out"
        )
    if getattr(recipe.model, "lora", None) is not None:
        _check_lora(recipe)
    if parallel.tensor > 1 and recipe.train.compile:
        raise UserError(
            "train.compile: the collectives of DeepSpeed's AutoTP, which shards models of family hf, are "
            "not checked in compiled code; use train.compile=false, or parallel.tensor=1"
        )


def _check_lora(recipe: "Recipe") -> None:
    if recipe.parallel.tensor > 1:
        raise UserError(
            "model.lora: nothing checks adapters of layers that DeepSpeed's AutoTP has sharded; use "
            "parallel.tensor=1 with a ds_configs/zero3*.json, which shards any model over the ranks"
        )
    if recipe.train.compile:
        raise UserError(
            "train.compile: nothing checks adapters (model.lora) in compiled code; use train.compile=false"
        )


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
    if zero_stage(config) == 3 and recipe.train.compile:
        _check_compiled_zero3(recipe, zero)
    if layout.grid["tensor"] > 1:
        _check_tensor(config)
    if layout.grid["pipeline"] > 1:
        _check_pipeline(recipe, config, layout)
    _check_unchecked(config)


# What computes something else than one device, or runs on GPUs alone, and has no check here.
_UNCHECKED = {
    "zero_optimization.zero_quantized_weights": "it gathers weights in 8 bits, on GPUs alone, and",
    "zero_optimization.zero_quantized_gradients": "it sums gradients in 4 bits, on GPUs alone, and",
    "zero_optimization.zenflow": "it has its own accumulation, keeps moments that no checkpoint holds, and",
    "zero_optimization.offload_optimizer.super_offload": "it steps ahead, on GPUs alone, and",
    "compile.deepcompile": "its passes run on GPUs alone, and",
}


def _check_unchecked(config: dict[str, Any]) -> None:
    for key, why in _UNCHECKED.items():
        *path, name = key.split(".")
        found = config
        for part in path:
            found = block(found, part)
        if found.get(name):
            raise UserError(f"{key}: {why} nothing checks it; take the key out")


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


def _check_compiled_zero3(recipe: "Recipe", zero: dict[str, Any]) -> None:
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
    if recipe.parallel.sequence:
        for key in ("pipe_partitioned", "grad_partitioned"):
            if settings.get(key):
                raise UserError(
                    f"pipeline.{key}: with parallel.sequence, what stages send is sharded over the tensor "
                    "ranks already; take the key out"
                )
    model: Any = recipe.model
    try:
        bounds = stage_bounds(model.shape, layout.grid["pipeline"], recipe.parallel.partition)
    except ValueError as error:
        raise UserError(
            f"parallel.partition: {error}; use parameters, flops, uniform or type:block, or fewer stages"
        ) from None
    # What a rank then has is counted elsewhere: a norm on tensor rank 0, tied weights on stage 0.
    without_block = bounds[-2] >= model.shape.layers + 2
    without_norm = bounds[-2] > model.shape.layers + 2
    counts_none = without_norm or (without_block and layout.grid["tensor"] > 1)
    if counts_none and model.shape.tied and low == "bf16":
        raise UserError(
            "parallel.partition: the last stage has no block, and DeepSpeed's BF16_Optimizer stops on "
            "ranks that have no gradient; use another partition, model.tied=false, or fewer stages"
        )
