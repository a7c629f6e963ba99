"""Turn a recipe's `deepspeed:` block into the dict that is passed to DeepSpeed.

The JSON sets precision, ZeRO, offload, optimizer and clipping; the recipe sets batch sizes and the
schedule, and can override single keys of the JSON. The result is complete and linted.
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
from launch.ds_json.view import block, zero_block, zero_stage
from launch.errors import UserError
from launch.paths import ROOT

_OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "scheduler": "train.schedule",
}
# DeepSpeed's progress lines cannot be turned off; our own metrics replace them.
_NEVER_PRINT = 10**9
# Its own measurement of throughput waits for the GPU twice in every micro batch.
_NO_TIMER = {"timers": {"throughput": {"enabled": False}}}
_SHOWN_ERRORS = 3
_WRONG_VALUES = {"wrong-value", "unchecked-value", "old-form", "auto"}


def resolve(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Build DeepSpeed's config from the recipe's JSON, its overrides and the layout's batch sizes.

    A key set to null in the recipe is removed from the JSON.

    Raises:
        UserError: for an unreadable JSON, a key that the recipe sets elsewhere, or a linter error.
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
    config = merge(_NO_TIMER, config)
    errors = [finding for finding in _lint(config, layout) if finding.level == "error"]

    def stop_at(found: list[Finding]) -> None:
        if found:
            lines = [_with_place(finding, path, recipe.name, overrides) for finding in found]
            more = len(lines) - _SHOWN_ERRORS
            rest = f" (and {more} more)" if more > 0 else ""
            raise UserError(" | ".join(lines[:_SHOWN_ERRORS]) + rest)

    # The check of the layout reads values, and so comes after theirs. It comes before other errors, as
    # what it says is of more help.
    stop_at([finding for finding in errors if finding.rule in _WRONG_VALUES])
    check_composition(recipe, config, layout)
    stop_at(errors)
    zero = zero_block(config)
    if recipe.train.compile and zero_stage(config) == 3:
        # DeepSpeed's own F.linear is on by default; see `check_composition`.
        config["zero_optimization"] = {**zero, "memory_efficient_linear": False}
    if layout.grid["pipeline"] > 1 and recipe.parallel.sequence:
        # DeepSpeed would partition activations sent to the next stage; they are already sharded.
        config["pipeline"] = {
            **block(config, "pipeline"), "pipe_partitioned": False, "grad_partitioned": False
        }  # fmt: skip
    # DeepSpeed's default, made explicit in the run folder's copy.
    config.setdefault("gradient_clipping", 1.0)
    if recipe.model.family == "hf" and layout.grid["tensor"] > 1:
        config = with_autotp(config, layout.grid["tensor"])
    return config


def warnings(config: dict[str, Any], layout: Layout) -> list[str]:
    """Warnings about a resolved config, one line each."""
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
    """Return a copy of `base` with `changes` merged in recursively; None removes a key."""
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
    """Copy a resolved DeepSpeed JSON and have AutoTP shard the model over `tensor` ranks."""
    changed = copy.deepcopy(ds_config)
    # With tied embeddings, AutoTP keeps the logits sharded by default; the loss in models/hf.py
    # needs the full logits.
    changed["tensor_parallel"] = {"autotp_size": tensor, "vocab_parallel_lm_head": False}
    return changed
