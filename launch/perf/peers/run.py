"""Which peers can train a recipe, and one of them on a rank."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launch.config.load import recipe_from_dict
from launch.config.resolve import merge
from launch.config.schema import GPTModel, Recipe
from launch.ds_json.view import is_enabled
from launch.errors import UserError
from launch.paths import ROOT
from launch.perf.peers import PEERS


def check_names(names: Sequence[str], where: str = "--peers") -> None:
    """Check names of peers.

    Raises:
        UserError: for one that is not known; it lists those that are.
    """
    for name in names:
        if name not in PEERS:
            raise UserError(f"{where}: '{name}' is not known; choose from: {', '.join(PEERS)}")


def with_keys(ds_config: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A JSON with `KEY=VALUE` merged into it, which no linter has seen; null takes a key out.

    Raises:
        UserError: for one that is written otherwise.
    """
    for key in keys:
        if "=" not in key:
            raise UserError(f"json.{key}: write json.KEY=VALUE")
    try:
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(list(keys)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"json.{' json.'.join(keys)}: {error}") from None
    assert isinstance(changes, dict)
    return merge(ds_config, {str(key): value for key, value in changes.items()})


def why_not(name: str, recipe: Recipe, ds_config: dict[str, Any], ranks: int) -> str | None:
    """Why a peer cannot train a recipe, with its resolved JSON, on `ranks` ranks; None if it can."""
    if reason := _of_another_model(recipe):
        return f"the peers train a GPT-2, and {reason}"
    if is_enabled(ds_config, "fp16") or is_enabled(ds_config, "torch_autocast"):
        return "the peers train in bf16 or fp32"
    parallel = recipe.parallel
    if name == "megatron_core":
        return _of_megatron(recipe, ranks)
    if parallel.pipeline > 1:
        return "it has no pipeline, and parallel.pipeline is above 1"
    if name == "dtensor":
        if parallel.tensor == 1:
            return "it splits the layers over tensor ranks, and parallel.tensor is 1"
        if parallel.tensor != ranks:
            return f"all its ranks are one tensor group, and {ranks} is not parallel.tensor"
        if recipe.model.family == "gpt" and recipe.model.shape.vocab % ranks:
            return "the vocabulary does not divide over the ranks"
    elif parallel.tensor > 1:
        return "its ranks have whole layers, and parallel.tensor is above 1"
    if name == "hf_trainer":
        return _of_hf_trainer(recipe)
    return None


def _of_hf_trainer(recipe: Recipe) -> str | None:
    config = Path(recipe.deepspeed["config"])
    if not (ROOT / "ds_configs" / "hf" / config.name).is_file():
        return f"{config} has no twin in ds_configs/hf"
    if recipe.model.family == "gpt" and not recipe.model.shape.bias:
        return "transformers' GPT-2 has biases, and model.bias is false"
    return None


def _of_megatron(recipe: Recipe, ranks: int) -> str | None:
    if importlib.util.find_spec("megatron") is None:
        return "it is not installed: pip install megatron-core"
    model, stages = recipe.model, recipe.parallel.pipeline
    if isinstance(model, GPTModel):
        if model.shape.vocab % recipe.parallel.tensor:
            return "the vocabulary does not divide over the tensor ranks"
        if stages > 2 and model.shape.layers % stages:
            return f"{stages} stages do not divide the {model.shape.layers} layers"
        if not model.shape.bias:
            return "its LayerNorm and layers have biases, and model.bias is false"
    import torch

    return None if torch.cuda.is_available() else "it needs GPUs"


def _of_another_model(recipe: Recipe) -> str | None:
    if not isinstance(recipe.model, GPTModel):
        return "model.family is hf"
    shape = recipe.model.shape
    wanted = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
    for key, value in wanted.items():
        if getattr(shape, key) != value:
            return f"model.{key} is {getattr(shape, key)}"
    if shape.kv_heads != shape.heads:
        return "model.kv_heads is below model.heads"
    if recipe.model.init_from:
        return "model.init_from is set"
    if recipe.model.checkpoint_activations:
        return "model.checkpoint_activations is set"
    for key in ("loss_chunks", "mlp_chunks"):
        if getattr(recipe.model, key) > 1:
            return f"model.{key} is set"
    if recipe.data.has_documents:
        return "a row of the data holds several documents"
    return None


def measure_peer(
    values: dict[str, Any], trace: str | None, name: str, json_keys: Sequence[str] = ()
) -> dict[str, Any]:
    """Time a peer; every rank calls it.

    Args:
        values: as of `launch.perf.bench.measure.measure_plain`.
        trace: likewise.
        name: of `PEERS`.
        json_keys: for its DeepSpeed JSON, see `with_keys`.

    Raises:
        UserError: as `launch/train.py`.
    """
    from launch.runtime.process_group import prepare_environment

    prepare_environment()

    import torch
    import torch.distributed as dist

    from launch.ops.builder import build_ops, ops_needed
    from launch.perf.bench.measure import measured_by, trace_file, use_threads
    from launch.perf.bench.watch import Watch
    from launch.perf.peers.job import Job
    from launch.runtime.process_group import init_process_group
    from launch.training.setup import plan_run

    use_threads()
    recipe = recipe_from_dict(values)
    if name == "megatron_core" and recipe.parallel.tensor > 1:
        # As Megatron asks for, so that a collective starts before the layer that it is to overlap with.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    plan = plan_run(recipe, int(os.environ["WORLD_SIZE"]))
    plan = replace(plan, ds_config=with_keys(plan.ds_config, json_keys))
    build_ops(ops_needed(plan.ds_config), print)
    ranks = init_process_group()
    watch = Watch(ranks.device, plan.recipe.train.steps, trace_file(trace, ranks.rank))
    job = Job(plan, ranks, watch)
    importlib.import_module(f"launch.perf.peers.{name}").train(job)
    losses = torch.stack(job.losses)
    dist.all_reduce(losses)
    return measured_by(watch, (losses / ranks.world_size).tolist(), [ranks.device])
