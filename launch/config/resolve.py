"""From a recipe's `deepspeed:` block to the one dict that DeepSpeed gets.

The JSON owns precision, ZeRO, offload, optimizer and clipping; the recipe owns batch sizes and
the schedule, and may change single keys of the JSON. What comes out is complete and linted.
"""

import copy
from pathlib import Path
from typing import Any

from launch.config.compatibility import check_composition
from launch.config.layout import Layout
from launch.config.schema import Recipe
from launch.ds_json.finding import Finding
from launch.ds_json.linter import lint
from launch.ds_json.strict_json import load_json
from launch.ds_json.view import block, zero_block
from launch.errors import UserError
from launch.paths import ROOT

_OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "scheduler": "train.schedule",
}
# DeepSpeed has no "never"; our own metrics replace its progress lines.
_NEVER_PRINT = 10**9
_SHOWN_ERRORS = 3


def resolve(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """The config for DeepSpeed: the recipe's JSON, its overrides, and the layout's batch sizes.

    A key with the value null in the recipe removes that key of the JSON.

    Raises:
        UserError: for a JSON that does not read, a key that the recipe owns elsewhere, or anything
            that the linter calls an error.
    """
    path = _locate(recipe.deepspeed["config"])
    config = load_json(path)
    overrides = {key: value for key, value in recipe.deepspeed.items() if key != "config"}
    for key, owner in _OWNED_BY_RECIPE.items():
        if overrides.get(key) is not None:
            raise UserError(f"{recipe.name}: deepspeed.{key}: set {owner} instead")
    config = merge(config, overrides)
    if "scheduler" in config:
        raise UserError(f"{path}: scheduler: take it out; the recipe's train.schedule decides")
    if "optimizer" not in config:
        raise UserError(f"{path}: optimizer: a recipe's JSON must name one, with its parameters")
    config["train_micro_batch_size_per_gpu"] = layout.micro_batch
    config["gradient_accumulation_steps"] = layout.accumulation
    config["train_batch_size"] = layout.global_batch
    config["steps_per_print"] = _NEVER_PRINT
    check_composition(recipe, config, layout)
    errors = [finding for finding in _lint(config, layout) if finding.level == "error"]
    if errors:
        lines = [_with_place(finding, path, recipe.name, overrides) for finding in errors]
        more = len(lines) - _SHOWN_ERRORS
        rest = f" (and {more} more)" if more > 0 else ""
        raise UserError(" | ".join(lines[:_SHOWN_ERRORS]) + rest)
    zero = zero_block(config)
    if recipe.train.compile and zero.get("stage") == 3:
        # DeepSpeed's own F.linear is on by default; see `check_composition`.
        config["zero_optimization"] = {**zero, "memory_efficient_linear": False}
    if layout.grid["pipeline"] > 1 and recipe.parallel.sequence:
        # DeepSpeed would partition what tensor ranks send to the next stage; here it is sharded already.
        config["pipeline"] = {
            **block(config, "pipeline"), "pipe_partitioned": False, "grad_partitioned": False
        }  # fmt: skip
    # What DeepSpeed takes for granted; the run folder's copy should say it.
    config.setdefault("gradient_clipping", 1.0)
    if recipe.model.family == "hf" and layout.grid["tensor"] > 1:
        config = with_autotp(config, layout.grid["tensor"])
    return config


def warnings(config: dict[str, Any], layout: Layout) -> list[str]:
    """What is worth telling a person about a resolved config, one line each."""
    return [
        f"{finding.key}: {finding.message}"
        for finding in _lint(config, layout)
        if finding.level == "warning"
    ]


def _lint(config: dict[str, Any], layout: Layout) -> list[Finding]:
    return lint(config, world_size=layout.grid["data"])


def _locate(name: str) -> Path:
    path = Path(name).expanduser()
    return path if path.is_absolute() or path.is_file() else ROOT / path


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `changes` laid over it, block by block; None removes a key."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            below = result.get(key)
            result[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _with_place(finding: Finding, path: Path, recipe: str, overrides: dict[str, Any]) -> str:
    block: Any = overrides
    for part in finding.key.split("."):
        block = block.get(part) if isinstance(block, dict) else None
    place = f"{path}: " if block is None else f"{recipe}: deepspeed."
    return f"{place}{finding.key}: {finding.message}"


def with_autotp(ds_config: dict[str, Any], tensor: int) -> dict[str, Any]:
    """A copy of a resolved DeepSpeed JSON that has AutoTP cut the model over `tensor` ranks."""
    changed = copy.deepcopy(ds_config)
    # By default AutoTP tries to leave each rank its part of the logits where embeddings are tied;
    # the loss of models/hf.py needs them whole.
    changed["tensor_parallel"] = {"autotp_size": tensor, "vocab_parallel_lm_head": False}
    return changed
