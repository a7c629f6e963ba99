"""Write a plan as a recipe and its DeepSpeed JSON, ready to run."""

import json
from pathlib import Path

import yaml

from launch.ds_json.strict_json import load_json
from launch.errors import UserError
from launch.paths import ROOT
from launch.planner.search import Plan


def write_plan(plan: Plan, place: Path) -> tuple[Path, Path]:
    """Write `place`.yaml and `place`.json, and return their paths.

    Raises:
        UserError: if one of them exists, or the folder is not there.
    """
    place = place.with_suffix("") if place.suffix in (".yaml", ".json") else place
    recipe, config = place.with_suffix(".yaml"), place.with_suffix(".json")
    for file in (recipe, config):
        if file.exists():
            raise UserError(f"--write: {file} exists; choose another name, or remove it")
    if not place.parent.is_dir():
        raise UserError(f"--write: there is no folder {place.parent}")
    source = load_json(ROOT / str(plan.recipe.deepspeed["config"]))
    config.write_text(json.dumps(source, indent=2) + "\n")
    values = plan.recipe.model_dump(exclude={"name"}, exclude_defaults=True)
    values["model"] = {"family": "gpt", **values["model"]}
    values["train"]["micro_batch_size"] = plan.layout.micro_batch
    values["deepspeed"] = {**plan.recipe.deepspeed, "config": str(config.resolve())}
    start = f"deepspeed --num_gpus {plan.cluster.gpus} launch/train.py --config {recipe}"
    head = [
        f"{plan.name()} on {plan.cluster.describe()}: {plan.gib:.1f} GiB a GPU and "
        f"{plan.time.total:.3g} s a step (estimates).",
        start,
    ]
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(values, sort_keys=False)
    recipe.write_text(text)
    return recipe, config
