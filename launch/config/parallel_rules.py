"""Reject degrees of parallelism that a recipe's model does not support: no DeepSpeed JSON needed."""

from typing import TYPE_CHECKING

from launch.errors import UserError
from models.config import GPTConfig

if TYPE_CHECKING:
    from launch.config.schema import GPTModel, Parallel, Recipe


_OF_A_PIPELINE = {"schedule": "1f1b", "model_chunks": 1, "partition": "parameters"}


def check_parallel(recipe: "Recipe") -> None:
    """Check the model's sizes against the degrees of parallelism. Needs only the recipe.

    Raises:
        UserError: naming the key, the reason and the nearest layout.
    """
    parallel = recipe.parallel
    if parallel.pipeline == 1:
        for key, default in _OF_A_PIPELINE.items():
            if getattr(parallel, key) != default:
                raise UserError(
                    f"parallel.{key}: it orders a pipeline, and parallel.pipeline is 1; set that to "
                    "the number of stages, or take the key out"
                )
    if (parallel.schedule == "interleaved") != (parallel.model_chunks > 1):
        raise UserError(
            f"parallel.model_chunks: the interleaved schedule runs 2 or more on each stage, others 1, and "
            f"this is {parallel.model_chunks} with {parallel.schedule}; use parallel.schedule=interleaved "
            "parallel.model_chunks=2, or take both out"
        )
    if parallel.schedule == "zb-h1" and recipe.train.compile:
        raise UserError(
            "train.compile: a compiled block's backward pass computes all its gradients at once, and "
            "zb-h1 puts those of weights off; use parallel.schedule=1f1b, or train.compile=false"
        )
    _check_tensor_ranks(parallel)
    if recipe.model.family == "hf":
        _check_hf(recipe)
        return
    if parallel.pipeline > 1 or parallel.sequence:
        _check_chunks(recipe)
    if recipe.model.cpu_checkpointing and not recipe.model.checkpoint_activations:
        raise UserError(
            "model.cpu_checkpointing: it moves checkpoints, and model.checkpoint_activations is false; set "
            "that to true, or take the key out"
        )
    config = recipe.model.shape
    if parallel.tensor > 1 and recipe.train.compile:
        _check_compiled_tensor(parallel, recipe.model)
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
    if (parts := parallel.pipeline * parallel.model_chunks) > config.layers:
        raise UserError(
            f"parallel.model_chunks: {parallel.pipeline} stages of {parallel.model_chunks} chunks are "
            f"{parts} parts, more than the model's {config.layers} layers; use fewer of either"
        )
    if parallel.sequence and recipe.data.sequence_length % parallel.tensor:
        length = recipe.data.sequence_length // parallel.tensor * parallel.tensor
        raise UserError(
            f"parallel.sequence: {parallel.tensor} tensor ranks do not divide data.sequence_length "
            f"{recipe.data.sequence_length}; use {length}, or parallel.sequence=false"
        )


def _check_tensor_ranks(parallel: "Parallel") -> None:
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            "parallel.sequence: it shards the sequence over the tensor ranks, and parallel.tensor "
            "is 1; set that to 2 or more, or take the key out"
        )
    if parallel.copy_engine and parallel.sequence:
        raise UserError(
            "parallel.copy_engine: copies add up, and parallel.sequence makes the sums of tensor ranks "
            "reduce-scatters; use parallel.sequence=false, or take the key out"
        )
    if parallel.copy_engine and parallel.tensor != 2:
        raise UserError(
            f"parallel.copy_engine: copies add up the tensors of 2 ranks, and parallel.tensor is "
            f"{parallel.tensor}; use parallel.tensor=2, or take the key out"
        )


def _check_chunks(recipe: "Recipe") -> None:
    whole = "parallel.pipeline=1" if recipe.parallel.pipeline > 1 else "parallel.sequence=false"
    for key in ("mlp_chunks", "loss_chunks"):
        if getattr(recipe.model, key) > 1:
            raise UserError(
                f"model.{key}: chunks of a sequence need a rank that has it whole, from tokens to "
                f"the loss; use {whole}, or model.{key}=1"
            )


def _divides(config: GPTConfig, tensor: int) -> bool:
    if config.heads % tensor or config.ffn % tensor:
        return False
    if tensor <= config.kv_heads:
        return config.kv_heads % tensor == 0
    # Ranks that share a key/value head shard its rows.
    return tensor % config.kv_heads == 0 and config.head_dim % (tensor // config.kv_heads) == 0


def _check_compiled_tensor(parallel: "Parallel", model: "GPTModel") -> None:
    """Compiled code runs collectives in the order of the data that they pass on, and in no other.

    So it may run independent ones, such as the sums of the gradients of two norms or of two chunks, in
    another order on each rank, and each would get a part of the other.
    """
    config = model.shape
    independent = {
        "parallel.sequence=false": parallel.sequence,
        "model.qk_norm=false": config.qk_norm,
        f"parallel.tensor={config.kv_heads}": parallel.tensor > config.kv_heads,
        "model.mlp_chunks=1": model.mlp_chunks > 1,
        "model.loss_chunks=1": model.loss_chunks > 1,
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
    if parallel.copy_engine:
        raise UserError(
            "parallel.copy_engine: it is of our own layers, and DeepSpeed's AutoTP shards models of family "
            "hf; take the key out"
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
