"""What `make test` leaves to `make test-all` are further cases: each kind keeps one."""

from collections.abc import Callable
from typing import Any

import pytest

from launch.paths import ROOT
from tests.cluster import test_hosts, test_slurm
from tests.ds_configs import test_json
from tests.parity import (
    test_copies,
    test_evaluation,
    test_faults,
    test_fp16,
    test_layouts,
    test_muon,
    test_parallel_faults,
    test_zero,
)
from tests.parity.faults import ONE_MODEL, SHARDED
from tests.parity.faults.seeded import Seeded
from tests.parity.kinds import KINDS, axes_of
from tests.recipes import test_recipes
from tests.resume import test_exact
from tests.selection import MATRIX, chosen_cases, representatives

TINY = {file.stem.removeprefix("gpt_tiny_") for file in (ROOT / "recipes").glob("gpt_tiny_*.yaml")}
STAGES = {"zero0", "zero1", "zero2", "zero3"}
PRECISIONS = {"fp32", "bf16"}


def firsts(test: Callable[..., Any]) -> list[Any]:
    """The first value of each case that `make test` runs; some cases are left to `make test-all`."""
    chosen = [values[0] for values in chosen_cases(test)]
    (mark,) = [mark for mark in vars(test)["pytestmark"] if mark.name == "parametrize"]
    assert 0 < len(chosen) < len(mark.args[1])
    return chosen


def test_a_case_without_a_kind_of_its_own_is_left_out() -> None:
    cases = representatives(["ab", "ac", "b", "bcd"], set, cost=lambda case: len(case) ** 0.5)
    left = {case.values[0]: [mark.name for mark in case.marks] for case in cases}
    assert left == {"ab": [], "ac": [MATRIX], "b": [MATRIX], "bcd": []}


def test_a_case_whose_kinds_others_have_by_the_end_is_left_out() -> None:
    cases = representatives(["bc", "ab", "cd"], set)
    assert [case.values[0] for case in cases if not case.marks] == ["ab", "cd"]


def test_every_tiny_recipe_is_trained_and_compared() -> None:
    trained = {file.stem.removeprefix("gpt_tiny_") for file in firsts(FILE_TEST)}
    assert trained >= TINY
    compared = {case.stem for test in LAYOUT_TESTS for case in firsts(test)}
    assert compared >= TINY


FILE_TEST = test_recipes.test_it_trains_in_its_own_layout
LAYOUT_TESTS = (
    test_zero.test_layout_equals_one_device,
    test_layouts.test_layout_equals_one_device,
    test_muon.test_layout_equals_one_device,
)


def test_every_stage_is_compared_in_each_precision() -> None:
    found = {c.stem for c in firsts(LAYOUT_TESTS[0]) if c.ranks > 1}
    assert found == {stem for stem in TINY if stem.startswith("zero")}
    assert {c.precision for c in firsts(LAYOUT_TESTS[0])} == PRECISIONS
    assert {c.stem for c in firsts(test_fp16.test_layout_equals_one_device)} == STAGES - {"zero0"}


def test_every_kind_of_layout_is_compared() -> None:
    for test in (
        test_copies.test_copies_are_equal_to_the_bit,
        test_evaluation.test_evaluation_is_that_of_one_device_and_leaves_no_trace,
    ):
        kinds = {kind.rpartition("-")[0] or kind for kind in firsts(test)}
        left = PRECISIONS | STAGES  # which the comparisons with one device have
        reached = {axis for kind in kinds for axis in axes_of(KINDS[kind]) - left}
        assert reached == {axis for case in KINDS.values() for axis in axes_of(case) - left}


@pytest.mark.parametrize(
    ("module", "faults"), [(test_faults, ONE_MODEL), (test_parallel_faults, SHARDED)]
)
def test_every_fault_is_seeded(module: Any, faults: list[Seeded]) -> None:
    (_, mark) = vars(module.test_fault_is_caught_and_found)["pytestmark"][::-1]
    assert mark.args[1] == faults


def test_every_twin_trains_under_trainer_or_accelerator() -> None:
    trainer = firsts(test_json.test_trains_under_the_real_trainer)
    accelerator = firsts(test_json.test_trains_under_the_real_accelerator)
    assert sorted([*trainer, *accelerator]) == test_json.HF


def test_every_kind_of_layout_is_killed_and_resumed() -> None:
    layouts = firsts(test_exact.test_a_killed_run_ends_like_one_never_killed)
    for part in (
        *("stage 0", "stage 1", "stage 2", "stage 3", "fp32", "bf16", "optimizer on the CPU"),
        *("all on the CPU", "all on a disk", "tensor 2", "pipeline 2", "sequence", "gpipe"),
    ):
        assert any(part in layout for layout in layouts), part


def test_every_launcher_and_every_way_to_end_is_tried_on_clusters() -> None:
    tests = [
        test for name, test in vars(test_hosts).items() if name.startswith("test_")
        if [mark.args[:1] for mark in vars(test).get("pytestmark", ())] == [("kind",)]
    ]  # fmt: skip
    assert [kind for test in tests for kind in firsts(test)] == ["ssh"]
    (two_hosts,) = vars(test_hosts.test_two_hosts_train_what_one_trains)["pytestmark"]
    assert two_hosts.args[1][0] == ("ssh", "pp2_tp2")  # not a param that is marked
    near_the_limit = test_slurm.test_a_job_near_its_time_limit_saves_and_goes_on_to_the_same_end
    assert "pytestmark" not in vars(near_the_limit)
