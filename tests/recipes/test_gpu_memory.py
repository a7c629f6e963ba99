"""The planner's memory and step times against measurements on H200s: tests/recipes/gpu_memory.csv."""

import statistics

import pytest

from tests.benchmarks.memory_report import FITTED, Row, pairs_in_order, rows


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    return rows()


def test_every_peak_is_predicted_within_two_percent(measured: list[Row]) -> None:
    wrong = [f"{row.point.name}: {row.error:+.1%}" for row in measured if abs(row.error) > 0.02]
    assert not wrong
    assert statistics.median(abs(row.error) for row in measured) < 0.002


def test_the_measurements_have_every_kind_of_layout(measured: list[Row]) -> None:
    names = {row.point.layout for row in measured}
    assert {f"zero{stage}{more}" for stage in range(4) for more in ("", ", checkpoint")} <= names
    assert {"zero1, compile", "zero3, compile", "zero1, fp16", "zero3, offload"} <= names
    assert {"tensor 2", "tensor 2, sequence", "tensor 2, zero3"} <= names
    pipelines = ("", ", compile", ", gpipe", ", interleaved")
    assert {f"pipeline 2{more}" for more in pipelines} <= names
    shapes = {row.point.shape for row in measured}
    assert len(shapes) >= 4 and shapes - set(FITTED)
    assert {row.point.sequence for row in measured} == {1024, 2048}


def test_step_times_are_in_the_right_order(measured: list[Row]) -> None:
    right, total = pairs_in_order(measured)
    assert right / total > 0.93
    errors = [abs(row.plan.time.total / row.seconds - 1) for row in measured if row.timed]
    assert statistics.median(errors) < 0.06
