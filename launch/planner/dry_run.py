"""Report what a recipe would do, before anything is computed: `--list` and `--dry-run`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml
from rich.console import Console
from rich.table import Table

from launch.config.layout import plan_layout
from launch.config.load import load_recipe
from launch.config.resolve import resolve
from launch.config.schema import GPTModel, HFModel, Recipe
from launch.data.tokenizer import HubError, load_tokenizer
from launch.memory.estimate import estimate
from launch.paths import ROOT
from launch.planner.model_size import model_size
from launch.training.setup import check_model

if TYPE_CHECKING:
    from models.hf import HFCausalLM


def header(file: Path) -> list[str]:
    """The comment lines at the top of a recipe: what it trains, on what, and how to start it."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines


def _layout_name(recipe: Recipe) -> str:
    parallel = recipe.parallel
    parts = [Path(recipe.deepspeed["config"]).stem]
    if parallel.pipeline > 1:
        order = "" if parallel.schedule == "1f1b" else f" ({parallel.schedule})"
        parts.append(f"pipeline {parallel.pipeline}{order}")
    if parallel.tensor > 1:
        parts.append(f"tensor {parallel.tensor}" + (" (sequence)" if parallel.sequence else ""))
    return ", ".join(parts)


def print_list() -> None:
    """Print a table of every recipe in recipes/: parameters, layout, hardware."""
    table = Table(box=None)
    for column in ("recipe", "parameters", "layout"):
        table.add_column(column, no_wrap=True)
    table.add_column("hardware")
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_recipe(file)
        path = recipe.model.path if isinstance(recipe.model, HFModel) else None
        if path is None or Path(path).exists():
            size = _short(model_size(recipe)[0])
        else:
            size = "by a script" if path.startswith(".") else "on the Hub"
        _what, _, hardware = header(file)[0].partition(". ")
        table.add_row(file.stem, size, _layout_name(recipe), hardware)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_dry_run(recipe: Recipe, world_size: int) -> None:
    """Print the resolved recipe and JSON, layout, batch, parameters and memory; train nothing."""
    layout = plan_layout(recipe, world_size)
    ds_config = resolve(recipe, layout)
    tokenizer, unknown = None, ""
    try:
        tokenizer = load_tokenizer(recipe.data.tokenizer)
    except HubError as error:
        unknown = str(error)
    check_model(recipe, ds_config, tokenizer)
    if isinstance(recipe.model, HFModel) and layout.grid["tensor"] > 1:
        from launch.deepspeed_patches.autotp import check_plan
        from launch.ds_json.view import zero_stage
        from launch.training.build_model import meta_model

        check_plan(
            cast("HFCausalLM", meta_model(recipe)), layout.grid["tensor"], zero_stage(ds_config)
        )
    parameters, flops = model_size(recipe)
    tokens = recipe.train.global_batch_size * recipe.data.sequence_length
    print(f"# recipe {recipe.name}, resolved")
    print(yaml.safe_dump(recipe.model_dump(exclude={"name"}), sort_keys=False).rstrip())
    print(f"\n# DeepSpeed configuration, resolved\n{json.dumps(ds_config, indent=2)}")
    if unknown:
        print(f"\nnot checked whether the vocabulary is large enough: {unknown}")
    print(f"\nlayout: {layout.describe()}")
    print(f"parameters: {parameters:,} ({_short(parameters)})")
    if isinstance(recipe.model, GPTModel):
        print(estimate(recipe, layout, ds_config).describe())
    print(
        f"tokens: {tokens:,} a step, {tokens * recipe.train.steps:,} in {recipe.train.steps} steps; "
        f"{flops * tokens * recipe.train.steps:.2e} FLOPs"
    )


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
