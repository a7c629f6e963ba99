"""Build a recipe's model: whole, a tensor shard, partitioned by ZeRO-3, or a pipeline stage."""

import contextlib
import io
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.keep_in_fp32 import KEEP_IN_FP32_AUTO, keep_in_fp32_pattern
from torch import nn

from launch.config.schema import GPTModel, HFModel, Recipe
from launch.errors import UserError
from launch.hf.initial_weights import load_initial_weights
from models.gpt import GPT
from models.init_weights import initialize_parameters
from models.parallel.topology import ONE_RANK, TensorParallel, Topology
from models.pipeline import GPTPipeline

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def _new_parameters(dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    # Created in their final dtype and on their device: a 6.7B model in fp32 would first need 27 GB.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device | str,
    tp: TensorParallel = ONE_RANK,
) -> nn.Module:
    """The recipe's model with its initial weights on one device ("meta": shapes only).

    The model is whole by default; with `tp`, a GPT is this rank's shard.

    Raises:
        UserError: if a `family: hf` model cannot be found, read or changed as requested, or
            `model.init_from` has no weights for a GPT.
    """
    spec = recipe.model
    if isinstance(spec, HFModel):
        return _build_hf(spec, recipe.train.seed, dtype, device, recipe.data.has_documents)
    with _new_parameters(dtype, device):
        model = _gpt(spec, tp)
    if torch.device(device).type != "meta":
        _set_initial_weights(model.named_parameters(), spec, recipe.train.seed)
    return model


def _gpt(spec: GPTModel, tp: TensorParallel) -> GPT:
    return GPT(
        spec.shape,
        spec.checkpoint_activations,
        tp,
        cpu_checkpointing=spec.cpu_checkpointing,
        mlp_chunks=spec.mlp_chunks,
        loss_chunks=spec.loss_chunks,
    )


def _set_initial_weights(
    parameters: Iterable[tuple[str, nn.Parameter]], spec: GPTModel, seed: int
) -> None:
    if spec.init_from is None:
        initialize_parameters(parameters, spec.shape, seed)
    else:
        load_initial_weights(parameters, spec)


def _build_hf(
    spec: HFModel,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
    documents: bool,
) -> nn.Module:
    from models.hf import (
        HFCausalLM,
        check_causal,
        check_documents,
        from_config,
        from_pretrained,
        read_config,
    )

    try:
        config = read_config(spec.path, spec.changes)
        meta = torch.device(device).type == "meta"
        if spec.pretrained and not meta:
            model = from_pretrained(spec.path, config)
        else:
            # Always on the CPU: its generator draws the same numbers on every rank and in the
            # reference.
            torch.manual_seed(seed)
            with _new_parameters(torch.float32, "meta" if meta else "cpu"):
                model = from_config(config)
        if not meta:
            check_causal(model)
            if documents:
                check_documents(model)
        if spec.lora is not None:
            from launch.training.lora import add_adapters

            add_adapters(model, spec.path, spec.lora, seed)
        _cast_parameters(model, dtype)
        return HFCausalLM(model.to(device), spec.checkpoint_activations)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type: each model's own code checks its configuration
        # A check's message is one line below its name.
        reason = str(error.__cause__ or error).strip().splitlines()
        if reason and reason[0].startswith("model.lora"):
            raise UserError(reason[0]) from error
        raise UserError(
            f"model.path: {spec.path} is not usable: {reason[0] if reason else type(error).__name__}"
        ) from error


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters only, as DeepSpeed's engine does: rotary frequencies are buffers in fp32.

    Raises:
        ValueError: if transformers keeps parameters of this model in fp32, which DeepSpeed does not.
    """
    pattern = keep_in_fp32_pattern(model, KEEP_IN_FP32_AUTO, dtype)
    kept = [name for name, _ in model.named_parameters() if pattern and pattern.search(name)]
    if kept:
        raise ValueError(
            f"transformers keeps {kept[0]} in fp32, and DeepSpeed would not; use "
            "deepspeed.bf16.enabled=false deepspeed.torch_autocast.enabled=true"
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def build_partitioned(
    recipe: Recipe, ds_config: dict[str, Any], topology: Topology, tp: TensorParallel
) -> GPT:
    """A GPT that is never whole on a rank: ZeRO-3 partitions each layer as it is created."""
    spec = recipe.model
    assert isinstance(spec, GPTModel)

    def gather(parameter: nn.Parameter) -> AbstractContextManager[object]:
        # The first rank of each data parallel group writes; all of them write the same values.
        whole: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0
        )
        return whole

    with deepspeed.zero.Init(
        config_dict_or_path=ds_config, data_parallel_group=topology.sample_group, mpu=topology
    ):
        model = _gpt(spec, tp)
    if spec.init_from is None:
        initialize_parameters(model.named_parameters(), spec.shape, recipe.train.seed, gather)
    else:
        writes = topology.get_data_parallel_rank() == 0
        load_initial_weights(model.named_parameters(), spec, gather, writes=writes)
    return model


def build_pipeline(
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    topology: Topology,
    tp: TensorParallel,
) -> GPTPipeline:
    """This rank's pipeline stage of a GPT, with its initial weights.

    Raises:
        UserError: if the layers cannot be split into stages as `parallel.partition` says.
    """
    spec = recipe.model
    assert isinstance(spec, GPTModel)
    # PipelineModule prints its settings on rank 0 (we print ours in one line elsewhere) and
    # broadcasts tied weights in view of autograd.
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent, torch.no_grad(), _new_parameters(dtype, device):
        model = GPTPipeline(
            spec.shape,
            topology.grid,
            tp,
            recipe.parallel.partition,
            spec.checkpoint_activations,
            spec.cpu_checkpointing,
            recipe.parallel.model_chunks,
        )
    _set_initial_weights(model.canonical_parameters(), spec, recipe.train.seed)
    return model


def meta_model(recipe: Recipe) -> "nn.Module":
    """The recipe's model without weight data, for names and shapes."""
    import torch

    from launch.training.build_model import build_model

    return build_model(recipe, torch.float32, "meta")
