"""What scripts/bench.py times and how it judges it: rows, levers, the comparison of losses."""

import math
from dataclasses import replace

import pytest

from launch.errors import UserError
from launch.parity.compare import Tolerances
from launch.paths import ROOT
from launch.perf.bench.equality import compare_losses
from launch.perf.bench.result import quantile
from launch.perf.bench.rows import Row, Sweep, plan_rows
from launch.perf.levers import LEVERS

BOUNDS = Tolerances(first_loss=1e-6, loss=1e-4, grad_norm=1.0, matrices=1.0, vectors=1.0)
SETS = ("train.steps=4", "train.compile=false", "deepspeed.bf16.enabled=true")


def sweep(recipe: str, ranks: int, rows: tuple[str, ...] = ()) -> tuple[list[Row], dict[str, str]]:
    skipped: dict[str, str] = {}
    asked = Sweep(str(ROOT / f"recipes/{recipe}.yaml"), SETS, ranks, LEVERS, False, rows)
    return plan_rows(asked, skipped.__setitem__), skipped


@pytest.mark.parametrize(
    ("recipe", "ranks"),
    [
        ("gpt_tiny_zero2", 2), ("gpt_tiny_zero3", 2), ("gpt_tiny_tp2_zero1", 2),
        ("gpt_tiny_pp2_zero1", 2),
    ],
)  # fmt: skip
def test_a_lever_applies_or_says_why_not(recipe: str, ranks: int) -> None:
    rows, skipped = sweep(recipe, ranks)
    names = [row.name for row in rows if row.kind == "recipe"][1:]
    assert sorted([*names, *skipped]) == sorted(lever.name for lever in LEVERS)
    base = next(row for row in rows if row.kind == "recipe")
    for row in rows[2:]:
        assert (row.recipe, row.ds_config) != (base.recipe, base.ds_config), row.name
        assert row.trains == base.trains, "a lever changes how, not what is trained"
    assert "compile-off" in skipped
    assert ("sequence-on" in names) == (base.recipe.parallel.tensor > 1)
    assert ("schedule-gpipe" in names) == (base.recipe.parallel.pipeline > 1)
    assert ("overlap-off" in names) == ("zero2" in recipe or "zero3" in recipe)


def test_each_lever_applies_to_some_recipe() -> None:
    applied = {
        row.name
        for recipe in (
            "gpt_tiny_zero2",
            "gpt_tiny_zero3",
            "gpt_tiny_tp2_zero1",
            "gpt_tiny_pp2_zero1",
        )
        for row in sweep(recipe, 2)[0]
    }
    already = {
        "compile-off", "graphs-off", "recompute-off", "sequence-off", "schedule-1f1b", "overlap-on",
        "partition-parameters", "gradients-at-once", "loss-at-once", "copies-off",
    }  # fmt: skip
    assert {lever.name for lever in LEVERS} - applied == already


def test_what_is_trained_otherwise_gets_a_plain_loop_of_its_own() -> None:
    written = ("same: train.micro_batch_size=1", "longer: data.sequence_length=128")
    optimizer = "deepspeed.optimizer"
    adam = f"adam: {optimizer}.type=Adam {optimizer}.params.adam_w_mode=false"
    rows, _ = sweep("gpt_tiny_zero2", 2, (*written, adam))
    names = [row.name for row in rows]
    assert names[:2] == ["plain loop", "ds_configs/zero2.json"]
    assert names[-4:] == ["same", "plain loop of longer", "longer", "adam"]
    plain = rows[names.index("plain loop of longer")]
    assert (plain.kind, plain.ranks, plain.recipe.data.sequence_length) == ("plain", 1, 128)
    assert "optimizer.params.adam_w_mode" in str(rows[-1].incomparable)
    assert rows[-2].incomparable is None


def test_a_row_that_does_not_compose_is_rejected_before_anything_runs() -> None:
    with pytest.raises(
        UserError, match=r"--row p: .*parallel.pipeline: DeepSpeed runs a pipeline with"
    ):
        sweep("gpt_tiny_zero2", 2, ("p: parallel.pipeline=2",))


def test_losses_of_all_steps_have_to_be_equal() -> None:
    right = [3.0] * 20
    assert compare_losses(right, right, BOUNDS).equal

    def at(step: int, by: float) -> bool:
        got = list(right)
        got[step - 1] *= 1 + by
        found = compare_losses(right, got, BOUNDS)
        assert found.step == step
        return found.equal

    assert at(1, 0.9e-6) and not at(1, 1.1e-6)
    assert at(2, 0.9e-4) and not at(2, 1.1e-4)
    # Beyond ten steps rounding has grown.
    assert at(20, 1.9e-4) and not at(20, 2.1e-4)
    assert not at(5, math.nan) and not at(5, math.inf)
    with pytest.raises(ValueError, match="zip"):
        compare_losses(right, right[:-1], BOUNDS)


def test_the_first_loss_has_no_tighter_bound_in_16_bits() -> None:
    from launch.perf.bench.equality import bounds_of

    (_, row, *_), _ = sweep("gpt_tiny_zero1", 2)
    half = bounds_of(row)
    assert half.first_loss == half.loss > 5e-5
    whole = {**row.recipe.deepspeed, "bf16": {"enabled": False}}
    recipe = row.recipe.model_copy(update={"deepspeed": whole})
    assert bounds_of(replace(row, recipe=recipe)).first_loss == 5e-7


def test_quantiles() -> None:
    assert [quantile([1.0, 2.0, 3.0], share) for share in (0.0, 0.5, 0.75, 1.0)] == [1, 2, 2.5, 3]
    assert quantile([4.0], 0.9) == 4
