"""A run's weights as a folder that transformers opens without our code."""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from launch.checkpoint.safetensors_io import SHARD_BYTES
from launch.config.schema import GPTModel, HFModel
from launch.errors import UserError
from launch.hf.config import to_transformers
from launch.hf.model_card import write_card
from launch.hf.read_weights import Weights
from launch.hf.tensors import correspondences
from launch.hf.tokenizer_files import export_tokenizer
from launch.hf.write_weights import SafetensorsWriter, Spec, new_folder_at, write_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def export(
    weights: Weights,
    out: Path,
    dtype: torch.dtype | None = None,
    model_type: str | None = None,
    license_id: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights, configuration, tokenizer and model card of a run to a new folder.

    Holds one tensor in memory at a time.

    Args:
        weights: of `weights_of`.
        out: the new folder.
        dtype: of the written weights; None: as they are stored.
        model_type: the family to write, where several compute the same.
        license_id: for the model card.
        shard_bytes: the largest weights file.

    Raises:
        UserError: if `out` exists, if no family computes the model, or if its tokenizer cannot be
            exported.
    """
    recipe = weights.recipe
    if isinstance(recipe.model, GPTModel):
        config, specs, tensors = _as_family(weights, recipe.model, dtype, model_type)
    else:
        if model_type is not None:
            raise UserError("--family: a model of family hf is exported as what it is")
        config, specs, tensors = _as_it_is(weights, recipe.model, dtype)
    with new_folder_at(out) as folder:
        config.save_pretrained(folder)
        tokenizer = export_tokenizer(recipe.data.tokenizer, folder, _context(weights, config))
        if isinstance(recipe.model, GPTModel):
            # Training puts the separator before each text, so that it begins one too.
            config.bos_token_id = config.eos_token_id = tokenizer.separator
            config.save_pretrained(folder)
        _write_generation_config(config, folder)
        write_card(folder, recipe, weights.run, license_id)
        write_sharded(folder, specs, tensors, shard_bytes)


def consolidate(weights: Weights, out: Path, dtype: torch.dtype) -> None:
    """Write all weights to one safetensors file, under canonical names; one tensor in memory.

    Raises:
        UserError: if `out` exists, or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out}: it exists already; name a new file")
    specs = {name: (shape, dtype) for name, shape in weights.shapes.items()}
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with SafetensorsWriter(partial, specs) as writer:
            for name, tensor in weights.tensors():
                writer.write(name, tensor)
                del tensor  # before the next one is read
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot write it ({error}); make room, and start again") from error
    finally:
        partial.unlink(missing_ok=True)


def _as_family(
    weights: Weights, model: GPTModel, dtype: torch.dtype | None, model_type: str | None
) -> "tuple[PreTrainedConfig, dict[str, Spec], Iterator[tuple[str, Tensor]]]":
    family, config = to_transformers(model.shape, model_type)
    common = dtype or reduce(torch.promote_types, weights.dtypes.values())
    config.dtype = common
    table = {each.ours: each for each in correspondences(family, model.shape)}
    specs = {
        name: (shape, common)
        for each in table.values()
        for name, shape in each.their_shapes().items()
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights.tensors():
            yield from table[name].to_theirs(tensor)

    return config, specs, tensors()


def _as_it_is(
    weights: Weights, model: HFModel, dtype: torch.dtype | None
) -> "tuple[PreTrainedConfig, dict[str, Spec], Iterator[tuple[str, Tensor]]]":
    from models.hf import read_config

    saved = weights.run / "config.json"
    source = (str(saved), {}) if saved.is_file() else (model.path, model.changes)
    config = read_config(*source)
    # Buffers keep their dtype, as transformers keeps it: they are integers, or in fp32 by intent.
    parameters = _parameter_names(config)
    if model.lora is not None and parameters.isdisjoint(weights.shapes):
        raise UserError(
            "model.lora: a checkpoint has the adapters alone, and no model to write; end the run with "
            "--resume auto, and export its folder, whose weights have them merged"
        )
    specs = {
        name: (shape, dtype if dtype and name in parameters else weights.dtypes[name])
        for name, shape in weights.shapes.items()
    }
    config.dtype = reduce(
        torch.promote_types, [kept for name, (_, kept) in specs.items() if name in parameters]
    )
    return config, specs, weights.tensors()


def _parameter_names(config: "PreTrainedConfig") -> set[str]:
    from models.hf import from_config

    with torch.device("meta"):
        return {name for name, _ in from_config(config).named_parameters()}


def _context(weights: Weights, config: "PreTrainedConfig") -> int:
    from models.hf import most_positions

    return most_positions(config) or weights.recipe.data.sequence_length


def _write_generation_config(config: "PreTrainedConfig", folder: Path) -> None:
    from transformers import GenerationConfig

    GenerationConfig.from_model_config(config).save_pretrained(folder)
