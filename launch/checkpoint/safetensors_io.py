"""Save the full weights of any engine under canonical names, and load them again."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch.checkpoint.full_weights import (
    canonical_names,
    full_weights,
    is_hf,
    persistent_buffers,
    whole_shapes,
)
from launch.errors import UserError

if TYPE_CHECKING:
    pass

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def save_weights(engine: DeepSpeedEngine, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Write model*.safetensors in `dtype`, 5 GB per file. Rank 0 writes; all ranks must call this.

    Persistent buffers keep their own dtype, and are in the last file. Holds the tensors of only one
    file in memory at a time. Returns the files' paths.

    Raises:
        UserError: if the disk is full or not writable.
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
    buffers = {
        name: b.to("cpu").contiguous() for name, b in persistent_buffers(engine.module).items()
    }
    last = max(waiting)
    held[last] |= buffers
    file_of |= dict.fromkeys(buffers, last)
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
        file.unlink(missing_ok=True)  # a partial file would look like the run's weights
        raise UserError(
            f"{file}: cannot write the final weights ({error}); make room, then --resume auto writes "
            "them from the last checkpoint"
        ) from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load model*.safetensors from `folder` into an unsharded model.

    Raises:
        UserError: if there are no such files, or they belong to a different model.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no model*.safetensors here; the run has not finished")
    missing: dict[str, Tensor] = {**canonical_names(model), **persistent_buffers(model)}
    for file in files:
        for name, tensor in load_file(file).items():
            parameter = missing.pop(name, None)
            if parameter is None or parameter.shape != tensor.shape:
                raise UserError(
                    f"{file}: {name} {list(tensor.shape)} is no parameter and no buffer of this model"
                )
            with torch.no_grad():
                parameter.copy_(tensor)
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} tensors are not in the files, first {next(iter(missing))}"
        )
