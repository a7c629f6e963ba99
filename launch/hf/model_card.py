"""The model card of an exported model: what it is, its recipe, and how its loss went."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from launch.config.schema import Recipe
from launch.hf.config import read_object
from launch.runtime.run_dir import RunDir, read_metrics

ORIGIN = "origin.json"
"""Written by an import: the model's name and licence."""

ROWS = 10  # of the table of losses


def write_card(folder: Path, recipe: Recipe, run: Path, license_id: str | None) -> None:
    """Write README.md.

    Args:
        folder: the exported model's.
        recipe: what it was trained with.
        run: the run's folder, for the losses.
        license_id: as the Hub names licences; None: that of the model it started from, if known.
    """
    origin = read_origin(recipe)
    base = origin.get("name")
    data = ModelCardData(
        license=license_id or origin.get("license") or "unknown",
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
    )
    (folder / "README.md").write_text(
        f"---\n{data.to_yaml()}\n---\n\n# {recipe.name}\n\n"
        + (f"Trained from [{base}](https://huggingface.co/{base}).\n\n" if base else "")
        + _losses(RunDir(run))
        + f"## Recipe\n\n```yaml\n{_recipe_yaml(recipe)}```\n"
    )


def read_origin(recipe: Recipe) -> dict[str, Any]:
    """Where a run's initial weights came from: `name` and `license`, those that are known."""
    if recipe.model.family == "hf":
        on_hub = recipe.model.pretrained and not Path(recipe.model.path).exists()
        return {"name": recipe.model.path} if on_hub else {}
    file = Path(recipe.model.init_from or "") / ORIGIN
    return read_object(file) if file.is_file() else {}


def _losses(run: RunDir) -> str:
    records = read_metrics(run.metrics)
    steps = {r["step"]: r["loss"] for r in records if r.get("loss") is not None}
    validation = {
        r["step"]: r["validation_loss"] for r in records if r.get("validation_loss") is not None
    }
    shown = sorted(steps)
    if len(shown) > ROWS:
        shown = [shown[round(i * (len(shown) - 1) / (ROWS - 1))] for i in range(ROWS)]
    shown = sorted({*shown, *sorted(validation)[-1:]})
    if not shown:
        return ""
    rows = "".join(
        f"| {step} | {_number(steps.get(step))} | {_number(validation.get(step))} |\n"
        for step in shown
    )
    summary = ""
    if run.summary.is_file():
        final = json.loads(run.summary.read_text())
        summary = (
            f"Validation loss after {final['steps']} steps: {_number(final['validation_loss'])} "
            "nats per token.\n\n"
        )
    return f"## Loss\n\n{summary}| step | loss | validation loss |\n| --- | --- | --- |\n{rows}\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _recipe_yaml(recipe: Recipe) -> str:
    # Where the run was written, and where its tokens lie, concern its machine only.
    values = recipe.model_dump(
        mode="json", exclude={"name": True, "run": True, "data": {"cache_dir"}}
    )
    return yaml.safe_dump(values, sort_keys=False)
