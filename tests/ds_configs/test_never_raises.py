"""The linter has an answer to any JSON: findings, and never an exception."""

from typing import Any

import pytest
from hypothesis import given, settings

from launch.ds_json.finding import Finding
from launch.ds_json.linter import lint
from tests.ds_configs.mutations import EXTREME, KNOWN, SEEDS, mutated, set_at


def check(config: dict[str, Any]) -> None:
    for hf in (False, True):
        for ranks in (None, 1, 8):
            for finding in lint(config, hf=hf, world_size=ranks):
                assert isinstance(finding, Finding)
                assert finding.line().isprintable()
                assert len(finding.message) < 500


@given(mutated(SEEDS))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_a_changed_config_gets_findings(config: dict[str, Any]) -> None:
    check(config)


@pytest.mark.matrix
@given(mutated(SEEDS))
@settings(max_examples=3000, derandomize=True, deadline=None)
def test_many_changed_configs_get_findings(config: dict[str, Any]) -> None:
    check(config)


ODD = [*EXTREME, 10**5000, None, True, "auto", [], {}, [[]], "x"]


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.matrix) for part in range(1, 6))]
)
@pytest.mark.parametrize("number", range(len(ODD)))  # pytest would print the values
def test_any_key_may_hold_anything(number: int, part: int) -> None:
    """A part has a third of the keys for each value; each is read as of a JSON for the Trainer, or not."""
    for place, path in enumerate(KNOWN):
        if (place + number) % 3 != part % 3:
            continue
        config: dict[str, Any] = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
        set_at(config, path, ODD[number])
        lint(config, hf=(place // 3 + part // 3) % 2 == 0, world_size=2)


def test_deep_nesting_is_one_finding() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    (finding,) = lint({"bf16": deep})
    assert finding.rule == "too-deep"


def test_what_is_no_object_is_one_finding() -> None:
    values: list[Any] = [None, [], 1, "x"]
    assert [lint(value)[0].rule for value in values] == ["not-an-object"] * 4
