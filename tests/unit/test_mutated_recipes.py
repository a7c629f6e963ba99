"""Whatever a recipe says, it is planned, or refused in one line."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config.layout import plan_layout
from launch.config.load import load_recipe, recipe_from_dict
from launch.config.resolve import resolve, warnings
from launch.errors import UserError
from launch.memory.estimate import estimate
from launch.paths import ROOT
from tests.ds_configs.mutations import ANYTHING, PLAUSIBLE, set_at

SEEDS = [
    load_recipe(file).model_dump()
    for file in sorted((ROOT / "recipes").glob("*.yaml"))
    if not file.stem.startswith("hf_")
]
PATHS = [
    *((block, key) for seed in SEEDS[:1] for block in seed if isinstance(seed[block], dict)
      for key in (*seed[block], "typo")),
    *((block,) for block in SEEDS[0]),
    *(("deepspeed", block, *below) for block in (
        "zero_optimization", "bf16", "fp16", "torch_autocast", "optimizer", "pipeline", "data_types",
        "tensor_parallel", "activation_checkpointing", "gradient_clipping", "communication_data_type",
    ) for below in ((), ("enabled",), ("stage",), ("params",), ("offload_optimizer",))),
]  # fmt: skip
VALUES = st.one_of(st.sampled_from(PLAUSIBLE), ANYTHING)
CHANGES = st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3)


def plan(values: dict[str, Any], ranks: int) -> None:
    """What every command does with a recipe before it starts ranks."""
    recipe = recipe_from_dict(values)
    layout = plan_layout(recipe, ranks)
    ds_config = resolve(recipe, layout)
    warnings(ds_config, layout)
    if recipe.model.family == "gpt":
        estimate(recipe, layout, ds_config).describe()


def check(seed: dict[str, Any], changes: list[tuple[tuple[str, ...], Any]], ranks: int) -> None:
    values = json.loads(json.dumps(seed))
    for path, value in changes:
        set_at(values, path, copy.deepcopy(value))  # or a dict is put into itself
    try:
        plan(values, ranks)
    except UserError as error:
        assert str(error).strip()
        assert "\n" not in str(error), error


SETTINGS = (st.sampled_from(SEEDS), CHANGES, st.sampled_from([1, 2, 8, 1024]))


@given(*SETTINGS)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_a_changed_recipe(
    seed: dict[str, Any], changes: list[tuple[tuple[str, ...], Any]], ranks: int
) -> None:
    check(seed, changes, ranks)


@pytest.mark.matrix
@given(*SETTINGS)
@settings(max_examples=2000, derandomize=True, deadline=None)
def test_many_changed_recipes(
    seed: dict[str, Any], changes: list[tuple[tuple[str, ...], Any]], ranks: int
) -> None:
    check(seed, changes, ranks)


@pytest.mark.parametrize("stem", ["gpt_tiny_tp2_zero1", "gpt_tiny_pp2_zero1", "gpt_tiny_tp2_zero3"])
@pytest.mark.parametrize(
    ("block", "value"), [("zero_optimization", "auto"), ("bf16", -1), ("pipeline", 0.5)]
)
def test_a_block_that_is_no_mapping_is_told(stem: str, block: str, value: object) -> None:
    recipe = load_recipe(f"recipes/{stem}.yaml", [f"deepspeed.{block}={value}"])
    with pytest.raises(UserError, match=f"deepspeed.{block}: "):
        resolve(recipe, plan_layout(recipe, 2))
