"""Load a recipe: one YAML file plus overrides, parsed into frozen, validated objects.

The recipe sets the model, data, parallel degrees, steps and global batch. The DeepSpeed JSON that
it names sets precision, ZeRO, offload, optimizer and clipping; keys under `deepspeed:` override it.
"""

from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from launch.config.parallel_rules import check_parallel
from launch.config.schema import GPTModel, HFModel, Recipe
from launch.errors import UserError, nearest_or_all
from launch.paths import ROOT


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply dotted overrides such as `train.steps=30`.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key (with the nearest valid one), a
            value of the wrong type or range, or a model with inconsistent sizes.
    """
    path, values = read_values(path, overrides)
    try:
        plain = OmegaConf.to_container(values, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path} with {list(overrides)}: {error}") from None
    assert isinstance(plain, dict)
    return recipe_from_dict({**plain, "name": path.stem}, where=str(path))


def read_values(path: str | Path, overrides: Sequence[str]) -> tuple[Path, DictConfig]:
    """Return a recipe file's path and its values with overrides applied, not yet validated.

    Raises:
        UserError: for a missing file, bad YAML, or an override that is not of the form key=value.
    """
    path = Path(path)
    if not path.is_file() and (ROOT / path).is_file():
        path = ROOT / path  # started from another folder
    if not path.is_file():
        known = {p.stem: p for p in (ROOT / "recipes").glob("*.yaml")}
        raise UserError(f"--config: no recipe file {path};{nearest_or_all(path.stem, known)}")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of blocks (model:, data:, train:, ...)")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip("."):
            raise UserError(f"--set {override}: write key=value, for example train.steps=30")
    try:
        values.merge_with_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:  # the last: not a list's index
        raise UserError(f"{path} with {list(overrides)}: {error}") from None
    return path, values


def recipe_from_dict(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate plain values, for example from a run folder's resolved recipe.

    Raises:
        UserError: see `load_recipe`.
    """
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    try:
        _check(recipe)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe


def _check(recipe: Recipe) -> None:
    """Reject errors that do not depend on the number of ranks.

    Raises:
        UserError: naming the key and the fix.
    """
    if not isinstance(recipe.deepspeed.get("config"), str):
        raise UserError("deepspeed.config: name a JSON file, for example ds_configs/zero1.json")
    if isinstance(recipe.model, GPTModel):
        context = recipe.model.shape.context
        if recipe.data.sequence_length > context:
            raise UserError(
                f"data.sequence_length: {recipe.data.sequence_length} is more than the model's "
                f"context of {context}; lower it, or raise model.context"
            )
        init_from, run_dir = recipe.model.init_from, recipe.run.dir
        if init_from and run_dir and Path(init_from).resolve() == Path(run_dir).resolve():
            raise UserError(
                "model.init_from: it is the folder that run.dir writes to; name another run.dir"
            )
    check_parallel(recipe)


def _explain(error: ValidationError) -> str:
    first, others = error.errors()[0], error.error_count() - 1
    # pydantic's location includes the discriminator's value ("gpt"), which is not in the file.
    location = [
        str(part) for i, part in enumerate(first["loc"]) if not (i == 1 and part in ("gpt", "hf"))
    ]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        valid = _fields_beside(first["loc"])
        message = f"unknown key {key};{nearest_or_all(location[-1], valid)}"
    elif first["type"] == "missing":
        message = f"{key} is missing"
    else:
        message = f"{key}: {first['msg']}, but it is {first['input']!r}"
    return message + (f" (and {others} more)" if others else "")


def _fields_beside(location: tuple[int | str, ...]) -> list[str]:
    block: type[BaseModel] = Recipe
    for part in location[:-1]:
        if block is Recipe and part == "model":
            block = GPTModel
        elif part == "hf":
            block = HFModel
        elif part != "gpt":
            annotation: Any = block.model_fields[str(part)].annotation
            kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
            annotation = kinds[0] if kinds else annotation  # of a block that may be left out
            assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
            block = annotation
    return [name for name in block.model_fields if name != "name"]
