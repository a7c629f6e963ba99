"""A recipe's `model.init_from`: initial weights from files, in any layout.

Each rank reads only the slices that it holds. Its host memory peaks at its own weights and one
tensor more.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from launch.config.schema import GPTModel
from launch.errors import UserError
from launch.hf.import_model import MODEL_YAML
from launch.hf.read_weights import WeightFiles
from launch.hf.tensors import check_shapes, our_shapes
from launch.runtime.run_dir import read_settings
from models.config import GPTConfig
from models.init_weights import Gather
from models.parallel.tensor_parallel import Shard

VOCABULARY = ("embedding.token.weight", "output.weight")
# What may differ from the model that the weights are of: they are the same function.
MAY_CHANGE = {"vocab", "dropout", "init_std"}
ROWS_AT_ONCE = 4096


def check_init_from(model: GPTModel) -> WeightFiles:
    """Check that a folder's weights are those of a recipe's model; reads only headers.

    The model's vocabulary may be larger than the files': it may be padded.

    Raises:
        UserError: if there are no weights, they are of another model, or a tensor is missing,
            unknown or of another shape.
    """
    assert model.init_from is not None
    folder, config = Path(model.init_from).expanduser(), model.shape
    if not folder.is_dir():
        raise UserError(f"model.init_from: there is no folder {folder}")
    try:
        _check_settings(folder, config)
        files = WeightFiles(folder)
        expected = our_shapes(config)
        rows = {files.shapes[name][0] for name in VOCABULARY if name in files.shapes}
        if len(rows) == 1 and min(rows) < config.vocab:
            expected |= {
                name: (min(rows), config.hidden) for name in VOCABULARY if name in expected
            }
        check_shapes(expected, files.shapes, str(folder))
        for name in expected:
            files.dtype(name)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None
    return files


def _check_settings(folder: Path, config: GPTConfig) -> None:
    """Compare with the model that the folder says the weights are of; tensors do not tell all."""
    if (folder / MODEL_YAML).is_file():
        try:
            values = yaml.safe_load((folder / MODEL_YAML).read_text())
            theirs = GPTModel.model_validate(values["model"]).shape
        except (OSError, yaml.YAMLError, ValidationError, KeyError, TypeError) as error:
            raise UserError(f"{folder / MODEL_YAML}: not readable: {error}") from None
    elif (folder / "recipe.yaml").is_file():
        model = read_settings(folder).model
        if not isinstance(model, GPTModel):
            raise UserError(f"{folder} is a run of family hf; use model.family=hf and model.path")
        theirs = model.shape
    else:
        return
    for field in fields(GPTConfig):
        name = field.name
        rotary = config.position == theirs.position == "rope"
        if name in MAY_CHANGE or name == ("context" if rotary else "rope_theta"):
            continue
        ours, given = getattr(config, name), getattr(theirs, name)
        if ours != given:
            raise UserError(f"the weights are of a model with {name} {given}; set model.{name} so")


@torch.no_grad()
def load_initial_weights(
    parameters: Iterable[tuple[str, nn.Parameter]],
    model: GPTModel,
    gather: Gather = lambda _: nullcontext(),
    *,
    writes: bool = True,
) -> None:
    """Fill parameters, whole or shards, with the weights of `model.init_from`.

    Args:
        parameters: by canonical name.
        model: the recipe's model.
        gather: collects a parameter from the data parallel ranks while it is written, as for
            `initialize_parameters`. Every rank must call this then.
        writes: whether this rank's values are used; others read nothing.

    Raises:
        UserError: as `check_init_from`.
    """
    files = check_init_from(model)
    for name, parameter in parameters:
        with gather(parameter):
            if writes:
                _fill(name, parameter, files)


def _fill(name: str, parameter: nn.Parameter, files: WeightFiles) -> None:
    whole = files.shapes[name]
    shard: Shard | None = getattr(parameter, "shard", None)
    dim = shard.dim if shard else 0
    ranges = shard.ranges() if shard else [(0, 0, parameter.shape[0])]
    parameter.zero_()  # what a tensor rank holds beyond the vocabulary

    def copy(part: Any) -> None:
        for here, there, length in ranges:
            found = min(length, max(whole[dim] - there, 0))
            index = (*[slice(None)] * dim, slice(there, there + found))
            if found:
                parameter.narrow(dim, here, found).copy_(part[index])
            if found < length:
                parameter.narrow(dim, here + found, length - found).copy_(_mean_row(part, whole))

    files.use(name, copy)


def _mean_row(part: Any, shape: tuple[int, ...]) -> Tensor:
    """The mean of all rows, `[1, width]`, for tokens that the files do not have.

    Such a token's logit is then the mean of all logits. With zeros it would be 0, which is more
    than all others in a model like GPT-2, whose logits are far below 0.
    """
    total = torch.zeros(shape[1:], dtype=torch.float64)
    for start in range(0, shape[0], ROWS_AT_ONCE):
        total += part[start : start + ROWS_AT_ONCE].double().sum(0)
    return (total / shape[0]).unsqueeze(0)
