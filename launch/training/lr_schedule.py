"""The learning rate as a pure function of the step, for both the engine and the reference."""

import math

from launch.config.schema import Schedule


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The multiplier of the JSON's learning rate at `step` (from 0) of `steps`.

    Warm-up rises linearly to 1 at its last step and is above 0 at step 0. The decay then falls from
    1 to `min_ratio` at the last step of the run.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return 1.0
    after_warmup = max(steps - 1 - schedule.warmup_steps, 1)
    done = min((step - schedule.warmup_steps) / after_warmup, 1.0)
    falling = 1.0 - done if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * falling
