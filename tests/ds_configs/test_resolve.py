"""launch/config/resolve.py: a recipe's JSON, its overrides and its batch sizes become one dict."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config.layout import plan_layout
from launch.config.load import recipe_from_dict
from launch.config.resolve import resolve, warnings
from launch.config.schema import Recipe
from launch.ds_json.strict_json import load_json
from launch.errors import UserError

ZERO2 = "ds_configs/zero2.json"


def recipe(**deepspeed: Any) -> Recipe:
    return recipe_from_dict(
        {
            "name": "some_recipe",
            "model": {"size": "tiny"},
            "data": {"sequence_length": 64},
            "train": {"steps": 1, "global_batch_size": 16, "micro_batch_size": 2},
            "deepspeed": {"config": ZERO2, **deepspeed},
        }
    )


def resolved(ranks: int = 2, **deepspeed: Any) -> dict[str, Any]:
    made = recipe(**deepspeed)
    return resolve(made, plan_layout(made, ranks))


def test_batch_sizes_come_from_the_layout() -> None:
    config = resolved(ranks=4)
    assert config["train_batch_size"] == 16
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2


def test_overrides_go_deep_and_null_removes() -> None:
    config = resolved(bf16={"enabled": False}, data_types=None, optimizer={"params": {"lr": 1e-3}})
    before = load_json(ZERO2)
    assert config["bf16"] == {"enabled": False} and "data_types" not in config
    assert config["optimizer"]["params"] == {**before["optimizer"]["params"], "lr": 1e-3}
    assert config["zero_optimization"] == before["zero_optimization"]


def test_implied_clipping_is_written_out() -> None:
    assert resolved(gradient_clipping=None)["gradient_clipping"] == 1.0
    assert resolved(gradient_clipping=0.0)["gradient_clipping"] == 0.0


def test_a_relative_path_is_the_cwd_s_first_and_the_checkout_s_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolved()["zero_optimization"]["stage"] == 2
    (tmp_path / "ds_configs").mkdir()
    own = {**load_json(Path(__file__).parents[2] / ZERO2), "zero_optimization": {"stage": 1}}
    (tmp_path / ZERO2).write_text(json.dumps(own))
    assert resolved()["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ({"train_batch_size": 4}, "deepspeed.train_batch_size: set train.global_batch_size"),
        ({"gradient_accumulation_steps": 4}, "set train.global_batch_size"),
        ({"scheduler": {"type": "WarmupLR"}}, "set train.schedule"),
        ({"optimizer": None}, "optimizer: a recipe's JSON must name one"),
        ({"gradient_cliping": 0.5}, "some_recipe: deepspeed.gradient_cliping: unknown key"),
        ({"bf16": {"enabled": "auto"}}, "some_recipe: deepspeed.bf16.enabled: \"auto\""),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: Input should be"),
        ({"zero_optimization": 2}, "should be an object"),
        ({"fp16": {"enabled": True}}, "both enabled"),
        ({"config": "ds_configs/zero22.json"}, "no such file; did you mean 'zero2"),
    ],
)  # fmt: skip
def test_refusals_name_the_place_in_one_line(deepspeed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(**deepspeed)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_scheduler_or_an_error_in_the_json_names_the_file(tmp_path: Path) -> None:
    for changes, words in (({"scheduler": {}}, "scheduler: take it out"), ({"x": 1}, "x: unknown")):
        file = tmp_path / "own.json"
        file.write_text(json.dumps({**load_json(ZERO2), **changes}))
        with pytest.raises(UserError, match=words) as caught:
            resolved(config=str(file))
        assert str(caught.value).startswith(str(file))


def test_many_errors_are_counted() -> None:
    with pytest.raises(UserError, match=r"and 2 more"):
        resolved(a=1, b=2, c=3, d=4, e=5)


def test_warnings_are_lines_and_none_for_our_own() -> None:
    made = recipe()
    layout = plan_layout(made, 2)
    config = resolve(made, layout)
    assert warnings(config, layout) == []
    config["zero_optimization"]["sub_group_size"] = 5
    assert warnings(config, layout) == [
        "zero_optimization.sub_group_size: has no effect at stage 2, only at stage 3"
    ]
