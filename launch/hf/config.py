"""A `GPTConfig` as a transformers configuration, and back; what cannot be expressed is rejected.

There is one rule for each direction, and no list of bad fields. Exported: the configuration, read
back, has to be the `GPTConfig` that it was made of. Imported: the configuration that we would
export has to equal the one that was read, except in fields that change no logits. So a field that
nobody thought of is rejected as soon as it has another value than we compute with.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import UserError
from launch.hf.families import FAMILIES, WITHOUT_EFFECT, Family
from models.config import GPTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# It acts in training only, and most families have no such field.
NOT_IN_A_MODEL = ("dropout",)


def to_transformers(
    config: GPTConfig, model_type: str | None = None
) -> "tuple[Family, PreTrainedConfig]":
    """The family and configuration of a decoder; `model_type`: one to use, not the first that fits.

    Raises:
        UserError: if no family, or not the one asked for, computes what the decoder does; it names
            the fields.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise UserError(f"--family: '{model_type}' is not known; use {', '.join(FAMILIES)}")
    reasons = []
    for family in FAMILIES.values() if model_type is None else [FAMILIES[model_type]]:
        try:
            exported = _exported(family, config)
            lost = _differing_fields(config, _understood(family, exported.to_dict()))
        except Exception as error:  # transformers' checks, and GPTConfig's, of any type
            lost = [_one_line(error)]
        else:
            if not lost:
                return family, exported
        reasons.append(f"{family.model_type}: {', '.join(lost)}")
    raise UserError(
        f"model: no family of transformers computes this decoder ({'; '.join(reasons)})"
    )


def from_transformers(file: Path) -> tuple[Family, GPTConfig]:
    """The family and decoder that a config.json describes.

    Raises:
        UserError: if it is not readable, of another family, needs code of its own, or has a field
            with a value that our decoder does not compute; it names the field and the file.
    """
    values = read_object(file)
    if "auto_map" in values:
        raise UserError(
            f"{file}: auto_map asks for code that comes with the model, and none is ever run; use a "
            f"model of {', '.join(FAMILIES)}"
        )
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(
            f"{file}: model_type {model_type!r} is not one that our decoder computes; those are "
            f"{', '.join(FAMILIES)} (model.family: hf trains the others)"
        )
    named = values.get("architectures") or [family.architecture]
    if named != [family.architecture]:
        raise UserError(
            f"{file}: architectures is {named}, and only {family.architecture} has the head of a "
            "language model"
        )
    try:
        given = _config_class(family).from_dict(values).to_dict()
        config = GPTConfig(**_understood(family, given))
        again = _exported(family, config).to_dict()
    except Exception as error:  # transformers' checks, and GPTConfig's, of any type
        raise UserError(f"{file}: not a usable configuration: {_one_line(error)}") from None
    _reject_differences(file, family, config, _flat(given), _flat(again))
    return family, config


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: if there is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a JSON object")
    return values


def _config_class(family: Family) -> "type[PreTrainedConfig]":
    from transformers import AutoConfig

    return type(AutoConfig.for_model(family.model_type))


def _exported(family: Family, config: GPTConfig) -> "PreTrainedConfig":
    flat: dict[str, Any] = {**dict.fromkeys(family.at_least_context), **dict(family.settings)}
    for ours, theirs in family.fields.items():
        flat |= dict.fromkeys(theirs, getattr(config, ours))
    given: dict[str, Any] = {}
    for key, value in flat.items():
        block, dot, name = key.rpartition(".")
        if dot:
            given.setdefault(block, {"rope_type": "default"})[name] = value
        else:
            given[key] = value
    # Not the ids of the family's own tokenizer; the exported one's are set later.
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    return _config_class(family)(**given, **ids, architectures=[family.architecture])


def _understood(family: Family, theirs: dict[str, Any]) -> dict[str, Any]:
    """The fields of `GPTConfig`, from a configuration; those that it leaves open are left out."""
    flat = _flat(theirs)
    found = dict(family.fixed)
    for ours, keys in family.fields.items():
        if flat.get(keys[0]) is not None:  # GPT-2's n_inner: None means four times n_embd
            found[ours] = flat[keys[0]]
    return found


def _differing_fields(config: GPTConfig, understood: dict[str, Any]) -> list[str]:
    back = GPTConfig(**understood)
    return [
        f"{field.name} is {getattr(config, field.name)}"
        for field in fields(GPTConfig)
        if field.name not in NOT_IN_A_MODEL
        # Without rotary positions there is no angle, whatever its base.
        and not (field.name == "rope_theta" and config.position != "rope")
        and getattr(config, field.name) != getattr(back, field.name)
    ]


def _reject_differences(
    file: Path, family: Family, config: GPTConfig, given: dict[str, Any], ours: dict[str, Any]
) -> None:
    for key in sorted(given.keys() | ours.keys()):
        if key.split(".")[0] in WITHOUT_EFFECT:
            continue
        found, computed = given.get(key), ours.get(key)
        if found == computed:
            continue
        if key in family.at_least_context and isinstance(found, int) and found >= config.context:
            continue
        if key == "n_inner" and found is None:  # GPT-2's default: four times n_embd, as GPTConfig's
            continue
        raise UserError(
            f"{file}: {key} is {found!r}, and our decoder computes a {family.model_type} only with "
            f"{'none' if key not in ours else repr(computed)}"
        )


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The same with rope_parameters' own fields as `rope_parameters.<name>`."""
    flat = {key: value for key, value in values.items() if key != "rope_parameters"}
    block = values.get("rope_parameters") or {}
    return flat | {f"rope_parameters.{key}": value for key, value in block.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())
