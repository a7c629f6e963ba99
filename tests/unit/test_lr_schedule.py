"""launch/training/lr_schedule.py: warm-up, decay, and nothing that depends on where a run was resumed."""

from itertools import pairwise

import pytest

from launch.config.schema import Schedule
from launch.training.lr_schedule import learning_rate_factor


def factors(schedule: Schedule, steps: int) -> list[float]:
    return [learning_rate_factor(schedule, step, steps) for step in range(steps)]


def test_warm_up_rises_evenly_and_its_first_step_learns() -> None:
    found = factors(Schedule(decay="constant", warmup_steps=4), 8)
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_is_whole() -> None:
    for decay in ("constant", "linear", "cosine"):
        assert learning_rate_factor(Schedule(decay=decay), 0, 10) == 1.0


def test_linear_decay_ends_at_its_minimum() -> None:
    found = factors(Schedule(decay="linear", warmup_steps=2, min_ratio=0.2), 7)
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_by_hand() -> None:
    found = factors(Schedule(decay="cosine", min_ratio=0.1), 5)
    # cos of 0, 45, 90, 135 and 180 degrees
    assert found == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_decay_never_rises(decay: str, min_ratio: float) -> None:
    schedule = Schedule.model_validate({"decay": decay, "warmup_steps": 10, "min_ratio": min_ratio})
    found = factors(schedule, 100)
    assert found[9] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(found[9:]))
    assert found[-1] == pytest.approx(min_ratio)


def test_past_the_end_it_stays_at_the_minimum() -> None:
    for decay in ("linear", "cosine"):
        schedule = Schedule.model_validate({"decay": decay, "min_ratio": 0.3})
        assert learning_rate_factor(schedule, 500, 100) == pytest.approx(0.3)


def test_a_warm_up_as_long_as_the_run() -> None:
    assert factors(Schedule(warmup_steps=3), 3) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors(Schedule(), 1) == [1.0]
