"""Did a row train the same as the plain loop? Nothing is fast that is not equal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.parity.compare import tolerances_of
from launch.perf.bench.rows import Row

if TYPE_CHECKING:
    from launch.parity.compare import Tolerances

BOUNDED_STEPS = 10  # as far as the bounds of launch/parity/compare.py were measured


@dataclass(frozen=True)
class Equality:
    """How far a row's losses are from the plain loop's.

    `share` is the largest difference of a step's loss as a share of its bound, and `step` (from 1) where it
    is; `equal` is whether no step exceeds its bound.
    """

    equal: bool
    share: float
    step: int


def bounds_of(row: Row) -> "Tolerances":
    """The bounds of `launch/parity/compare.py` for a row's precision, depth and layout.

    Other micro batches, a compiler or another attention kernel round elsewhere than the plain loop does, so
    in 16 bits the first loss has the bound of the later ones.
    """
    train = row.recipe.train.model_copy(update={"compile": True})
    return tolerances_of(row.recipe.model_copy(update={"train": train}), row.ds_config)


def compare_losses(
    expected: Sequence[float], got: Sequence[float], bounds: "Tolerances"
) -> Equality:
    """Compare the losses of all steps.

    Rounding grows from step to step: past `BOUNDED_STEPS`, the bound does too, in proportion to the step.

    Raises:
        ValueError: if the runs have different numbers of steps.
    """
    shares = []
    for step, (right, ours) in enumerate(zip(expected, got, strict=True), 1):
        bound = bounds.first_loss if step == 1 else bounds.loss * max(1.0, step / BOUNDED_STEPS)
        share = abs(ours - right) / abs(right) / bound
        shares.append(share if share == share else float("inf"))
    worst = max(range(len(shares)), key=lambda index: shares[index])
    return Equality(shares[worst] <= 1.0, shares[worst], worst + 1)
