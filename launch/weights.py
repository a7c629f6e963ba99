"""The whole model's weights out of any engine, by their canonical names, and into one again."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import safe_get_full_fp32_param
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch.autotp import merged, whole_shape
from launch.errors import UserError
from models.gpt import GPT
from models.pipeline import GPTPipeline
from models.tp_layers import Shard

if TYPE_CHECKING:
    from models.hf import HFCausalLM

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def canonical_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the name under which they are stored: tied ones once, no wrapper's prefix.

    Of a pipeline stage, those that this rank holds, by their names in the whole model.
    """
    if isinstance(model, GPTPipeline):
        return dict(model.canonical_parameters())
    inner: Any = model.model if is_hf(model) else model
    return dict(inner.named_parameters())


def is_hf(model: nn.Module) -> "TypeGuard[HFCausalLM]":
    """Whether a model is transformers' own, in our wrapper.

    Where it is, `models.hf` is loaded already; importing it here would cost every other run the
    seconds that transformers takes.
    """
    hf = sys.modules.get("models.hf")
    return hf is not None and isinstance(model, hf.HFCausalLM)


def full_weights(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Each whole parameter in fp32 (the master weight, where one is kept), one at a time.

    Every rank must run through all of it: each item is a collective where ZeRO, tensor or pipeline
    parallelism has cut the model. The order is that of the model on one device.
    """
    masters: dict[int, Tensor] = {}
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        for weights, kept in zip(
            engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True
        ):
            masters |= {id(weight): master for weight, master in zip(weights, kept, strict=True)}

    def local(parameter: nn.Parameter) -> Tensor:
        master = masters.get(id(parameter))
        if master is None:
            master = safe_get_full_fp32_param(parameter)
        whole = (parameter if master is None else master).detach().float()
        shard: Shard | None = getattr(parameter, "shard", None)
        if shard is None:
            return merged(engine, parameter, whole)
        group = _tensor_group(engine)
        shards = [torch.empty_like(whole) for _ in range(shard.size)]
        dist.all_gather(shards, whole.contiguous(), group=group)
        return shard.merge(shards)

    held = canonical_names(engine.module)
    if isinstance(engine, PipelineEngine):
        yield from _over_stages(engine, held, local)
    else:
        for name, parameter in held.items():
            yield name, local(parameter)


def _tensor_group(engine: DeepSpeedEngine) -> dist.ProcessGroup:
    module = engine.module
    group = module.tp_group if isinstance(module, GPTPipeline) else module.tp.group
    assert group is not None
    return group


def _over_stages(
    engine: PipelineEngine,
    held: dict[str, nn.Parameter],
    local: Callable[[nn.Parameter], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter from the first stage that holds it, to all stages."""
    grid = engine.grid
    group = grid.get_pipe_parallel_group()
    holders: list[list[str]] = [[] for _ in range(engine.num_stages)]
    dist.all_gather_object(holders, list(held), group=group)
    for name, shape in whole_shapes(engine.module).items():
        stage = next(s for s, names in enumerate(holders) if name in names)
        if engine.stage_id == stage:
            whole = local(held[name]).contiguous()
        else:
            whole = torch.empty(shape, device=engine.device)
        dist.broadcast(whole, grid.stage_to_global(stage), group=group)
        yield name, whole


def whole_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the whole model by its canonical name, in its order."""
    if isinstance(model, GPT | GPTPipeline):
        with torch.device("meta"):
            whole = GPT(model.config)
        return {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    return {name: whole_shape(parameter) for name, parameter in canonical_names(model).items()}


def save_weights(engine: DeepSpeedEngine, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Write model*.safetensors in `dtype` (rank 0 writes; every rank must call), 5 GB a file.

    Only one file's tensors are in memory at a time. Returns the files' paths.

    Raises:
        UserError: where the disk is full or not writable.
    """
    shapes = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, shape in whole_shapes(engine.module).items()
    }
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda t: t.numel() * t.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    file_of = (
        plan.tensor_to_filename if plan.is_sharded else dict.fromkeys(shapes, "model.safetensors")
    )
    waiting = {file: {n for n, f in file_of.items() if f == file} for file in set(file_of.values())}
    held: dict[str, dict[str, Tensor]] = {file: {} for file in waiting}
    first = engine.global_rank == 0
    for name, tensor in full_weights(engine):
        file = file_of[name]
        if first:
            held[file][name] = tensor.to("cpu", dtype).contiguous()
        waiting[file].discard(name)
        if first and not waiting[file]:
            _write(held.pop(file), folder / file)
    if first and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    if first and is_hf(engine.module):
        engine.module.model.config.save_pretrained(folder)
    return sorted(folder / file for file in set(file_of.values()))


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        file.unlink(missing_ok=True)  # what is left of it would look like the run's weights
        raise UserError(
            f"{file}: cannot write the final weights ({error}); make room, then --resume auto writes "
            "them from the last checkpoint"
        ) from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read model*.safetensors of `folder` into a whole, unpartitioned model.

    Raises:
        UserError: where there are none, or they are not this model's.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no model*.safetensors here; the run has not finished")
    missing = canonical_names(model)
    for file in files:
        for name, tensor in load_file(file).items():
            parameter = missing.pop(name, None)
            if parameter is None or parameter.shape != tensor.shape:
                raise UserError(
                    f"{file}: {name} {list(tensor.shape)} is not a parameter of this model"
                )
            with torch.no_grad():
                parameter.copy_(tensor)
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} parameters are not in the files, first {next(iter(missing))}"
        )
