"""From a recipe's `deepspeed:` block to the one dict that DeepSpeed gets.

The JSON owns precision, ZeRO, offload, optimizer and clipping; the recipe owns batch sizes and
the schedule, and may change single keys of the JSON. What comes out is complete and linted.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from launch.ds_finding import Finding, nearest
from launch.ds_lint import lint
from launch.errors import UserError
from launch.layout import Layout
from launch.parallel_rules import check_composition
from launch.recipe import ROOT, Recipe

_OWNED_BY_RECIPE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "scheduler": "train.schedule",
}
# DeepSpeed has no "never"; our own metrics replace its progress lines.
_NEVER_PRINT = 10**9
_SHOWN_ERRORS = 3


def load_json(path: str | Path) -> dict[str, Any]:
    """Read one JSON object strictly: no comments, trailing commas, duplicate keys or NaN.

    DeepSpeed itself reads a laxer dialect (hjson) that Hugging Face and other tools refuse.

    Raises:
        UserError: with file, line and column, or with the nearest file name where there is none.
    """
    path = Path(path)
    if not path.is_file():
        beside = [*path.parent.glob("*.json"), *(ROOT / "ds_configs").glob("*.json")]
        hint = nearest(path.name, {other.name for other in beside})
        raise UserError(f"{path}: no such file{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text: {error}") from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        _fail(path, text, error.pos, _syntax(text, error))
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a config") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object {{...}}")
    for position, message in _beyond_syntax(text):
        _fail(path, text, position, message)
    return values


def _fail(path: Path, text: str, position: int, message: str) -> NoReturn:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    raise UserError(f"{path}:{line}:{column}: {message}")


def _syntax(text: str, error: json.JSONDecodeError) -> str:
    at, before = text[error.pos :], text[: error.pos].rstrip()
    if at.lstrip().startswith(("//", "/*", "#")):
        return "JSON has no comments; take this one out"
    # Python 3.13 points at the comma, earlier versions at the bracket behind it.
    if (at[:1] in ("}", "]") and before.endswith(",")) or "trailing comma" in error.msg:
        return "JSON has no comma after the last entry; take it out"
    return error.msg


def _beyond_syntax(text: str) -> Iterator[tuple[int, str]]:
    """What Python's parser lets pass, with its position, in text that it has accepted."""
    open_blocks: list[set[str]] = []
    token = r'(?P<text>"(?:[^"\\]|\\.)*")(?P<colon>\s*:)?|(?P<bad>-?Infinity|NaN)|[{}\[\]]'
    for match in re.finditer(token, text):
        if match["bad"]:
            yield match.start(), f"{match['bad']} is no JSON number"
        elif match["colon"]:
            key = json.loads(match["text"])
            if key in open_blocks[-1]:
                yield match.start(), f"'{key}' is given twice in the same block; keep one"
            open_blocks[-1].add(key)
        elif match[0] in "{[":
            open_blocks.append(set())
        elif match[0] in "}]":
            open_blocks.pop()


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
    config["train_batch_size"] = layout.data * layout.accumulation * layout.micro_batch
    config["steps_per_print"] = _NEVER_PRINT
    check_composition(recipe, config, layout)
    if layout.pipeline > 1 and recipe.parallel.sequence:
        # DeepSpeed cuts what tensor ranks send to the next stage; here it is cut already.
        config["pipeline"] = {
            **config.get("pipeline", {}), "pipe_partitioned": False, "grad_partitioned": False
        }  # fmt: skip
    errors = [finding for finding in _lint(config, layout) if finding.level == "error"]
    if errors:
        lines = [_with_place(finding, path, recipe.name, overrides) for finding in errors]
        more = len(lines) - _SHOWN_ERRORS
        rest = f" (and {more} more)" if more > 0 else ""
        raise UserError(" | ".join(lines[:_SHOWN_ERRORS]) + rest)
    # What DeepSpeed takes for granted; the run folder's copy should say it.
    config.setdefault("gradient_clipping", 1.0)
    if recipe.model.family == "hf" and layout.tensor > 1:
        from launch.autotp import with_autotp

        config = with_autotp(config, layout.tensor)
    return config


def warnings(config: dict[str, Any], layout: Layout) -> list[str]:
    """What is worth telling a person about a resolved config, one line each."""
    return [
        f"{finding.key}: {finding.message}"
        for finding in _lint(config, layout)
        if finding.level == "warning"
    ]


def _lint(config: dict[str, Any], layout: Layout) -> list[Finding]:
    return lint(config, world_size=layout.data)


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
