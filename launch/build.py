"""From a recipe to its model: whole, cut over tensor ranks, divided by ZeRO-3, or one pipeline stage."""

import contextlib
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from launch.errors import UserError
from launch.recipe import GPTModel, HFModel, Recipe
from models.first_weights import initialize, initialize_parameters
from models.gpt import GPT
from models.pipeline import GPTPipeline
from models.topology import ONE_RANK, TensorParallel, Topology


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def training_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The dtype of forward and backward that a DeepSpeed configuration asks for."""
    if ds_config.get("bf16", {}).get("enabled", False):
        return torch.bfloat16
    if ds_config.get("fp16", {}).get("enabled", False):
        return torch.float16
    return torch.float32


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """The dtype of the matrix products: as `training_dtype`, or what torch_autocast does them in."""
    autocast = ds_config.get("torch_autocast") or {}
    if autocast.get("enabled"):
        name = str(autocast.get("dtype", "bfloat16")).removeprefix("torch.")
        return torch.float16 if name in ("float16", "fp16", "half") else torch.bfloat16
    return training_dtype(ds_config)


@contextmanager
def _new_parameters(dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    # Made in their final dtype and place: a 6.7B model in fp32 would need 27 GB on the way.
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
    """The recipe's model with its first weights on one device ("meta": shapes only).

    Whole by default; with `tp`, a GPT is this rank's shard of it.

    Raises:
        UserError: where a `family: hf` model cannot be found, read or changed as asked.
    """
    spec = recipe.model
    if isinstance(spec, HFModel):
        return _build_hf(spec, recipe.train.seed, dtype, device)
    with _new_parameters(dtype, device):
        model = GPT(spec.gpt_config(), spec.checkpoint_activations, tp)
    if torch.device(device).type != "meta":
        initialize(model, recipe.train.seed)
    return model


def _build_hf(
    spec: HFModel, seed: int, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    from models.hf import HFCausalLM, from_config, from_pretrained, read_config

    try:
        config = read_config(spec.path, spec.changes)
        meta = torch.device(device).type == "meta"
        if spec.pretrained and not meta:
            model = from_pretrained(spec.path, config).to(device=device, dtype=dtype)
        else:
            # On the CPU whatever the device: its generator gives every rank and the reference the
            # same numbers.
            torch.manual_seed(seed)
            with _new_parameters(torch.float32, "meta" if meta else "cpu"):
                model = from_config(config)
            model = model.to(device=device, dtype=dtype)
        return HFCausalLM(model, spec.checkpoint_activations)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path: {spec.path} is not usable: {reason}") from None


def build_partitioned(
    recipe: Recipe, ds_config: dict[str, Any], topology: Topology, tp: TensorParallel
) -> nn.Module:
    """A GPT that is never whole on a rank: ZeRO-3 cuts each parameter as its layer is made."""
    spec = recipe.model
    assert isinstance(spec, GPTModel)

    def gather(parameter: nn.Parameter) -> AbstractContextManager[object]:
        # Each data parallel group has a first rank, and all of those write the same.
        whole: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0
        )
        return whole

    with deepspeed.zero.Init(
        config_dict_or_path=ds_config, data_parallel_group=topology.data_group, mpu=topology
    ):
        model = GPT(spec.gpt_config(), spec.checkpoint_activations, tp)
    initialize(model, recipe.train.seed, gather)
    return model


def build_pipeline(
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    topology: Topology,
    tp: TensorParallel,
) -> GPTPipeline:
    """This rank's pipeline stage of a GPT, with its first weights.

    Raises:
        UserError: where the layers cannot be cut as `parallel.partition` says.
    """
    spec = recipe.model
    assert isinstance(spec, GPTModel)
    # PipelineModule prints its settings from rank 0 (ours are said in one line elsewhere), and
    # broadcasts tied weights where autograd sees it.
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent, torch.no_grad(), _new_parameters(dtype, device):
        model = GPTPipeline(
            spec.gpt_config(),
            topology.grid,
            tp,
            recipe.parallel.partition,
            spec.checkpoint_activations,
        )
    initialize_parameters(model.canonical_parameters(), model.config, recipe.train.seed)
    return model


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, which decay with the JSON's weight_decay, and vectors (norms, biases), which do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        whole_shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(whole_shape) >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
