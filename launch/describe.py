"""What a recipe would do, said before anything is computed: `--list` and `--dry-run`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from rich.console import Console
from rich.table import Table

from launch.ds_config import resolve
from launch.layout import plan_layout
from launch.memory import estimate
from launch.recipe import ROOT, GPTModel, HFModel, Recipe, load_recipe
from models.config import count_parameters, flops_per_token

if TYPE_CHECKING:
    from models.hf import HFCausalLM


def model_size(recipe: Recipe) -> tuple[int, float]:
    """Number of parameters, and FLOPs to train on one token (`models.config.flops_per_token`).

    A transformers model is built on the meta device; its attention term takes the number of layers
    and the query width from its config, where they have the usual names.
    """
    sequence = recipe.data.sequence_length
    if not isinstance(recipe.model, HFModel):
        config = recipe.model.gpt_config()
        return count_parameters(config), flops_per_token(config, sequence)
    import torch

    from launch.build import build_model
    from launch.weights import canonical_names

    model: Any = build_model(recipe, torch.float32, "meta")
    parameters = sum(p.numel() for p in canonical_names(model).values())
    hf = model.model.config
    embedding, output = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    tied = output is not None and output.weight is embedding.weight
    multiplied = parameters - (0 if tied else embedding.weight.numel())
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    attention = 12.0 * hf.num_hidden_layers * hf.num_attention_heads * head_dim * sequence
    return parameters, 6.0 * multiplied + attention


def header(file: Path) -> list[str]:
    """The comment lines that open a recipe: what it trains, on what, and how to start it."""
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
    """A table of every recipe in recipes/: parameters, layout, hardware."""
    table = Table(box=None)
    for column in ("recipe", "parameters", "layout"):
        table.add_column(column, no_wrap=True)
    table.add_column("hardware")
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_recipe(file)
        on_hub = isinstance(recipe.model, HFModel) and not Path(recipe.model.path).exists()
        size = "on the Hub" if on_hub else _short(model_size(recipe)[0])
        _what, _, hardware = header(file)[0].partition(". ")
        table.add_row(file.stem, size, _layout_name(recipe), hardware)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_dry_run(recipe: Recipe, world_size: int) -> None:
    """Resolved recipe and JSON, layout and batch, parameters, memory. Nothing is trained."""
    layout = plan_layout(recipe, world_size)
    ds_config = resolve(recipe, layout)
    if isinstance(recipe.model, HFModel) and layout.tensor > 1:
        from launch.autotp import check_plan
        from launch.build import zero_stage
        from launch.parity import meta_model

        check_plan(cast("HFCausalLM", meta_model(recipe)), layout.tensor, zero_stage(ds_config))
    parameters, flops = model_size(recipe)
    tokens = recipe.train.global_batch_size * recipe.data.sequence_length
    print(f"# recipe {recipe.name}, resolved")
    print(yaml.safe_dump(recipe.model_dump(exclude={"name"}), sort_keys=False).rstrip())
    print(f"\n# DeepSpeed configuration, resolved\n{json.dumps(ds_config, indent=2)}")
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
